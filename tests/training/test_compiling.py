"""Blocks compile with every checkpointing mode, once for all blocks, and compute the same."""

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters

from opensora.models.checkpointing import Checkpointing, set_activation_checkpointing
from opensora.models.stdit import STDiT, STDiTConfig
from opensora.training.compiling import compile_blocks

CONFIG = STDiTConfig((2, 4, 4), hidden_size=32, depth=3, num_heads=2, caption_channels=16, model_max_length=6)


def build() -> STDiT:
    torch.manual_seed(0)
    model = STDiT(CONFIG)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.05)
    return model.eval()


def gradients(model: STDiT, low: bool) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    x, y = torch.randn(2, 4, 2, 4, 4, generator=generator), torch.randn(2, 1, 6, 16, generator=generator)
    model.zero_grad()
    with torch.autocast("cpu", torch.bfloat16, enabled=low):
        loss = model(x, torch.tensor([3.0, 20.0]), y, torch.ones(2, 6)).square().mean()
    loss.backward()
    return [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]


@pytest.mark.parametrize(("mode", "low"), [("none", False), ("selective", True), ("full", True)])
def test_two_graphs_do_for_all_blocks_and_gradients_are_the_same(mode: Checkpointing, low: bool) -> None:
    """By the back end that runs the captured graphs as they are: what is captured is the question, and it is quick."""
    torch._dynamo.reset()
    counters.clear()
    expected = gradients(build(), low)
    model = build()
    set_activation_checkpointing(model, mode)
    assert compile_blocks(model, backend="aot_eager") == CONFIG.depth
    for _ in range(2):  # the second step compiles nothing
        found = gradients(model, low)
    assert counters["stats"]["unique_graphs"] == 2  # the first block, which sees the temporal position, and all others
    assert not counters["graph_break"]
    assert counters["frames"]["ok"] == counters["frames"]["total"]
    for ours, theirs in zip(found, expected, strict=True):
        assert (ours - theirs).norm() <= (0.02 if low else 1e-5) * theirs.norm() + 1e-8


def test_a_model_without_blocks_is_refused() -> None:
    with pytest.raises(ValueError, match="Linear has no list of blocks"):
        compile_blocks(nn.Linear(2, 2))
