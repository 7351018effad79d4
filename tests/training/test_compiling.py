"""Blocks compile with every checkpointing mode, once for all blocks, and compute the same."""

from collections import Counter

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters

from opensora.models import temporal_kernel
from opensora.models.checkpointing import Checkpointing, set_activation_checkpointing
from opensora.models.stdit import STDiT, STDiTConfig
from opensora.training.compiling import compile_blocks

CONFIG = STDiTConfig((2, 4, 4), hidden_size=32, depth=3, num_heads=2, caption_channels=16, model_max_length=6)

pytestmark = pytest.mark.usefixtures("one_thread")


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


@pytest.mark.parametrize(("mode", "low"), [("none", False), ("full", True)])
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


def test_the_kernel_for_few_frames_is_compiled_into_the_block_and_not_run_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Its place is taken by the same mathematics on the CPU, so that what surrounds it is compiled as on a GPU."""
    calls: Counter[str] = Counter()

    def attend(qkv: torch.Tensor) -> torch.Tensor:
        calls["forward"] += 1
        return (weights_of(qkv) @ qkv[:, :, :, 2].transpose(1, 2).float()).transpose(1, 2).to(qkv.dtype).contiguous()

    def attend_backward(gradient: torch.Tensor, qkv: torch.Tensor) -> torch.Tensor:
        calls["backward"] += 1
        q, k, v = (part.transpose(1, 2).float() for part in qkv.unbind(3))
        weights, g = weights_of(qkv), gradient.transpose(1, 2).float()
        of_weights = g @ v.mT
        of_scores = weights * (of_weights - (weights * of_weights).sum(-1, keepdim=True)) * q.shape[-1] ** -0.5
        parts = of_scores @ k, of_scores.mT @ q, weights.mT @ g
        return torch.stack([part.transpose(1, 2) for part in parts], dim=3).to(qkv.dtype)

    def weights_of(qkv: torch.Tensor) -> torch.Tensor:
        q, k = (qkv[:, :, :, index].transpose(1, 2).float() for index in (0, 1))
        return (q @ k.mT * q.shape[-1] ** -0.5).softmax(-1)

    torch._dynamo.reset()
    counters.clear()
    expected = gradients(build(), low=True)
    temporal_kernel.attend.register_kernel("cpu", attend)
    temporal_kernel._attend_backward.register_kernel("cpu", attend_backward)
    monkeypatch.setattr(temporal_kernel, "fits", lambda qkv: True)
    model = build()
    set_activation_checkpointing(model, "selective")
    compile_blocks(model, backend="aot_eager")
    found = gradients(model, low=True)
    assert calls == {"forward": CONFIG.depth, "backward": CONFIG.depth}
    assert counters["stats"]["unique_graphs"] == 2
    assert not counters["graph_break"]
    for ours, theirs in zip(found, expected, strict=True):
        assert (ours - theirs).norm() <= 0.02 * theirs.norm() + 1e-8


def test_a_model_without_blocks_is_refused() -> None:
    with pytest.raises(ValueError, match="Linear has no list of blocks"):
        compile_blocks(nn.Linear(2, 2))
