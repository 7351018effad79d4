"""The formulas foretell, within a tenth, what autograd really saves and what a backward pass really holds."""

from contextlib import nullcontext

import pytest
import torch

from opensora.models.activations import AUTOCAST, BFLOAT16, FLOAT32, activations, weight_copy_bytes
from opensora.models.checkpointing import Checkpointing, set_activation_checkpointing
from opensora.models.flops import Trainable
from opensora.models.stdit import STDiT, STDiTConfig
from tests.live_bytes import LiveBytes

TEXT, BATCH = 12, 2
CONFIG = STDiTConfig((4, 16, 16), hidden_size=96, depth=3, num_heads=4, caption_channels=48, model_max_length=TEXT)
PRECISIONS = {"float32": FLOAT32, "autocast": AUTOCAST, "bfloat16": BFLOAT16}

pytestmark = pytest.mark.usefixtures("one_thread")


def build(config: STDiTConfig, kind: str, trainable: str = "all", checkpointing: Checkpointing = "none") -> STDiT:
    model = STDiT(config).train()
    if kind == "bfloat16":
        model.bfloat16()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(Trainable.named(trainable).has(name))
    set_activation_checkpointing(model, checkpointing)
    return model


def forward(model: STDiT, size: tuple[int, int, int], kind: str) -> torch.Tensor:
    config = model.config
    text = torch.randn(BATCH, 1, config.model_max_length, config.caption_channels)
    mask = torch.ones(BATCH, config.model_max_length)
    low = torch.autocast("cpu", torch.bfloat16) if kind == "autocast" else nullcontext()
    with low:
        out = model(torch.randn(BATCH, config.in_channels, *size), torch.full((BATCH,), 500.0), text, mask)
        return out.square().mean()


def saved_bytes(model: STDiT, size: tuple[int, int, int], kind: str) -> int:
    """Of all tensors that autograd saves, each storage once, without those of the model and copies of its weights."""
    owned = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}
    weights = {tuple(sorted(parameter.shape)) for parameter in model.parameters() if parameter.ndim == 2}
    weights.add((model.config.hidden_size,) * 2)  # a third of temporal attention's qkv
    kept: dict[int, torch.Tensor] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        place = tensor.untyped_storage().data_ptr()
        copy = tensor.ndim == 2 and tuple(sorted(tensor.shape)) in weights
        if place not in owned and not copy:
            kept[place] = tensor  # held, so that its place is not used again
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = forward(model, size, kind)
    assert loss.requires_grad
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


@pytest.mark.parametrize("kind", PRECISIONS)
@pytest.mark.parametrize("trainable", ["all", "no_text", "temporal"])
@pytest.mark.parametrize("size", [(4, 16, 16), (1, 20, 28)], ids=str)
def test_saved_activations_are_foretold(kind: str, trainable: str, size: tuple[int, int, int]) -> None:
    counted = saved_bytes(build(CONFIG, kind, trainable), size, kind)
    foretold = activations(CONFIG, size, TEXT, PRECISIONS[kind], trainable=Trainable.named(trainable))
    assert BATCH * sum(foretold.saved.values()) == pytest.approx(counted, rel=0.1)


@pytest.mark.parametrize("kind", PRECISIONS)
@pytest.mark.parametrize("checkpointing", ["none", "selective", "full"])
@pytest.mark.parametrize("frames", [12, 24])
def test_the_peak_of_a_step_is_foretold(kind: str, checkpointing: Checkpointing, frames: int) -> None:
    """All that is alive at the worst moment of a step; gradients of weights, which are few then, are not counted."""
    size = (frames, 16, 16)
    model = build(CONFIG, kind, checkpointing=checkpointing)
    with LiveBytes() as live:
        forward(model, size, kind).backward()
    foretold = activations(CONFIG, size, TEXT, PRECISIONS[kind], checkpointing)
    gradients = sum(parameter.nbytes for parameter in model.parameters())
    casts = weight_copy_bytes(CONFIG, PRECISIONS[kind])
    begin = BATCH * foretold.peak + casts * (1 if checkpointing == "full" else CONFIG.depth)
    expected = max(begin, BATCH * foretold.end + casts + gradients)
    assert expected == pytest.approx(live.peak, rel=0.1)


def test_processes_that_share_a_sample_share_its_activations() -> None:
    """All but the text's keys and values, which everybody has; 360x512x512 of the full model."""
    xl = STDiTConfig((360, 64, 64))
    for checkpointing in ("none", "selective", "full"):
        whole, half = (activations(xl, xl.input_size, 120, AUTOCAST, checkpointing, ranks=n).peak for n in (1, 2))
        assert half == pytest.approx(whole / 2, rel=1e-3)


def test_checkpointing_saves_what_it_promises() -> None:
    """Selective: at least 30 % of what is saved without; full: nearly all."""
    xl = STDiTConfig((16, 32, 32))
    none, selective, full = (
        sum(activations(xl, xl.input_size, 120, AUTOCAST, kind).saved.values())
        for kind in ("none", "selective", "full")
    )
    assert selective < 0.7 * none
    assert full < 0.1 * none
