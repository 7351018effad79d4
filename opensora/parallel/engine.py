"""The interface between the training loop and whatever runs a step, and which implementation a configuration means.

Parameters have the names that they have in the unwrapped model, and whole tensors the shapes; so a checkpoint that one
engine wrote is read by any other, with any number of processes.
"""

import os
from abc import ABC, abstractmethod
from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn

from opensora.config import ConfigError, TrainConfig
from opensora.parallel.join import join, read_place
from opensora.parallel.shares import Shares

if TYPE_CHECKING:
    from opensora.parallel.sequence import SequenceGroup

Kind = Literal["weights", "exp_avg", "exp_avg_sq"]  # a parameter, and the means that AdamW keeps of its gradients
MOMENTS: tuple[Kind, ...] = ("exp_avg", "exp_avg_sq")


class Engine(ABC):
    """Owns the model and the optimizer while they train.

    Making one joins the process group that torchrun's variables describe, where there is one. "Collective" methods are
    called by all processes, in the same order. The loop calls the public methods; an implementation fills in those
    that are abstract.

    Attributes:
        rank, world_size, local_rank: this process, from RANK, WORLD_SIZE and LOCAL_RANK.
        data_rank, data_world_size: which sample of those in work at once it takes part in, and their number; processes
            that share a sample have the same.
        device: where the model runs.
    """

    _optimizer: torch.optim.Optimizer  # these are made by `prepare`
    _shares: Shares
    _parameters: dict[str, nn.Parameter]
    _learning: list[str]  # names of the parameters that learn
    _buffers: dict[str, Tensor]
    _updates = 0
    _sequence: "SequenceGroup | None" = None

    def __init__(self, config: TrainConfig) -> None:
        place = read_place(config)
        self.rank, self.world_size, self.local_rank = place.rank, place.world_size, place.local_rank
        self.data_rank = self.rank // config.sequence_parallel
        self.data_world_size = self.world_size // config.sequence_parallel
        self.device = place.device
        join(place, config)

    @abstractmethod
    def prepare(self, model: nn.Module, config: TrainConfig) -> nn.Module:
        """Take the model over, shard it, make its optimizer. Collective.

        Returns:
            what to call in the forward pass, in the place of the model.
        """

    @abstractmethod
    def accumulating(self, last: bool) -> AbstractContextManager[object]:
        """The context of a micro-batch's forward and backward pass; gradients are exchanged in the last one alone."""

    @abstractmethod
    def backward(self, loss: Tensor) -> None:
        """Add the gradients of a scalar loss, averaged over processes. Collective in the last micro-batch."""

    @abstractmethod
    def gradient_norm(self, limit: float) -> float:
        """Clip the gradients to `limit`; their norm before that, over all that learns. Collective."""

    def step(self, lr: float) -> None:
        """Update the weights at that learning rate and clear the gradients. Collective."""
        for group in self._optimizer.param_groups:
            group["lr"] = lr
        self._optimizer.step()
        self._updates += 1
        self.clear()

    def clear(self) -> None:
        """Clear the gradients without an update."""
        self._optimizer.zero_grad()

    def any(self, flags: list[bool]) -> list[bool]:
        """Each flag, true where any process raised it. Collective."""
        if self.world_size == 1:
            return flags
        votes = torch.tensor(flags, dtype=torch.int32, device=self.device)
        dist.all_reduce(votes, dist.ReduceOp.MAX)
        return [bool(vote) for vote in votes.tolist()]

    def mean(self, values: list[float]) -> list[float]:
        """Each value, averaged over processes. Collective."""
        if self.world_size == 1:
            return values
        sums = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(sums)
        return (sums / self.world_size).tolist()

    def gather(self, value: Tensor) -> list[Tensor]:
        """A tensor of the same shape from every process, in order of rank, on rank 0; nothing elsewhere. Collective."""
        if self.world_size == 1:
            return [value]
        value = value.to(self.device)
        parts = [torch.empty_like(value) for _ in range(self.world_size)] if self.rank == 0 else None
        dist.gather(value, parts, 0)
        return [part.cpu() for part in parts or []]

    def barrier(self) -> None:
        """Wait for every process. Collective."""
        if self.world_size > 1:
            dist.barrier()

    def own_parameters(self) -> dict[str, Tensor]:
        """Flat, live float32 views of this process's part of what learns; the parts of all processes are everything.

        Averages (EMA) that each process keeps of its part cost 1/world_size of the memory.
        """
        weights = self._own("weights")
        return {name: weights[name] for name in self._learning if name in weights}

    def collect(self, shares: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Whole float32 CPU tensors on rank 0 from what each has in the form of `own_parameters`. Collective."""
        return self._shares.collect(shares)

    def distribute(self, whole: Mapping[str, Tensor] | None) -> dict[str, Tensor]:
        """The reverse, on the CPU; None where only rank 0 has the whole tensors. Collective.

        Raises:
            ConfigError: a tensor belongs to no parameter, or has another shape.
        """
        return self._shares.distribute(whole)

    def model_state(self) -> dict[str, Tensor]:
        """Whole float32 parameters and the buffers, on the CPU of rank 0; nothing elsewhere. Collective."""
        whole = self._whole("weights")
        return whole | {name: value.cpu() for name, value in self._buffers.items()} if self.rank == 0 else {}

    def load_model_state(self, state: Mapping[str, Tensor]) -> None:
        """The reverse: every process brings the whole state. Buffers stay the model's own.

        Raises:
            ConfigError: a parameter is missing, unknown or mis-shaped.
        """
        weights = {name: value for name, value in state.items() if name not in self._buffers}
        self._shares.check(weights, self._shares.shapes)
        self._fill("weights", weights)

    def optimizer_state(self) -> dict[str, Tensor]:
        """`exp_avg/NAME`, `exp_avg_sq/NAME` and `step/NAME` of all that learns, whole, as `model_state`. Collective."""
        state = {f"{kind}/{name}": value for kind in MOMENTS for name, value in self._whole(kind).items()}
        steps = {f"step/{name}": torch.tensor(float(self._updates)) for name in self._learning}
        return state | steps if self.rank == 0 else {}

    def load_optimizer_state(self, state: Mapping[str, Tensor]) -> None:
        """The reverse: every process brings the whole state.

        Raises:
            ConfigError: something of what learns is missing, unknown or mis-shaped.
        """
        for kind in MOMENTS:
            prefix = f"{kind}/"
            moments = {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
            self._shares.check(moments, self._learning)
            self._fill(kind, moments)
        self._updates = int(max(value for name, value in state.items() if name.startswith("step/")))
        self._set_steps(self._updates)

    def close(self) -> None:
        """Leave the process group."""
        if self._sequence:
            self._sequence.close()
        if dist.is_initialized():
            dist.destroy_process_group()

    def _whole(self, kind: Kind) -> dict[str, Tensor]:
        """Whole float32 CPU tensors of that kind on rank 0, nothing elsewhere. Collective."""
        return self.collect(self._own(kind))

    def _take(self, model: nn.Module, config: TrainConfig) -> None:
        """What every implementation of `prepare` begins with."""
        model.to(self.device)
        if config.sequence_parallel > 1:
            from opensora.parallel.sequence import SequenceGroup, shard_model

            self._sequence = SequenceGroup(config.sequence_parallel)
            shard_model(model, self._sequence)
        self._parameters = dict(model.named_parameters())
        self._learning = [name for name, parameter in self._parameters.items() if parameter.requires_grad]
        self._buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}  # engines may round theirs

    def _shapes_by_use(self) -> tuple[dict[str, torch.Size], dict[str, torch.Size]]:
        """Shapes of the parameters that learn, and of those that are frozen."""
        shapes = {name: parameter.shape for name, parameter in self._parameters.items()}
        learning = {name: shapes[name] for name in self._learning}
        return learning, {name: shape for name, shape in shapes.items() if name not in learning}

    @abstractmethod
    def _own(self, kind: Kind) -> dict[str, Tensor]:
        """Flat, live float32 views of this process's ranges of every parameter, or of the moments of what learns."""

    @abstractmethod
    def _fill(self, kind: Kind, whole: Mapping[str, Tensor]) -> None:
        """Copy whole tensors, of which this process takes what it holds, into the weights or the moments."""

    @abstractmethod
    def _set_steps(self, updates: int) -> None:
        """Have the optimizer go on after that many updates."""


def build_engine(config: TrainConfig) -> Engine:
    """The engine that `config.engine` names; joins the process group.

    Raises:
        ConfigError: it cannot run here, or not with these settings.
        JoinError: other processes of the run did not arrive in time.
    """
    match config.engine:
        case "torch":
            from opensora.parallel.torch_engine import FsdpEngine, TorchEngine

            alone = int(os.environ.get("WORLD_SIZE", "1")) == 1  # then there is nothing to shard
            return TorchEngine(config) if config.strategy == "ddp" or alone else FsdpEngine(config)
        case "colossalai":
            try:
                from opensora.parallel.colossal_engine import build_colossal_engine
            except ImportError as error:
                raise ConfigError(
                    f"engine colossalai cannot start ({error}); make setup-colossalai installs it beside .venv, then "
                    "start by .venv-colossalai/bin/python -m opensora.cli, or train with engine=torch"
                ) from error
            return build_colossal_engine(config)
