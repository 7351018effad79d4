"""Sequence parallelism: several processes share each video, and the model stays what it is on one device.

A process keeps its own frames through patches, spatial attention, text attention and MLP, none of which looks across
frames. Around temporal attention, which looks across nothing else, one all-to-all each way swaps frames for locations:
each process then has all frames of its own locations. Nothing is approximated, so outputs and gradients are those of
one device. (The all-to-all is that of DeepSpeed-Ulysses, arXiv 2309.14509; there it swaps tokens for heads, three
times as many channels, and heads must divide.)

Shapes: `B` batch, `T` frames, `S` tokens a frame, `C` channels; `P` processes a sample, `T'` = ⌈T/P⌉ and `S'` = ⌈S/P⌉
a process's share, padded with zeros at the end, which no attention ever sees together with what is real.
"""

import hashlib
import inspect
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

from opensora.config import ConfigError
from opensora.models.stdit import STDiT

SUMMARY = 256  # values of each input that the first forward pass compares
SAME = 0.05  # of an input's largest value: processes that encode the same clip differ by less, other noise by more


class SequenceGroup:
    """The neighbouring ranks that share each sample; every process of the run must make it, at the same time.

    With eight processes and size 4, ranks 0 to 3 share one sample and ranks 4 to 7 another. Whatever is drawn for a
    sample (the clip and its crop, noise, timestep, dropped caption) must follow `data_rank`, not the rank.

    Args:
        size: processes a sample.
        timeout: of the group's operations; None takes the back end's.

    Attributes:
        rank, size: place of this process among those that share its sample, and their number.
        data_rank, data_size: which sample of those in work at once it is, and their number.

    Raises:
        ConfigError: there is no process group, or `size` does not divide it.
    """

    def __init__(self, size: int, timeout: timedelta | None = None) -> None:
        if not dist.is_initialized():
            raise ConfigError(
                f"sequence_parallel={size} needs a run of several processes, and this one has joined none: "
                "start it by torchrun or set processes to a multiple of sequence_parallel"
            )
        world = dist.get_world_size()
        if size < 1 or world % size:
            raise ConfigError(
                f"sequence_parallel={size} does not divide the {world} processes of this run: every sample is shared "
                f"by as many; take a divisor of {world}, or start a multiple of {size} processes"
            )
        self.size, self.data_size = size, world // size
        self.data_rank, self.rank = divmod(dist.get_rank(), size)
        self._group: dist.ProcessGroup | None = dist.new_subgroups(size, timeout=timeout)[0]

    def __deepcopy__(self, memo: dict[int, object]) -> "SequenceGroup":
        return self  # a copy of a model works in the same processes

    def close(self) -> None:
        """Forget the process group, before `destroy_process_group`: a reference from a model would keep it alive."""
        self._group = None

    def exchange(self, x: Tensor) -> Tensor:
        """[P, ...] -> [P, ...]: block i goes to rank i, and rank i's block for this process takes its place."""
        x = x.contiguous()
        out = torch.empty_like(x)
        dist.all_to_all_single(out, x, group=self._joined())
        return out

    def gather(self, x: Tensor) -> Tensor:
        """[...] -> [P, ...], the blocks of all ranks."""
        out = x.new_empty((self.size, *x.shape))
        dist.all_gather_single(out.view(-1), x.contiguous().view(-1), group=self._joined())
        return out

    def _joined(self) -> dist.ProcessGroup:
        if self._group is None:
            raise RuntimeError("the sequence group was closed; a model that was sharded over it cannot run any more")
        return self._group


class _Exchange(torch.autograd.Function):
    """`SequenceGroup.exchange`. It is its own inverse and its own transpose, so gradients go back the same way."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: SequenceGroup) -> Tensor:
        ctx.group = group
        return group.exchange(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return ctx.group.exchange(gradients[0]), None


class _Gather(torch.autograd.Function):
    """`SequenceGroup.gather`, for an output of which every process computes the same loss.

    A process goes back through its own block alone, so the gradient of a parameter is the sum over the group. Engines
    take the mean over all processes; multiplied by the group's size here, it is that of one device.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: SequenceGroup) -> Tensor:
        ctx.group = group
        return group.gather(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0][ctx.group.rank] * ctx.group.size, None


