"""How much a process keeps of a long video when 1, 2 and 4 processes share it. A minute on a CPU.

    python -m benchmarks.sequence_memory

A scaled-down STDiT of XL/2's proportions (width 1,152 becomes 144) takes 120 frames of 24x24 latents through forward
and backward passes in 1, 2 and 4 gloo processes. Counted, by PyTorch's hooks on saved tensors, is what the forward pass
keeps for the backward pass: every storage once, parameters apart.
"""

import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

from benchmarks.measure import save
from opensora.models.stdit import STDiT, STDiTConfig
from opensora.parallel.sequence import SequenceGroup, shard_model


@dataclass
class Kept:
    """Storages that a forward pass keeps, by address; held, so that no address is given out twice."""

    storages: dict[int, torch.UntypedStorage] = field(default_factory=dict)

    @property
    def total(self) -> int:
        """Bytes."""
        return sum(storage.nbytes() for storage in self.storages.values())


@contextmanager
def saved_bytes(model: nn.Module) -> Iterator[Kept]:
    """Count what is kept for the backward pass within the context, but for the model's own parameters and buffers."""
    own = {value.untyped_storage().data_ptr() for value in (*model.parameters(), *model.buffers())}
    kept = Kept()

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept.storages[storage.data_ptr()] = storage
        return tensor

    with saved_tensors_hooks(keep, lambda tensor: tensor):
        yield kept
