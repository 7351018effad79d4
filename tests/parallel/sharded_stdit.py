"""A small STDiT run in one way after another, on one device or shared by processes; `test_sequence.py` compares.

`python -m tests.parallel.sharded_stdit WORLD FOLDER` starts so many processes.
"""

import sys
from collections.abc import Callable
from contextlib import nullcontext
from copy import deepcopy
from dataclasses import dataclass, replace
from datetime import timedelta
from functools import partial
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.multiprocessing import start_processes
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from benchmarks.sequence_memory import saved_bytes
from opensora.config import ConfigError
from opensora.diffusion.guidance import guided
from opensora.models.stdit import STDiT, STDiTConfig
from opensora.parallel.sequence import SequenceGroup, shard_model

LIMIT = timedelta(seconds=120)
Result = dict[str, Tensor]


@dataclass(frozen=True)
class Case:
    """One way to run the model."""

    size: tuple[int, int, int] = (4, 8, 8)  # latent frames, height, width; four, sixteen tokens a frame
    dtype: torch.dtype = torch.float32
    masked: bool = True
    checkpointing: bool = False
    autocast: bool = False
    drop: bool = False  # captions, at random
    seed: int = 1


CASES = {
    "all divides": Case(masked=False),
    "nothing divides": Case((5, 5, 9)),  # 15 tokens a frame
    "nothing divides, float64": Case((7, 3, 6), torch.float64),
    "fewer than processes": Case((3, 2, 2), torch.float64),
    "one frame": Case((1, 8, 8)),
    "checkpointing, dropped captions": Case((6, 6, 6), checkpointing=True, drop=True),
    "bf16": Case(autocast=True),
}
SAMPLES = tuple(Case((5, 4, 6), seed=seed) for seed in range(4))  # of a batch that data groups share


def build(case: Case) -> STDiT:
    """The same model everywhere; no layer is zero, which would hide mistakes."""
    torch.manual_seed(0)
    shape = STDiTConfig((4, 8, 8), hidden_size=32, depth=3, num_heads=2, caption_channels=16, model_max_length=6)
    model = STDiT(replace(shape, class_dropout_prob=0.5 if case.drop else 0.0))
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.1)
    if case.checkpointing:
        for block in model.blocks:
            block.forward = partial(checkpoint, block.forward, use_reentrant=False)
    return model.to(case.dtype).train()


def inputs(case: Case) -> tuple[Tensor, ...]:
    """Latents, timesteps, text, mask."""
    generator = torch.Generator().manual_seed(case.seed)
    x = torch.randn(2, 4, *case.size, generator=generator, dtype=torch.float64)
    y = torch.randn(2, 1, 6, 16, generator=generator, dtype=torch.float64)
    mask = torch.tensor([[1, 1, 0, 1, 0, 0], [1, 1, 1, 1, 1, 0]]) if case.masked else None
    return x.to(case.dtype), torch.tensor([20.0, 700.5]), y.to(case.dtype), mask


def loss(model: Callable[..., Tensor], case: Case) -> tuple[Tensor, Tensor]:
    """A loss in which every output counts differently, and the output."""
    torch.manual_seed(case.seed)  # captions are dropped by it
    with torch.autocast("cpu", torch.bfloat16) if case.autocast else nullcontext():
        out = model(*inputs(case))
    weight = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view(out.shape)
    return (out * weight).mean() + out.square().mean(), out


def gradients(model: nn.Module, average: bool = False) -> Result:
    """By parameter; over all processes, as every engine has them, with `average`."""
    found = {}
    for name, parameter in model.named_parameters():
        gradient = parameter.grad
        assert gradient is not None, name
        gradient = gradient.full_tensor() if isinstance(gradient, DTensor) else gradient.clone()
        if average:
            dist.all_reduce(gradient)
            gradient /= dist.get_world_size()
        found[name.removeprefix("module.")] = gradient
    return found


