"""Kinds of GPUs are found by their own names and by the driver's."""

import pytest

from opensora.config import ConfigError
from opensora.gpus import GIB, GPUS, gpu_of, known_gpu


@pytest.mark.parametrize(
    ("driver", "name"),
    [
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA H800", "h800"),
        ("NVIDIA H200", "h200"),
        ("NVIDIA A100-SXM4-80GB", "a100"),
        ("NVIDIA A100-PCIE-40GB", "a100_40gb"),
        ("NVIDIA GeForce RTX 4090", "rtx4090"),
        ("NVIDIA L40S", "l40s"),
    ],
)
def test_the_driver_s_name_is_understood(driver: str, name: str) -> None:
    gpu = gpu_of(driver)
    assert gpu is not None
    assert gpu is known_gpu(name)
    assert gpu.usable < gpu.memory_gib * GIB


def test_unknown_kinds() -> None:
    assert gpu_of("NVIDIA GeForce GTX 1080") is None
    with pytest.raises(ConfigError, match=r"unknown GPU 'h108'.*one of h800, h100"):
        known_gpu("h108")
    assert all(gpu.name == name for name, gpu in GPUS.items())
