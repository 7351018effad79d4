"""PyTorch's own engine: one device, or DistributedDataParallel under torchrun's variables."""

import os
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from opensora.parallel.engine import Engine


class TorchEngine(Engine):
    """Joins the process group that RANK, WORLD_SIZE and LOCAL_RANK describe, when they are set."""

    def __init__(self, threads: int = 1) -> None:
        self.rank = int(os.environ.get("RANK", "0"))
        self.world_size = int(os.environ.get("WORLD_SIZE", "1"))
        local_rank = int(os.environ.get("LOCAL_RANK", "0"))
        if torch.cuda.is_available():
            self.device = torch.device("cuda", local_rank)
            torch.cuda.set_device(self.device)
        else:
            self.device = torch.device("cpu")
            torch.set_num_threads(threads)
        self._wrapped: DistributedDataParallel | None = None
        if self.world_size > 1:
            dist.init_process_group("nccl" if self.device.type == "cuda" else "gloo")

    def prepare(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> nn.Module:
        self._parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self._optimizer = optimizer
        if self.world_size == 1:
            return model
        devices = [self.device] if self.device.type == "cuda" else None
        # The buffers are constants, so they are not broadcast before every step.
        self._wrapped = DistributedDataParallel(
            model, device_ids=devices, gradient_as_bucket_view=True, forward_sync_buffers=False
        )
        return self._wrapped

    def backward(self, loss: Tensor) -> None:
        loss.backward()

    def gradient_norm(self, limit: float) -> float:
        return float(nn.utils.clip_grad_norm_(self._parameters, limit))

    def step(self) -> None:
        self._optimizer.step()
        self.clear()

    def clear(self) -> None:
        self._optimizer.zero_grad(set_to_none=True)

    def any(self, flags: list[bool]) -> list[bool]:
        if self.world_size == 1:
            return flags
        votes = torch.tensor(flags, dtype=torch.int32, device=self.device)
        dist.all_reduce(votes, dist.ReduceOp.MAX)
        return [bool(vote) for vote in votes.tolist()]

    def gather(self, value: Tensor) -> list[Tensor]:
        if self.world_size == 1:
            return [value]
        value = value.to(self.device)
        parts = [torch.empty_like(value) for _ in range(self.world_size)]
        dist.all_gather(parts, value)  # NCCL lacks a gather of bytes on old versions; the value is small
        return [part.cpu() for part in parts] if self.rank == 0 else []

    def barrier(self) -> None:
        if self.world_size > 1:
            dist.barrier()

    def save(self, path: Path) -> None:
        if self.rank == 0:
            torch.save(self._optimizer.state_dict(), path)

    def load(self, path: Path) -> None:
        self._optimizer.load_state_dict(torch.load(path, map_location=self.device, weights_only=True))

    def close(self) -> None:
        if self.world_size > 1 and dist.is_initialized():
            if self._wrapped is not None:
                # Else the reducer frees the process group later, and waits for gloo's threads while it holds Python's
                # lock, which such a thread needs to free its last tensors: now and then a run would never end.
                self._wrapped.reducer = self._wrapped.logger = None
            dist.destroy_process_group()