def run(case: Case, group: SequenceGroup | None = None) -> Result:
    """Output, loss and gradients, and the bytes that the forward pass keeps for the backward pass."""
    model = build(case)
    if group:
        shard_model(model, group)
    with saved_bytes(model) as kept:
        value, out = loss(model, case)
    value.backward()
    found = {"out": out.detach(), "loss": value.detach(), "kept": torch.tensor(kept.total)}
    return found | gradients(model, average=group is not None)


@torch.no_grad()
def sample(group: SequenceGroup | None = None) -> Tensor:
    """A guided prediction with the text prepared once: both halves in one batch."""
    case = Case((5, 5, 9))
    model = build(case).eval()
    if group:
        shard_model(model, group)
    x, t, y, mask = inputs(case)
    predict = guided(model, x, y, model.y_embedder.y_embedding[None, None], mask, 4.0, "full")
    predict(x, t[:1])
    return predict(x, t[1:])


def accumulate(cases: tuple[Case, ...], wrap: Callable[[STDiT], nn.Module] = lambda model: model) -> Result:
    """Gradients of the mean loss over cases, accumulated one after another."""
    model = build(cases[0])
    wrapped = wrap(model)
    for number, case in enumerate(cases):
        local = isinstance(wrapped, DistributedDataParallel) and number < len(cases) - 1
        with wrapped.no_sync() if local else nullcontext():
            (loss(wrapped, case)[0] / len(cases)).backward()
    return gradients(model)


def wrap_ddp(group: SequenceGroup, model: STDiT) -> nn.Module:
    shard_model(model, group)
    return DistributedDataParallel(model)


def wrap_fsdp(group: SequenceGroup, model: STDiT) -> nn.Module:
    shard_model(model, group)
    for block in model.blocks:
        fully_shard(block)
    return fully_shard(model)


def refusal(call: Callable[[], object]) -> str:
    """The line with which a wrong configuration is refused."""
    try:
        call()
    except ConfigError as error:
        return str(error)
    return "not refused"


def refusals(group: SequenceGroup) -> dict[str, str]:
    """What is said when the last rank has latents and text of its own, and when it also drops other captions."""
    wrong = Case(seed=1 + group.rank // (group.size - 1))
    return {
        "other inputs": refusal(lambda: run(wrong, group)),
        "other captions": refusal(lambda: run(replace(wrong, drop=True), group)),
    }


def swaps(group: SequenceGroup) -> list[int]:
    """How many all-to-alls a forward and a backward pass make."""
    counts = []
    model = build(Case())
    shard_model(model, group)
    model = deepcopy(model)  # which works over the same group
    with mock.patch.object(dist, "all_to_all_single", wraps=dist.all_to_all_single) as calls:
        value, _ = loss(model, Case())
        counts.append(calls.call_count)
        value.backward()
        counts.append(calls.call_count - counts[0])
    return counts


def work(world: int) -> dict[str, object]:
    """Everything that is compared, by size of the sequence group and name."""
    found: dict[str, object] = {"no divisor": refusal(lambda: SequenceGroup(3))}
    for size in (world, 2):
        group = SequenceGroup(size, timeout=LIMIT)
        found |= {f"{size} {name}": run(case, group) for name, case in CASES.items()}
        found[f"{size} guided"] = sample(group)
        found[f"{size} ranks"] = (group.data_rank, group.data_size, group.rank, group.size)
        if size == world:
            found |= refusals(group)
            found["swaps"] = swaps(group)
        else:
            mine = SAMPLES[group.data_rank :: group.data_size]
            found["ddp"] = accumulate(mine, partial(wrap_ddp, group))
            found["fsdp"] = accumulate(mine, partial(wrap_fsdp, group))
        group.close()
    return found


def start(rank: int, world: int, folder: str) -> None:
    """One process; leaves what it found as `<rank>.pt`."""
    torch.set_num_threads(1)
    store = f"file://{folder}/store"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=world, timeout=LIMIT)
    try:
        torch.save(work(world), f"{folder}/{rank}.pt")
    finally:
        dist.destroy_process_group()


if __name__ == "__main__":
    # Forked, and before PyTorch has started a thread: it is imported once, not once a process.
    start_processes(start, (int(sys.argv[1]), sys.argv[2]), nprocs=int(sys.argv[1]), start_method="fork")
