"""Kinds of GPUs: memory, speed and what an hour costs, for plans and the meter."""

from dataclasses import dataclass

from opensora.config import ConfigError, nearest

GIB = 2**30
# What a training process cannot have: the CUDA context and NCCL's buffers, and holes between the allocator's blocks.
CONTEXT = 1.0 * GIB
HOLES = 0.04


@dataclass(frozen=True)
class Gpu:
    """One kind of GPU.

    Memory is what PyTorch reports as total, speed the maker's figure for dense bfloat16 matrix products. Prices are
    assumptions: round figures of hourly rents, and for the H800 what the published run paid (about $10,000 for 4,728
    hours). They follow the market, so set `hardware.dollars_per_gpu_hour` to yours.
    """

    name: str
    memory_gib: float
    tflops: float  # bfloat16, dense, peak
    dollars_per_hour: float
    marks: tuple[str, ...]  # found in the name that the driver gives

    @property
    def usable(self) -> float:
        """Bytes that tensors can take."""
        return self.memory_gib * GIB * (1 - HOLES) - CONTEXT


GPUS = {
    gpu.name: gpu
    for gpu in (
        Gpu("h800", 79.1, 989, 2.1, ("H800",)),
        Gpu("h100", 79.1, 989, 2.5, ("H100",)),
        Gpu("h200", 139.8, 989, 3.5, ("H200",)),
        Gpu("b200", 178.4, 2250, 5.0, ("B200",)),
        Gpu("a100", 79.1, 312, 1.6, ("A100", "80GB")),
        Gpu("a100_40gb", 39.4, 312, 1.2, ("A100", "40GB")),
        Gpu("a800", 79.1, 312, 1.6, ("A800",)),
        Gpu("l40s", 44.4, 362, 0.9, ("L40S",)),
        Gpu("rtx4090", 23.5, 165, 0.4, ("RTX 4090",)),
        Gpu("rtx5090", 31.4, 209, 0.6, ("RTX 5090",)),
    )
}


def known_gpu(kind: str) -> Gpu:
    """The GPU of that name; raises ConfigError for another one."""
    if kind not in GPUS:
        raise ConfigError(f"unknown GPU {kind!r}{nearest(kind, list(GPUS))}; one of {', '.join(GPUS)}")
    return GPUS[kind]


def gpu_of(device_name: str) -> Gpu | None:
    """The kind that the driver's name, as "NVIDIA H100 80GB HBM3", stands for; None for one that is not known here."""
    found = [gpu for gpu in GPUS.values() if all(mark in device_name for mark in gpu.marks)]
    return found[0] if found else None


def gpu_here(index: int = 0) -> Gpu | None:
    """The kind of a GPU of this machine; None without one, or if it is not known here."""
    import torch

    return gpu_of(torch.cuda.get_device_name(index)) if torch.cuda.is_available() else None
