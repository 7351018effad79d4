"""PyTorch's own engine: one device, DistributedDataParallel, or FSDP2, which shards all that training keeps."""

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext

from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from opensora.config import ConfigError, TrainConfig
from opensora.parallel.engine import Engine, Kind
from opensora.parallel.optimizer import build_optimizer
from opensora.parallel.shares import Shares, even_ranges


class TorchEngine(Engine):
    """`strategy` ddp keeps everything on every device, fsdp a share; one process needs neither."""

    def __init__(self, config: TrainConfig) -> None:
        super().__init__(config)
        self._wrapped: DistributedDataParallel | None = None

    def prepare(self, model: nn.Module, config: TrainConfig) -> nn.Module:
        model.to(self.device)
        self._parameters = dict(model.named_parameters())
        self._learning = [name for name, parameter in self._parameters.items() if parameter.requires_grad]
        self._buffers = dict(model.named_buffers())
        learning = {name: self._parameters[name].shape for name in self._learning}
        frozen = {name: parameter.shape for name, parameter in self._parameters.items() if name not in learning}
        ranges = zip(even_ranges(learning, self.world_size), even_ranges(frozen, self.world_size), strict=True)
        self._shares = Shares(
            {name: parameter.shape for name, parameter in self._parameters.items()},
            [one | other for one, other in ranges],
            self.rank,
            self.device,
        )
        if config.strategy == "fsdp":
            raise ConfigError("strategy fsdp is not part of this version; train with strategy=ddp")
        self._optimizer = build_optimizer(model, config)
        if self.world_size == 1:
            return model
        devices = [self.device] if self.device.type == "cuda" else None
        # The buffers are constants, so they are not broadcast before every step.
        self._wrapped = DistributedDataParallel(
            model, device_ids=devices, gradient_as_bucket_view=True, forward_sync_buffers=False
        )
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
        if kind == "weights":
            return {name: parameter.detach() for name, parameter in self._parameters.items()}
        return {name: self._optimizer.state[self._parameters[name]][kind] for name in self._learning}

    def _own(self, kind: Kind) -> dict[str, Tensor]:
        ranges, tensors = self._shares.own, self._tensors(kind)
        return {name: tensors[name].view(-1)[slice(*ranges[name])] for name in ranges if name in tensors}

    def _fill(self, kind: Kind, whole: Mapping[str, Tensor]) -> None:
        for name, tensor in self._tensors(kind).items():
            tensor.copy_(whole[name])

    def _set_steps(self, updates: int) -> None:
        for name in self._learning:
            self._optimizer.state[self._parameters[name]]["step"].fill_(updates)
