"""The formulas count what PyTorch's own counter counts, to the last operation."""

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from opensora.models.checkpointing import set_activation_checkpointing
from opensora.models.flops import Tokens, Trainable, block_products, forward_flops, training_flops
from opensora.models.stdit import STDiT, STDiTConfig

TEXT = 7
BATCH = 2
SMALL = STDiTConfig(
    (4, 10, 12), hidden_size=32, depth=3, num_heads=4, caption_channels=48, model_max_length=TEXT, mlp_ratio=3.0
)
XL = STDiTConfig((16, 32, 32))


def counted(model: STDiT, size: tuple[int, int, int], backward: bool, device: str = "cpu", batch: int = BATCH) -> int:
    config = model.config
    x = torch.randn(batch, config.in_channels, *size, device=device)
    text = torch.randn(batch, 1, config.model_max_length, config.caption_channels, device=device)
    mask = torch.ones(batch, config.model_max_length, device=device)
    # The fused kernels' backward passes compute the scores a second time, which is no work of the model.
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        out = model(x, torch.full((batch,), 500.0, device=device), text, mask)
        if backward:
            out.square().mean().backward()
    return counter.get_total_flops()


def build(config: STDiTConfig, trainable: str = "all") -> STDiT:
    model = STDiT(config).train()
    chosen = Trainable.named(trainable)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(chosen.has(name))
    return model


@pytest.mark.parametrize("size", [(4, 10, 12), (1, 8, 8), (3, 5, 7)], ids=str)  # one frame; sizes that are padded
@pytest.mark.parametrize("trainable", ["all", "no_text", "temporal"])
def test_small_models_are_counted_exactly(size: tuple[int, int, int], trainable: str) -> None:
    model = build(SMALL, trainable)
    assert BATCH * forward_flops(SMALL, size, TEXT) == counted(model, size, backward=False)
    expected = BATCH * training_flops(SMALL, size, TEXT, Trainable.named(trainable))
    assert expected == counted(model, size, backward=True)


def test_recomputed_blocks_are_counted_exactly() -> None:
    """Selective checkpointing repeats no matrix product."""
    model = build(SMALL)
    set_activation_checkpointing(model, "selective")
    assert BATCH * training_flops(SMALL, (4, 10, 12), TEXT) == counted(model, (4, 10, 12), True)
    set_activation_checkpointing(model, "full")
    assert BATCH * training_flops(SMALL, (4, 10, 12), TEXT, recompute_blocks=True) == counted(model, (4, 10, 12), True)


@pytest.mark.parametrize(
    ("size", "published_tflop"), [((16, 32, 32), 5.71), ((16, 64, 64), 24.4), ((64, 64, 64), 97.9)], ids=str
)
def test_the_full_model_is_counted_exactly(size: tuple[int, int, int], published_tflop: float) -> None:
    with torch.device("meta"):
        model = STDiT(XL)
    flops = forward_flops(XL, size, XL.model_max_length)
    assert flops == counted(model, size, backward=False, device="meta", batch=1)
    assert flops / 1e12 == pytest.approx(published_tflop, rel=2e-3)


def test_processes_share_a_sample() -> None:
    """Frames and places are shared out, and what does not divide is padded; the text is everybody's."""
    assert Tokens.of(XL, (16, 32, 32), 120, ranks=4)[3:] == (4 * 256, 16 * 64)
    assert Tokens.of(XL, (3, 6, 6), 120, ranks=2)[3:] == (2 * 9, 3 * 5)
    whole, half = (training_flops(XL, (16, 32, 32), 120, ranks=ranks) for ranks in (1, 2))
    text = 3 * 2 * 120 * 1152 * 1152 * 2 * XL.depth  # keys and values
    assert whole / 2 < half < whole / 2 + 2 * text


def test_a_frozen_model_costs_less() -> None:
    whole, no_text, temporal = (
        training_flops(XL, (16, 32, 32), 120, Trainable.named(name)) for name in ("all", "no_text", "temporal")
    )
    assert temporal < no_text < whole < 3 * forward_flops(XL, (16, 32, 32), 120)
    tokens = Tokens.of(XL, (16, 32, 32), 120)
    again = XL.depth * 2 * sum(product.multiply_adds for product in block_products(XL, tokens))
    assert training_flops(XL, (16, 32, 32), 120, recompute_blocks=True) == whole + again
