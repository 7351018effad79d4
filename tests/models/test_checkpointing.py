"""Activation checkpointing changes memory, never gradients; selective repeats nothing that is expensive."""

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode

from opensora.models.attention import TemporalAttention
from opensora.models.checkpointing import Checkpointing, set_activation_checkpointing
from opensora.models.dit import DiT
from opensora.models.stdit import STDiT, STDiTConfig
from tests.live_bytes import LiveBytes

CONFIG = STDiTConfig((4, 8, 8), hidden_size=64, depth=2, num_heads=4, caption_channels=16, model_max_length=6)
PRODUCTS = ("aten.addmm.default", "aten.mm.default", "aten._scaled_dot_product_flash_attention_for_cpu.default")

pytestmark = pytest.mark.usefixtures("one_thread")


def build(kind: type[STDiT] | type[DiT] = STDiT, config: STDiTConfig = CONFIG) -> STDiT | DiT:
    torch.manual_seed(0)
    model = kind(config)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.05)
    return model.eval()  # no caption is dropped


def loss_of(model: nn.Module, low: bool = False, config: STDiTConfig = CONFIG) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(2, 4, *config.input_size, generator=generator)
    y = torch.randn(2, 1, config.model_max_length, config.caption_channels, generator=generator)
    mask = torch.tensor([[1, 1, 0, 0, 0, 0], [1, 0, 1, 0, 1, 0]])
    with torch.autocast("cpu", torch.bfloat16, enabled=low):
        return model(x, torch.tensor([3.0, 800.0]), y, mask).square().mean()


def gradients(model: nn.Module, low: bool = False) -> dict[str, Tensor]:
    model.zero_grad()
    loss_of(model, low).backward()
    found = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    return {name.removeprefix("module."): getattr(value, "full_tensor", value.clone)() for name, value in found.items()}


@pytest.mark.parametrize("kind", [STDiT, DiT])
@pytest.mark.parametrize("low", [False, True], ids=["float32", "autocast"])
@pytest.mark.parametrize("mode", ["selective", "full"])
def test_gradients_are_equal_to_the_bit(kind: type[STDiT] | type[DiT], low: bool, mode: Checkpointing) -> None:
    model = build(kind)
    expected = gradients(model, low)
    set_activation_checkpointing(model, mode)
    found = gradients(model, low)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


class Calls(TorchDispatchMode):
    """Counts operations."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.counts[str(func)] += 1
        return func(*args, **(kwargs or {}))


def after_forward(mode: Checkpointing, low: bool) -> int:
    """Bytes that a forward pass leaves for the backward one."""
    config = STDiTConfig((4, 16, 16), hidden_size=64, depth=3, num_heads=4, caption_channels=16, model_max_length=6)
    model = build(config=config)
    set_activation_checkpointing(model, mode)
    with LiveBytes() as live:
        loss = loss_of(model, low, config)
        left = live.now
    loss.backward()
    return left


@pytest.mark.parametrize("low", [False, True], ids=["float32", "autocast"])
def test_selective_saves_a_third_of_the_memory_and_full_most_of_it(low: bool) -> None:
    none, selective, full = (after_forward(mode, low) for mode in ("none", "selective", "full"))
    assert selective < 0.72 * none
    assert full < 0.25 * none


def test_selective_repeats_norms_and_activations_but_no_product_and_no_attention() -> None:
    model = build()
    repeated: dict[str, Counter[str]] = {}
    for mode in ("none", "selective", "full"):
        set_activation_checkpointing(model, mode)
        loss = loss_of(model)
        with Calls() as calls:
            loss.backward()
        repeated[mode] = calls.counts
    for name in PRODUCTS:
        assert repeated["selective"][name] == repeated["none"][name]
        assert repeated["full"][name] > repeated["none"][name] or name == "aten.mm.default"
    assert repeated["none"]["aten.native_layer_norm.default"] == 0
    assert repeated["selective"]["aten.native_layer_norm.default"] == 2 * CONFIG.depth
    assert repeated["selective"]["aten.gelu.default"] == CONFIG.depth


@pytest.fixture
def group(tmp_path: Path) -> Iterator[None]:
    """A process group of this process alone."""
    dist.init_process_group("gloo", store=dist.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("mode", ["selective", "full"])
@pytest.mark.usefixtures("group")
def test_wrapped_by_ddp_or_fsdp_the_gradients_stay_the_same(mode: Checkpointing) -> None:
    expected = gradients(build(), low=True)
    for wrap in ("ddp", "fsdp"):
        model = build()
        set_activation_checkpointing(model, mode)
        if wrap == "ddp":
            found = gradients(DistributedDataParallel(model), low=True)
        else:
            for block in model.blocks:
                fully_shard(block)
            found = gradients(fully_shard(model), low=True)
        for name, value in expected.items():
            assert torch.equal(found[name], value), (wrap, name)


def test_without_gradients_nothing_is_kept() -> None:
    model = build()
    set_activation_checkpointing(model, "selective")
    with torch.no_grad():
        assert loss_of(model).grad_fn is None


def test_temporal_attention_keeps_one_copy_of_its_input_under_autocast() -> None:
    attention = TemporalAttention(64, 4)
    x = torch.randn(2, 4, 16, 64, requires_grad=True)
    kept: dict[int, int] = {}

    def keep(value: Tensor) -> Tensor:
        if value.dtype == torch.bfloat16 and value.numel() == x.numel():
            kept[value.untyped_storage().data_ptr()] = value.untyped_storage().nbytes()
        return value

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda value: value), torch.autocast("cpu", torch.bfloat16):
        attention(x)
    sizes = Counter(size // (2 * x.numel()) for size in kept.values())
    assert sizes == {3: 1, 1: 2}  # queries, keys and values in one; the input and the result


def test_what_cannot_be_checkpointed_is_said() -> None:
    with pytest.raises(ValueError, match="must be one of none, selective, full, got 'some'"):
        set_activation_checkpointing(build(), "some")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="Linear has no blocks"):
        set_activation_checkpointing(nn.Linear(2, 2), "full")
