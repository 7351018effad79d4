"""The interface between the training loop and whatever runs a step: one device, DDP, ColossalAI."""

from abc import ABC, abstractmethod
from pathlib import Path

import torch
from torch import Tensor, nn

from opensora.config import ConfigError, TrainConfig


class Engine(ABC):
    """Owns the model and the optimizer while they train."""

    rank: int
    world_size: int
    device: torch.device

    @abstractmethod
    def prepare(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> nn.Module:
        """Take both over; returns the module to call in the forward pass."""

    @abstractmethod
    def backward(self, loss: Tensor) -> None:
        """Accumulate gradients of a scalar loss, averaged over processes."""

    @abstractmethod
    def gradient_norm(self, limit: float) -> float:
        """Clip the gradients to `limit` and return their norm before that."""

    @abstractmethod
    def step(self) -> None:
        """Update the weights and clear the gradients."""

    @abstractmethod
    def clear(self) -> None:
        """Clear the gradients without an update."""

    @abstractmethod
    def any(self, flags: list[bool]) -> list[bool]:
        """Each flag, true where any process raised it."""

    @abstractmethod
    def gather(self, value: Tensor) -> list[Tensor]:
        """`value` of every process, in order of rank; empty but on rank 0."""

    @abstractmethod
    def barrier(self) -> None:
        """Wait for every process."""

    @abstractmethod
    def save(self, path: Path) -> None:
        """Write the optimizer's state; called by every process, written once."""

    @abstractmethod
    def load(self, path: Path) -> None:
        """Read the optimizer's state."""

    @abstractmethod
    def close(self) -> None:
        """Leave the process group."""


def build_engine(config: TrainConfig) -> Engine:
    """The engine that `config.engine` names.

    Raises:
        ConfigError: this version has no such engine, or not with these settings.
    """
    if config.engine == "colossalai" or config.strategy != "ddp" or config.sequence_parallel > 1:
        raise ConfigError(
            "ColossalAI, sharded strategies and sequence parallelism are not part of this version; "
            "train with engine=torch, strategy=ddp, sequence_parallel=1"
        )
    from opensora.parallel.torch_engine import TorchEngine

    return TorchEngine(config.threads)
