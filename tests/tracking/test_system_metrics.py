"""System metrics bear the names and units that MLflow gives its own."""

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from opensora.tracking.spool import SYSTEM, count_records
from opensora.tracking.system_metrics import INTERVAL, Machine, SystemMetrics, parse_gpus
from tests.small_disk import small_disk
from tests.tracking.nvidia_smi import install


def test_names_and_units_are_those_of_mlflow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from mlflow.system_metrics.metrics import gpu_monitor
    from mlflow.system_metrics.metrics.cpu_monitor import CPUMonitor
    from mlflow.system_metrics.metrics.disk_monitor import DiskMonitor
    from mlflow.system_metrics.metrics.network_monitor import NetworkMonitor

    nvml = SimpleNamespace(  # of the same two GPUs as those of the program below
        NVMLError=RuntimeError,
        nvmlInit=lambda: None,
        nvmlDeviceGetCount=lambda: 2,
        nvmlDeviceGetHandleByIndex=lambda index: index,
        nvmlDeviceGetMemoryInfo=lambda gpu: SimpleNamespace(used=(61440, 1024)[gpu] << 20, total=81920 << 20),
        nvmlDeviceGetUtilizationRates=lambda gpu: SimpleNamespace(gpu=(97, 0)[gpu]),
        nvmlDeviceGetPowerUsage=lambda gpu: (612340, 71000)[gpu],
        nvmlDeviceGetEnforcedPowerLimit=lambda gpu: 700000,
    )
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    monkeypatch.setattr(gpu_monitor, "pynvml", nvml, raising=False)
    install(tmp_path / "bin", monkeypatch, ["0, 97, 61440, 81920, 612.34, 700.00", "1, 0, 1024, 81920, 71.00, 700.00"])
    theirs: dict[str, float] = {}
    for monitor in (CPUMonitor(), DiskMonitor(), NetworkMonitor(), gpu_monitor.GPUMonitor()):
        monitor.collect_metrics()
        theirs |= monitor.aggregate_metrics()
    ours = Machine(Path("/")).sample()
    assert ours.keys() == theirs.keys()
    same = {name for name in theirs if name.startswith("gpu_")} | {"disk_usage_megabytes"}
    assert {name: ours[name] for name in same} == pytest.approx(
        {name: theirs[name] for name in same}, rel=1e-3, abs=0.06
    )
    memory = "system_memory_usage_megabytes"
    assert 0.3 < ours[memory] / theirs[memory] < 3


def test_what_a_gpu_does_not_tell_is_absent() -> None:
    lines = [
        "0, [N/A], 61440, 81920, [Not Supported], 700.00",
        "1, [Unknown Error], [N/A], [N/A], 80.5, [N/A]",
        "No device",
    ]
    assert parse_gpus("\n".join(lines)) == {
        "gpu_0_memory_usage_megabytes": pytest.approx(64424.5, abs=0.1),
        "gpu_0_memory_usage_percentage": 75.0,
        "gpu_1_power_usage_watts": 80.5,
    }


def test_a_driver_that_fails_costs_nothing_but_its_gpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(tmp_path / "bin", monkeypatch, ["NVIDIA-SMI has failed"], status=9)
    values = Machine(tmp_path).sample()
    assert values["system_memory_usage_megabytes"] > 0
    assert not [name for name in values if name.startswith("gpu_")]


def test_the_disk_is_that_of_the_results(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", "600k") as disk:
        assert 0 < Machine(disk).sample()["disk_available_megabytes"] < 1


def test_nothing_is_sampled_where_it_is_switched_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(INTERVAL, "0.001")
    machine = SystemMetrics(tmp_path, tmp_path, lambda text: None)  # as in all tests that do not ask for it
    machine.start()
    assert machine._thread.ident is None
    machine.stop()
    assert not (tmp_path / SYSTEM).exists()


@pytest.mark.parametrize("text", ["often", "0", "-1", "nan", "inf", "1e30"])
def test_an_interval_that_is_none_is_said(text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_ENABLE_SYSTEM_METRICS_LOGGING", "true")
    monkeypatch.setenv(INTERVAL, text)
    said: list[str] = []
    machine = SystemMetrics(tmp_path, tmp_path, said.append)
    machine.start()
    machine.stop()
    machine._thread.join(60)
    assert said == [f"{INTERVAL} is {text}, which is no number of seconds; the machine is sampled every 10 s"]
    assert count_records(tmp_path / SYSTEM) == 0
