"""Which process holds which part of every parameter; whole tensors from such parts, and parts from whole tensors.

Every sharding that engines use cuts a flattened parameter into one range a process: FSDP2 by rows, ZeRO and Gemini by
places in a flat buffer. So a share is a flat tensor, and one way of collecting serves all engines.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from opensora.config import ConfigError

Range = tuple[int, int]  # first element of a flattened tensor, and the one behind the last
T = TypeVar("T")
BUFFER = 2**26  # elements on rank 0 at once while it collects, over all processes: 256 MiB


@dataclass(frozen=True)
class Shares:
    """The ranges of the parameters, by name, that each process holds.

    Args:
        shapes: of the whole parameters.
        ranges: of each process, those that it holds something of; together they cover every parameter once.
        rank: this process.
        device: where the process group's back end wants its tensors.
    """

    shapes: dict[str, torch.Size]
    ranges: list[dict[str, Range]]
    rank: int
    device: torch.device

    @property
    def own(self) -> dict[str, Range]:
        """This process's ranges."""
        return self.ranges[self.rank]

    @torch.no_grad()
    def collect(self, shares: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Whole float32 CPU tensors on rank 0 from every process's shares; nothing elsewhere. All processes call it.

        Args:
            shares: flat tensors by parameter name, all of this process's ranges or those of the same parameters on
                every process.
        """
        if len(self.ranges) == 1:
            return {
                name: copy_to_cpu(shares[name]).view(shape) for name, shape in self.shapes.items() if name in shares
            }
        names = self._everyone(list(shares))
        flat = torch.cat([torch.empty(0), *(share.detach().float().flatten().cpu() for share in shares.values())])
        streams = self._gather(flat, [sum(self._length(rank, name) for name in of) for rank, of in enumerate(names)])
        wholes: dict[str, Tensor] = {}
        for rank, stream in enumerate(streams):
            parts = stream.split([self._length(rank, name) for name in names[rank]])
            for name, part in zip(names[rank], parts, strict=True):
                if name not in wholes:
                    wholes[name] = torch.empty(self.shapes[name])
                start, stop = self.ranges[rank][name]
                wholes[name].view(-1)[start:stop] = part
        return {name: wholes[name] for name in self.shapes if name in wholes}

    @torch.no_grad()
    def distribute(self, whole: Mapping[str, Tensor] | None) -> dict[str, Tensor]:
        """This process's flat float32 shares, on the CPU, of whole tensors. All processes call it.

        Args:
            whole: tensors by parameter name; None where only rank 0 has them.

        Raises:
            ConfigError: a tensor belongs to no parameter or has another shape; all of them are named.
        """
        if whole is not None:
            self.check(whole, ())
        if any(absent for (absent,) in self._everyone([whole is None])):
            return self._scatter(whole or {})
        assert whole is not None
        return {name: self.cut(whole[name], name) for name in self.own if name in whole}

    def check(self, whole: Mapping[str, Tensor], needed: Iterable[str]) -> None:
        """Raise ConfigError unless `whole` holds the needed parameters and others of the model, in their shapes."""
        wrong = [f"{name} is missing" for name in needed if name not in whole]
        for name, value in whole.items():
            if name not in self.shapes:
                wrong.append(f"{name} is no parameter of it")
            elif value.shape != self.shapes[name]:
                wrong.append(f"{name} has shape {list(value.shape)} instead of {list(self.shapes[name])}")
        if wrong:
            raise ConfigError("the state does not fit the model that trains: " + "; ".join(wrong))

    def cut(self, whole: Tensor, name: str) -> Tensor:
        """This process's range of a whole parameter: flat, float32, on the CPU."""
        start, stop = self.own[name]
        return copy_to_cpu(whole.flatten()[start:stop])

    def _length(self, rank: int, name: str) -> int:
        start, stop = self.ranges[rank][name]
        return stop - start

    def _everyone(self, value: list[T]) -> list[list[T]]:
        """That list of every process."""
        if len(self.ranges) == 1:
            return [value]
        values: list[list[T]] = [[] for _ in self.ranges]
        dist.all_gather_object(values, value)
        return values

    def _gather(self, flat: Tensor, sizes: list[int]) -> list[Tensor]:
        """CPU tensors of those sizes, one a process, on rank 0; nothing elsewhere."""
        streams = [torch.empty(size) for size in sizes] if self.rank == 0 else []
        length = BUFFER // len(sizes)
        for start in range(0, max(sizes), length):
            length = min(length, max(sizes) - start)
            mine = torch.zeros(length, device=self.device)
            piece = flat[start : start + length]
            mine[: len(piece)] = piece
            received = [torch.empty_like(mine) for _ in sizes] if self.rank == 0 else None
            dist.gather(mine, received, 0)
            for stream, got in zip(streams, received or [], strict=True):
                stream[start : start + length] = got[: len(stream[start : start + length])]
        return streams

    def _scatter(self, whole: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Shares of what rank 0 has."""
        names: list[list[str] | None] = [list(whole)]
        dist.broadcast_object_list(names, 0)
        shares = {}
        for name in names[0] or []:
            value = torch.empty(self.shapes[name], device=self.device)
            if self.rank == 0:
                value.copy_(whole[name])
            dist.broadcast(value, 0)
            if name in self.own:
                shares[name] = self.cut(value, name)
        return shares


def copy_to_cpu(tensor: Tensor) -> Tensor:
    """In float32 on the CPU, its own memory in any case."""
    return tensor.detach().to("cpu", torch.float32, copy=True)


def even_ranges(shapes: Mapping[str, torch.Size], processes: int) -> list[dict[str, Range]]:
    """Parameters laid end to end and cut into equal parts: what each of several processes with copies looks after."""
    total = sum(shape.numel() for shape in shapes.values())
    edges = [total * index // processes for index in range(processes + 1)]
    ranges: list[dict[str, Range]] = [{} for _ in range(processes)]
    begin = 0
    for name, shape in shapes.items():
        for rank in range(processes):
            start, stop = max(edges[rank], begin), min(edges[rank + 1], begin + shape.numel())
            if start < stop:
                ranges[rank][name] = (start - begin, stop - begin)
        begin += shape.numel()
    return ranges


def row_ranges(shapes: Mapping[str, torch.Size], processes: int) -> list[dict[str, Range]]:
    """Every parameter cut by its first dimension, as FSDP2 does: equal numbers of rows, rounded up, to the end."""
    ranges: list[dict[str, Range]] = [{} for _ in range(processes)]
    for name, shape in shapes.items():
        share, row = -(-shape[0] // processes), shape[1:].numel()
        for rank in range(processes):
            start, stop = min(rank * share, shape[0]), min((rank + 1) * share, shape[0])
            if start < stop:
                ranges[rank][name] = (start * row, stop * row)
    return ranges