@dataclass(frozen=True)
class FrameShard:
    """One process's part of videos of `frames` frames of `space` tokens: what `STDiT` asks for (`models.stdit.Shard`).

    Videos with fewer frames than processes leave some with padding alone. One frame is not exchanged at all: its
    temporal attention is a linear map of each token.
    """

    group: SequenceGroup
    frames: int
    space: int

    def own(self, x: Tensor, dim: int) -> Tensor:
        start = min(self.group.rank * self._share(self.frames), self.frames)
        length = min(self._share(self.frames), self.frames - start)
        return _pad(x.narrow(dim, start, length), dim, self._share(self.frames))

    @torch.compiler.disable
    def to_space(self, x: Tensor) -> Tensor:
        if self.frames == 1:
            return x
        if x.dtype == torch.float32 and torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))  # as attention's projection would: half to send
        share = self._share(self.space)
        x = _pad(x, 2, share * self.group.size).unflatten(2, (-1, share)).movedim(2, 0)  # [P, B, T', S', C]
        x = _Exchange.apply(x, self.group)  # the same shape, now a block is another process's frames
        return x.movedim(0, 1).flatten(1, 2)[:, : self.frames]

    @torch.compiler.disable
    def to_frames(self, x: Tensor) -> Tensor:
        if self.frames == 1:
            return x
        share = self._share(self.frames)
        x = _pad(x, 1, share * self.group.size).unflatten(1, (-1, share)).movedim(1, 0)  # [P, B, T', S', C]
        x = _Exchange.apply(x, self.group)  # the same shape, now a block is another process's locations
        return x.movedim(0, 2).flatten(2, 3)[:, :, : self.space].contiguous()

    @torch.compiler.disable
    def gather(self, x: Tensor) -> Tensor:
        x = _Gather.apply(x, self.group)  # [P, B, T'·S, K]
        return x.movedim(0, 1).flatten(1, 2)[:, : self.frames * self.space]

    def _share(self, length: int) -> int:
        return -(-length // self.group.size)


def shard_model(model: nn.Module, group: SequenceGroup) -> None:
    """Have an STDiT share every sample over a sequence group, before an engine wraps it.

    From then on all processes of the group must call it together, with the same inputs, and each gets the whole
    output. The first call compares the inputs over the group.

    Raises:
        ConfigError: another model; or, in the first call, inputs that differ.
    """
    if not isinstance(model, STDiT):
        raise ConfigError(
            f"sequence parallelism shares the frames of STDiT, whose attention is spatial or temporal; "
            f"{type(model).__name__} is not supported: train it with sequence_parallel=1, and shard before wrapping"
        )
    if group.size == 1:
        return
    model.sharding = partial(FrameShard, group)

    @torch.compiler.disable
    def check(module: STDiT, args: tuple[object, ...], kwargs: dict[str, object]) -> None:
        handle.remove()
        bound = inspect.signature(STDiT.forward).bind(module, *args, **kwargs)
        bound.apply_defaults()
        inputs = {name: value for name, value in bound.arguments.items() if name != "self"}
        if module.training and module.y_embedder.dropout_prob > 0:
            inputs["random state, by which captions are dropped"] = _random_state(bound.arguments["x"].device)
        _check_equal(inputs, group)

    handle = model.register_forward_pre_hook(check, with_kwargs=True)


def _pad(x: Tensor, dim: int, length: int) -> Tensor:
    """Zeros at the end of a dimension."""
    missing = length - x.shape[dim]
    return F.pad(x, (0, 0) * (x.ndim - 1 - dim) + (0, missing)) if missing else x


def _check_equal(inputs: dict[str, object], group: SequenceGroup) -> None:
    """Compare shapes and a sample of the values over the group.

    Raises:
        ConfigError: on every rank, with the names of the inputs that differ.
    """
    device = next(value.device for value in inputs.values() if isinstance(value, Tensor))
    everyone = group.gather(torch.stack([_summary(value) for value in inputs.values()]).to(device))
    limit = SAME * everyone.abs().amax(dim=(0, 3), keepdim=True)  # shapes and values each have their own
    wrong = ((everyone - everyone[:1]).abs() > limit).any(dim=3).any(dim=2).any(dim=0)
    names = [name for name, differs in zip(inputs, wrong.tolist(), strict=True) if differs]
    if names:
        raise ConfigError(
            f"the {group.size} processes that share a sample were given different inputs: {', '.join(names)}; "
            "draw clips, noise, timesteps and dropped captions by SequenceGroup.data_rank, not by the rank"
        )


def _summary(value: object) -> Tensor:
    """Shapes, and evenly spread values, of the tensors in an input: float64 [2, SUMMARY], zeros behind."""
    tensors = list(_tensors(value))
    shapes = [float(size) for tensor in tensors for size in (tensor.ndim, *tensor.shape)]
    values: list[float] = []
    for tensor in tensors:
        count = min(tensor.numel(), max(1, SUMMARY // len(tensors)))
        places = torch.linspace(0, tensor.numel() - 1, count, device=tensor.device).long()
        values += tensor.detach().flatten()[places].tolist()
    rows = [row[:SUMMARY] + [0.0] * (SUMMARY - len(row)) for row in (shapes, values)]
    return torch.tensor(rows, dtype=torch.float64)


def _tensors(value: object) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, tuple | list):
        for part in value:
            yield from _tensors(part)


def _random_state(device: torch.device) -> Tensor:
    """A hash of the generator's state that draws on `device`."""
    state = torch.cuda.get_rng_state(device) if device.type == "cuda" else torch.get_rng_state()
    return torch.tensor(list(hashlib.sha256(state.numpy().tobytes()).digest()))
