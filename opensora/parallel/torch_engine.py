"""PyTorch's own engines: one device or DistributedDataParallel, and FSDP2, which shards all that training keeps."""

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from opensora.config import TrainConfig
from opensora.parallel.engine import Engine, Kind
from opensora.parallel.optimizer import build_optimizer, set_updates, start_state
from opensora.parallel.shares import Shares, copy_to_cpu, even_ranges, row_ranges


class TorchEngine(Engine):
    """Every process keeps the whole model and optimizer; of their averages and files it looks after an equal part."""

    _wrapped: DistributedDataParallel | None = None

    def prepare(self, model: nn.Module, config: TrainConfig) -> nn.Module:
        self._take(model, config)
        self._optimizer = self._build_optimizer(model, config)
        start_state(self._optimizer)
        learning, frozen = self._shapes_by_use()
        ranges = zip(even_ranges(learning, self.world_size), even_ranges(frozen, self.world_size), strict=True)
        self._shares = Shares(learning | frozen, [one | other for one, other in ranges], self.rank, self.device)
        return self._wrap(model)

    def _build_optimizer(self, model: nn.Module, config: TrainConfig) -> torch.optim.Optimizer:
        return build_optimizer(model, config)

    def _wrap(self, model: nn.Module) -> nn.Module:
        """The module that exchanges gradients when there are several processes."""
        if self.world_size == 1:
            return model
        devices = [self.device] if self.device.type == "cuda" else None
        # The buffers are constants, the same everywhere: without this they would be sent before every step.
        constants = [name for name, _ in model.named_buffers()]
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, constants)
        self._wrapped = DistributedDataParallel(model, device_ids=devices, gradient_as_bucket_view=True)
        return self._wrapped

    def accumulating(self, last: bool) -> AbstractContextManager[object]:
        return nullcontext() if last or not self._wrapped else self._wrapped.no_sync()

    def backward(self, loss: Tensor) -> None:
        loss.backward()

    def gradient_norm(self, limit: float) -> float:
        return float(nn.utils.clip_grad_norm_([self._parameters[name] for name in self._learning], limit))

    def close(self) -> None:
        if self._wrapped is not None:
            # Else the reducer frees the process group later, and waits for gloo's threads while it holds Python's
            # lock, which such a thread needs to free its last tensors: now and then a run would never end.
            self._wrapped.reducer = self._wrapped.logger = None
        super().close()

    def _tensors(self, kind: Kind) -> dict[str, Tensor]:
        """The parameters, or moments, as this process has them."""
        if kind == "weights":
            return {name: parameter.detach() for name, parameter in self._parameters.items()}
        return {name: self._optimizer.state[self._parameters[name]][kind] for name in self._learning}

    def _whole(self, kind: Kind) -> dict[str, Tensor]:
        return {name: copy_to_cpu(tensor) for name, tensor in self._tensors(kind).items()} if self.rank == 0 else {}

    def _own(self, kind: Kind) -> dict[str, Tensor]:
        ranges, tensors = self._shares.own, self._tensors(kind)
        return {name: tensors[name].view(-1)[slice(*ranges[name])] for name in ranges if name in tensors}

    def _fill(self, kind: Kind, whole: Mapping[str, Tensor]) -> None:
        for name, tensor in self._tensors(kind).items():
            tensor.copy_(whole[name])

    def _set_steps(self, updates: int) -> None:
        set_updates(self._optimizer, updates)


class FsdpEngine(Engine):
    """Every process keeps some rows of each parameter, its gradient and moments, and sees the rest block by block.

    With bfloat16, blocks are gathered and computed in it; what is kept, and gradients on their way, are float32.
    """

    _model: FSDPModule

    def prepare(self, model: nn.Module, config: TrainConfig) -> nn.Module:
        self._take(model, config)
        shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
        self._shares = Shares(shapes, row_ranges(shapes, self.world_size), self.rank, self.device)
        mesh = init_device_mesh(self.device.type, (self.world_size,))
        precision = MixedPrecisionPolicy(
            param_dtype=torch.bfloat16 if config.dtype == "bfloat16" else None,
            reduce_dtype=torch.float32,
            cast_forward_inputs=False,  # bfloat16 has no timestep 999; autocast casts where it should
        )
        model.register_forward_hook(lambda *args: args[-1].clone())  # FSDP2 loses its hook where a view is changed
        for block in model.get_submodule("blocks").children():
            fully_shard(block, mesh=mesh, mp_policy=precision)
        self._model = fully_shard(model, mesh=mesh, mp_policy=precision)
        self._parameters = dict(model.named_parameters())  # the shards; the model's own are whole now and then
        self._optimizer = build_optimizer(model, config)
        start_state(self._optimizer)
        return model

    @contextmanager
    def accumulating(self, last: bool) -> Iterator[None]:
        # Until the last one, gradients of the whole model are kept in float32 on every device.
        self._model.set_requires_gradient_sync(last)
        self._model.set_is_last_backward(last)
        yield

    def backward(self, loss: Tensor) -> None:
        loss.backward()

    def gradient_norm(self, limit: float) -> float:
        norm = nn.utils.clip_grad_norm_([self._parameters[name] for name in self._learning], limit)
        return float(norm.full_tensor() if isinstance(norm, DTensor) else norm)

    def _own(self, kind: Kind) -> dict[str, Tensor]:
        shards: dict[str, Tensor]
        if kind == "weights":
            shards = {name: parameter.detach() for name, parameter in self._parameters.items()}
        else:
            shards = {name: self._optimizer.state[self._parameters[name]][kind] for name in self._learning}
        return {name: _local(shard).view(-1) for name, shard in shards.items() if name in self._shares.own}

    def _fill(self, kind: Kind, whole: Mapping[str, Tensor]) -> None:
        for name, shard in self._own(kind).items():
            shard.copy_(self._shares.cut(whole[name], name))

    def _set_steps(self, updates: int) -> None:
        set_updates(self._optimizer, updates)


def _local(shard: Tensor) -> Tensor:
    assert isinstance(shard, DTensor)
    return shard.to_local()
