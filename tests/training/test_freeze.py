"""What learns is chosen by name, and the rest does not move, with any checkpointing."""

import pytest
import torch
from torch import nn

from opensora.models.checkpointing import MODES, Checkpointing, set_activation_checkpointing
from opensora.models.dit import DiT
from opensora.models.stdit import STDiT, STDiTConfig
from opensora.training.freeze import Trainable, freeze

CONFIG = STDiTConfig((2, 4, 4), hidden_size=32, depth=2, num_heads=2, caption_channels=16, model_max_length=6)


def trained(trainable: Trainable, mode: Checkpointing) -> tuple[set[str], set[str]]:
    """Parts that got a gradient, and those that did not."""
    torch.manual_seed(0)
    model = STDiT(CONFIG)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.1)
    freeze(model, trainable)
    set_activation_checkpointing(model, mode)
    out = model(torch.randn(1, 4, 2, 4, 4), torch.tensor([30.0]), torch.randn(1, 1, 6, 16))
    out.square().mean().backward()
    parts: tuple[set[str], set[str]] = (set(), set())
    for name, parameter in model.named_parameters():
        moves = parameter.grad is not None and bool(parameter.grad.any())
        assert moves == parameter.requires_grad, name
        words = name.split(".")
        parts[not moves].add(words[2] if words[0] == "blocks" else words[0])
    return parts


@pytest.mark.parametrize("mode", MODES)
def test_temporal_attention_alone(mode: Checkpointing) -> None:
    learning, frozen = trained("temporal", mode)
    assert learning == {"attn_temp"}
    assert {"attn", "cross_attn", "mlp", "scale_shift_table", "x_embedder", "final_layer"} <= frozen


@pytest.mark.parametrize("mode", MODES)
def test_all_but_what_reads_the_text(mode: Checkpointing) -> None:
    learning, frozen = trained("no_text", mode)
    assert frozen == {"cross_attn", "y_embedder"}
    assert {"attn", "attn_temp", "mlp", "t_block"} <= learning


def test_all() -> None:
    assert trained("all", "none")[1] == set()


def test_freezing_is_undone_by_all() -> None:
    model = STDiT(CONFIG)
    freeze(model, "temporal")
    freeze(model, "all")
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_a_model_in_which_nothing_would_learn_is_refused() -> None:
    with pytest.raises(ValueError, match="DiT has no parameters that learn with trainable=temporal"):
        freeze(DiT(CONFIG), "temporal")
    with pytest.raises(ValueError, match="must be all, temporal or no_text, got 'none'"):
        freeze(DiT(CONFIG), "none")  # type: ignore[arg-type]
