"""The meter: rates of a window, cost of the whole run over its starts, and no wait for the device between readings."""

import time

import pytest
import torch

from opensora.config import HardwareConfig, load_config
from opensora.gpus import known_gpu
from opensora.models.flops import training_flops
from opensora.models.stdit import STDiTConfig
from opensora.training.meter import Meter, describe_rates, sample_work
from tests.conftest import ROOT


class Clock:
    """Stands for time.monotonic."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 1000.0
        monkeypatch.setattr(time, "monotonic", lambda: self.now)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


def on_h800(world_size: int = 64) -> Meter:
    """As on a GPU, but for its memory."""
    meter = Meter(world_size)
    meter.gpu, meter.dollars_per_hour = known_gpu("h800"), 2.0
    return meter


def test_rates_are_those_since_the_last_reading(clock: Clock) -> None:
    meter = Meter(world_size=2)
    for loss in (1.0, torch.tensor(2.0), 3.0):
        clock.now += 2.0
        meter.update(8, loss, tokens=800, flops=4e12)
    rates = meter.read(remaining=10)
    expected = {"loss": 2.0, "samples_per_second": 4.0, "tokens_per_second": 400.0, "seconds_per_step": 2.0}
    assert rates.items() >= (expected | {"eta_seconds": 20.0, "tflops_per_gpu": 1.0}).items()
    assert rates["peak_memory_mib"] > 1
    assert not {"mfu", "gpu_hours", "dollars"} & rates.keys()  # no GPU, so nothing to say
    clock.now += 1.0
    meter.update(8, 5.0, tokens=800, flops=4e12)
    assert meter.read(0)["loss"] == 5.0


def test_cost_counts_all_gpus_and_all_starts(clock: Clock) -> None:
    """As the published run: 64 GPUs that are each at 7.00 samples/s are at 12 % of an H800's peak."""
    meter = on_h800()
    clock.now += 3600
    meter.update(64 * 7 * 3600, 0.0, tokens=1, flops=64 * 7 * 3600 * 3 * 5.71e12)
    rates = meter.read(remaining=1)
    assert rates["mfu"] == pytest.approx(0.121, abs=0.001)
    assert rates["gpu_hours"] == 64
    assert rates["gpu_hours_total"] == 128
    assert rates["dollars_total"] == 256

    state = meter.state_dict()
    clock.now = 5.0  # another machine, hours later
    resumed = on_h800(world_size=32)
    resumed.load_state_dict(state)
    clock.now += 3600
    resumed.update(1, 0.0, 1, 1.0)
    assert resumed.read(0)["gpu_hours"] == 64 + 32
    resumed.load_state_dict({})  # of a checkpoint without it
    assert resumed.state_dict()["gpu_hours"] == 0


def test_a_date_that_jumps_changes_nothing(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    meter = Meter()
    clock.now += 1.0
    monkeypatch.setattr(time, "time", lambda: -1e9)
    meter.update(3, 1.0, 1, 1.0)
    assert meter.read(1)["samples_per_second"] == 3.0
    meter.update(3, 1.0, 1, 1.0)
    assert meter.read(1)["samples_per_second"] < float("inf")  # no time has passed


def test_a_loss_on_the_device_is_fetched_in_a_reading_alone() -> None:
    """A tensor without values cannot be fetched: any attempt would raise."""
    meter = Meter()
    meter.update(1, torch.ones((), device="meta"), 1, 1.0)
    meter.update(1, torch.ones((), device="meta"), 1, 1.0)
    with pytest.raises(RuntimeError, match="meta"):
        meter.read(0)


def test_work_of_a_sample_is_that_of_its_bucket() -> None:
    model = STDiTConfig((16, 32, 32))
    train = load_config(ROOT / "params.yaml", "h800", ("train_video.activation_checkpointing=none",)).train_video
    work = sample_work(model, train)
    assert work((16, 32, 32)) == (4096, training_flops(model, (16, 32, 32), 120))
    assert work((1, 64, 64))[0] == 1024
    shared = train.model_copy(update={"sequence_parallel": 2})
    assert sample_work(model, shared)((16, 32, 32))[1] == pytest.approx(work((16, 32, 32))[1], rel=0.02)


def test_the_price_is_the_user_s(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("opensora.training.meter.gpu_here", lambda index: None)
    hardware = HardwareConfig(gpu="h800", dollars_per_gpu_hour=1.25)
    assert Meter(8, hardware, torch.device("cuda", 0)).dollars_per_hour == 1.25
    assert Meter(8, hardware, torch.device("cpu")).gpu is None


def test_a_log_line_says_what_there_is(clock: Clock) -> None:
    meter = Meter()
    clock.now += 1.0
    meter.update(1, 1.0, 256, 0.0)
    assert "1.0 samples/s  256 tokens/s" in describe_rates(meter.read(5))
    gpu = on_h800()
    clock.now += 36.0
    gpu.update(64, 1.0, 256, 64 * 36 * 98.9e12)
    line = describe_rates(gpu.read(1))
    assert "98.9 TFLOP/s  MFU 10.0%" in line
    assert "0.6 of 1.3 GPU-hours  $1.28 of $2.56  eta 36 s" in line
