"""What a run reports about itself: throughput, use of the GPU, memory, cost, and when it will be done."""

import math
import resource
import time
from collections.abc import Callable, Mapping
from functools import lru_cache

import torch
from torch import Tensor

from opensora.config import HardwareConfig, TrainConfig
from opensora.gpus import Gpu, gpu_here, known_gpu
from opensora.models.flops import Trainable, training_flops
from opensora.models.stdit import STDiTConfig

MIB = 2**20


class Meter:
    """Counts from one log line to the next, and the time of the whole run over all its starts.

    The device is waited for in `read` alone. Time is the monotonic clock's, which does not jump with the date.
    """

    def __init__(
        self,
        world_size: int = 1,
        hardware: HardwareConfig | None = None,
        device: torch.device | None = None,
    ) -> None:
        """Start the clock.

        Args:
            world_size: processes, one a GPU.
            hardware: kind of GPU and what its hour costs; a GPU that is there and known counts first.
            device: of this process; None stands for the CPU.
        """
        self.world_size = world_size
        self.device = device or torch.device("cpu")
        self.gpu: Gpu | None = None
        if self.device.type == "cuda":
            configured = known_gpu(hardware.gpu) if hardware and hardware.gpu else None
            self.gpu = gpu_here(self.device.index or 0) or configured
        price = hardware.dollars_per_gpu_hour if hardware else None
        self.dollars_per_hour = price or (self.gpu.dollars_per_hour if self.gpu else 0.0)
        self.losses: Tensor | float
        self.earlier_hours = 0.0  # GPU-hours of the starts before this one, which may have had other GPUs
        self.started = self.since = time.monotonic()
        self._clear()

    def update(self, samples: int, loss: Tensor | float, tokens: int, flops: float) -> None:
        """One more step.

        Args:
            samples, tokens, flops: over all processes; `sample_work` says what one sample is.
            loss: a number, or a scalar on the device, which is not waited for.
        """
        self.steps += 1
        self.samples += samples
        self.tokens += tokens
        self.flops += flops
        self.losses = self.losses + (loss.detach() if isinstance(loss, Tensor) else loss)

    def read(self, remaining: int) -> dict[str, float]:
        """Means since the last reading, and what `remaining` steps will take; starts anew.

        `tflops_per_gpu`, `mfu`, GPU-hours and dollars are there where they mean something: the last four with a GPU of
        known kind. GPU-hours are those of all GPUs, from the first start of the run on.
        """
        loss = float(self.losses) / max(self.steps, 1)  # the device has done all steps when its loss is here
        now = time.monotonic()
        elapsed = max(now - self.since, 1e-9)
        step = elapsed / max(self.steps, 1)
        rates = {
            "loss": loss,
            "samples_per_second": self.samples / elapsed,
            "tokens_per_second": self.tokens / elapsed,
            "seconds_per_step": step,
            "peak_memory_mib": self._peak_memory() / MIB,
            "eta_seconds": step * remaining,
        }
        if self.flops:
            rates["tflops_per_gpu"] = self.flops / elapsed / self.world_size / 1e12
        if self.gpu:
            hours = self.gpu_hours(now)
            total = hours + step * remaining * self.world_size / 3600
            rates |= {"gpu_hours": hours, "gpu_hours_total": total}
            rates |= {"dollars": hours * self.dollars_per_hour, "dollars_total": total * self.dollars_per_hour}
            if self.flops:
                rates["mfu"] = rates["tflops_per_gpu"] / self.gpu.tflops
        self.since = now
        self._clear()
        return rates

    def gpu_hours(self, now: float | None = None) -> float:
        """Hours of all processes so far, over all starts of the run."""
        seconds = (time.monotonic() if now is None else now) - self.started
        return self.earlier_hours + seconds * self.world_size / 3600

    def cost(self) -> dict[str, float]:
        """GPU-hours over all starts of the run, and dollars where an hour's price is known; nothing on a CPU."""
        if self.device.type != "cuda":
            return {}
        hours = self.gpu_hours()
        dollars = {"dollars": hours * self.dollars_per_hour} if self.dollars_per_hour else {}
        return {"gpu_hours": hours} | dollars

    def state_dict(self) -> dict[str, float]:
        """What a resumed run goes on counting from; JSON."""
        return {"gpu_hours": self.gpu_hours()}

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        """Go on from the hours that a checkpoint holds; one without them counts from now."""
        self.earlier_hours = float(state.get("gpu_hours", 0.0))
        self.started = time.monotonic()

    def _peak_memory(self) -> float:
        """Bytes: of tensors on the GPU since the start, or of this process."""
        if self.device.type == "cuda":
            return float(torch.cuda.max_memory_allocated(self.device))
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024.0

    def _clear(self) -> None:
        self.steps = self.samples = self.tokens = 0
        self.flops = 0.0
        self.losses = 0.0


def sample_work(model: STDiTConfig, train: TrainConfig) -> Callable[[tuple[int, int, int]], tuple[int, int]]:
    """A function that says, for latents of size (T, H, W), the tokens of one sample and the FLOPs of training on it.

    The FLOPs are those of all processes that share the sample, recomputed ones included.
    """

    @lru_cache
    def work(size: tuple[int, int, int]) -> tuple[int, int]:
        flops = training_flops(
            model,
            size,
            model.model_max_length,
            Trainable.named(train.trainable),
            train.activation_checkpointing == "full",
            train.sequence_parallel,
        )
        return math.prod(model.tokens(size)), flops * train.sequence_parallel

    return work


def describe_rates(rates: Mapping[str, float]) -> str:
    """The part of a log line that `Meter.read` fills: throughput, use of the GPU, memory, cost so far of all, ETA."""
    words = [f"{rates['samples_per_second']:.1f} samples/s", f"{rates['tokens_per_second']:.0f} tokens/s"]
    if "tflops_per_gpu" in rates:
        words.append(f"{rates['tflops_per_gpu']:.3g} TFLOP/s")
    if "mfu" in rates:
        words.append(f"MFU {rates['mfu']:.1%}")
    words.append(f"{rates['peak_memory_mib']:.0f} MiB")
    if "dollars" in rates:
        words.append(f"{rates['gpu_hours']:.1f} of {rates['gpu_hours_total']:.1f} GPU-hours")
        words.append(f"${rates['dollars']:.2f} of ${rates['dollars_total']:.2f}")
    words.append(f"eta {rates['eta_seconds']:.0f} s")
    return "  ".join(words)
