"""Training: exact resume after every kind of stop, also with two processes."""

import itertools
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import load_file

from opensora.config import TrainConfig
from opensora.step import StepError
from opensora.tracking.lineage import lineage
from opensora.training.stages import JOB, Source, run
from opensora.training.stop import Stopped
from opensora.training.train import learning_rate
from tests.conftest import ROOT, killed_in_the_end
from tests.training.runs import (
    LIMIT_S,
    STEPS,
    config,
    final_weights,
    finish,
    losses,
    prepare,
    same,
    started,
    stopped_at,
    train,
    wait_for_losses,
    wait_for_step,
)


@pytest.fixture(scope="module")
def reference(encoded: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was never stopped."""
    return train(config(), encoded, tmp_path_factory.mktemp("reference"))


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGINT])
def test_a_stopped_run_ends_like_one_never_stopped(
    how: signal.Signals, reference: Path, encoded: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        stopped_at(5, patch, how)
        with pytest.raises(Stopped, match=f"stopped by {how.name} after a checkpoint"):
            train(config(), encoded, tmp_path)
    work = tmp_path / "smoke" / ".partial" / "train_video"
    assert [path.name for path in (work / "checkpoints").iterdir()] == ["step-00000005"]
    same(train(config(), encoded, tmp_path), reference)


def test_a_damaged_checkpoint_is_set_aside(reference: Path, encoded: Path, tmp_path: Path) -> None:
    values = config("train_video.keep_checkpoints=3")
    with started(values, encoded, tmp_path) as (_, work):
        wait_for_step(work, 6)
    newest = sorted((work / "checkpoints").glob("step-*"))[-1]
    with (newest / "model.safetensors").open("r+b") as handle:
        handle.seek(-8, os.SEEK_END)
        handle.write(b"damaged!")
    folder = train(values, encoded, tmp_path)
    assert list((folder / "checkpoints").glob("damaged-step-*"))
    assert losses(folder) == losses(reference)


def test_two_processes_equal_one_with_twice_the_batch(encoded: Path, tmp_path: Path) -> None:
    quiet = ("model.class_dropout_prob=0.0",)  # each process draws its own dropped captions
    one = train(config(*quiet, "train_video.batch_size=4", "train_video.steps=1"), encoded, tmp_path / "one")
    halves = config(*quiet, "train_video.batch_size=2", "train_video.processes=2", "train_video.steps=1")
    two = prepare(halves, encoded, tmp_path / "two")
    finish(two)
    assert len(losses(one)) == len(losses(two)) == 1
    expected = final_weights(one)
    for name, value in final_weights(two).items():
        torch.testing.assert_close(value, expected[name], atol=1e-5, rtol=1e-4, msg=name)


def test_ctrl_c_ends_in_one_line_and_a_checkpoint(encoded: Path, tmp_path: Path) -> None:
    shutil.copytree(encoded, tmp_path / "smoke" / "encode")
    values = {"steps": 400, "checkpoint_every": 400, "processes": 2}
    command = [sys.executable, "-m", "opensora.cli", "train_image", "--profile", "smoke", "--workdir", str(tmp_path)]
    for name, value in values.items():
        command += ["--set", f"train_image.{name}={value}"]
    process = subprocess.Popen(
        command, cwd=ROOT, start_new_session=True, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True
    )
    record = tmp_path / "smoke" / ".partial" / "train_image" / "losses.jsonl"
    with killed_in_the_end(process):
        wait_for_losses(record.parent, 3)
        os.killpg(process.pid, signal.SIGINT)  # a terminal sends it to all; test_launch sends SIGTERM to one
        _, errors = process.communicate(timeout=LIMIT_S)
    assert process.returncode == 130
    assert "error: stopped by SIGINT after a checkpoint; start again to resume" in errors
    assert "Traceback" not in errors
    (path,) = (record.parent / "checkpoints").glob("step-*")
    reached = int(path.name.removeprefix("step-"))
    assert 3 <= reached < 400
    assert len(record.read_text().splitlines()) == reached


def test_a_killed_launcher_takes_its_processes_along(encoded: Path, tmp_path: Path) -> None:
    values = config("train_video.processes=2", "train_video.batch_size=2", "train_video.steps=100000")
    with started(values, encoded, tmp_path) as (process, work):
        wait_for_step(work, 3)
        workers = psutil.Process(process.pid).children(recursive=True)
        process.kill()
        process.wait()
        _, alive = psutil.wait_procs(workers, timeout=60)
    assert not alive


def test_checkpoints_hold_what_resume_and_the_gate_need(reference: Path, encoded: Path) -> None:
    (path,) = (reference / "checkpoints").glob("step-*")
    info = json.loads((path / "checkpoint.json").read_text())
    assert set(info["files"]) == {"model.safetensors", "ema.safetensors", "optimizer.safetensors", "rng.safetensors"}
    assert (info["step"], info["stage"]) == (STEPS, "train_video")
    assert info["config"]["train_video"]["steps"] == STEPS
    assert info["metrics"] == json.loads((reference / "report.json").read_text())["metrics"]
    assert info["lineage"]["git_commit"] == lineage()["git_commit"]
    assert info["lineage"]["data_fingerprint"] == json.loads((encoded / "fingerprint.json").read_text())
    assert not list((reference / "checkpoints").glob("*.part"))


def test_activation_checkpointing_changes_nothing(reference: Path, encoded: Path, tmp_path: Path) -> None:
    folder = train(config("train_video.activation_checkpointing=full"), encoded, tmp_path)
    for (_, first), (_, second) in zip(losses(reference), losses(folder), strict=True):
        assert first == pytest.approx(second, rel=1e-4)


def test_micro_batches_equal_a_larger_batch(encoded: Path, tmp_path: Path) -> None:
    quiet = ("model.class_dropout_prob=0.0", "train_video.steps=2")
    one = train(config(*quiet, "train_video.batch_size=4"), encoded, tmp_path / "one")
    four = train(config(*quiet, "train_video.batch_size=1", "train_video.accumulate=4"), encoded, tmp_path / "four")
    for (_, first), (_, second) in zip(losses(one), losses(four), strict=True):
        assert first == pytest.approx(second, rel=1e-5)
    expected = final_weights(one)
    for name, value in final_weights(four).items():
        torch.testing.assert_close(value, expected[name], atol=1e-5, rtol=1e-4, msg=name)


def test_a_full_disk_ends_the_run_and_a_new_start_resumes(encoded: Path, tmp_path: Path) -> None:
    values = config("train_video.steps=120")
    with started(values, encoded, tmp_path) as (process, work):
        wait_for_step(work, 3)
        limit = (1 << 15, resource.RLIM_INFINITY)
        resource.prlimit(process.pid, resource.RLIMIT_FSIZE, limit)  # as if no space were left
        assert process.wait(LIMIT_S) == 1
    kept = [path.name for path in (work / "checkpoints").iterdir()]
    assert len(kept) == 1  # whole, and nothing half-written beside it
    assert 3 <= int(kept[0].removeprefix("step-")) < 120
    folder = train(values, encoded, tmp_path)
    assert [step for step, _ in losses(folder)] == list(range(1, 121))


def test_other_values_do_not_wipe_out_a_stopped_run(
    reference: Path, encoded: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        stopped_at(5, patch)
        with pytest.raises(Stopped):
            train(config(), encoded, tmp_path)
    work = tmp_path / "smoke" / ".partial" / "train_video"
    with pytest.raises(StepError, match=r"other values \(lr 0.001 there and 0.5 here\); go on with those, or delete"):
        train(config("train_video.lr=0.5"), encoded, tmp_path)
    assert [path.name for path in (work / "checkpoints").iterdir()] == ["step-00000005"]
    same(train(config("train_video.log_every=3", "train_video.checkpoint_every=2"), encoded, tmp_path), reference)


def test_a_clock_that_jumps_changes_nothing(
    reference: Path, encoded: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    jumps = itertools.cycle([0.0, 1e9, 5.0, 2e9])
    monkeypatch.setattr(time, "time", lambda: next(jumps))
    folder = train(config(), encoded, tmp_path)
    same(folder, reference)
    assert 0 < json.loads((folder / "report.json").read_text())["seconds"] < 1e6


def test_a_missing_shard_is_named(encoded: Path, tmp_path: Path) -> None:
    incomplete = tmp_path / "encode"
    shutil.copytree(encoded, incomplete)
    (incomplete / "t").unlink()
    with pytest.raises(StepError, match="encode/t"):
        train(config(), incomplete, tmp_path)


def test_warm_start_takes_the_averaged_weights(encoded: Path, reference: Path, tmp_path: Path) -> None:
    values = config("train_highres.lr=1e-12", "train_highres.steps=1")
    run(values, "train_highres", Source(encoded), reference, tmp_path / "smoke" / "train_highres", tmp_path)
    (before,), (after,) = (
        (path / "checkpoints").glob("step-*") for path in (reference, tmp_path / "smoke" / "train_highres")
    )
    averaged, started = load_file(before / "ema.safetensors"), load_file(after / "model.safetensors")
    for name, value in averaged.items():
        torch.testing.assert_close(started[name], value, atol=1e-6, rtol=1e-5)


def test_training_learns(encoded: Path, tmp_path: Path) -> None:
    values = config("train_video.steps=60", "train_video.checkpoint_every=60", "train_video.lr=3e-3")
    curve = [loss for _, loss in losses(train(values, encoded, tmp_path))]
    assert sum(curve[-10:]) < 0.9 * sum(curve[:10])


def test_learning_rate() -> None:
    values = TrainConfig(steps=100, lr=1.0, warmup_steps=9, decay_share=0.5)
    assert learning_rate(values, 0) == pytest.approx(0.1)
    assert learning_rate(values, 9) == learning_rate(values, 50) == pytest.approx(1.0)
    assert learning_rate(values, 75) == pytest.approx(0.5)
    assert learning_rate(values, 99) == pytest.approx(0.02)


def test_a_job_without_long_enough_clips_is_refused(encoded: Path, tmp_path: Path) -> None:
    with pytest.raises(StepError, match=r"8 too short.*16x32x32 at interval 1 has 0 clips"):
        train(config("train_video.frames=16"), encoded, tmp_path)
    assert (tmp_path / "smoke" / ".partial" / "train_video" / JOB).exists()


def test_a_stage_trains_with_iddpm_and_resumes_exactly(encoded: Path, tmp_path: Path) -> None:
    values = config("train_video.objective=iddpm", "model.pred_sigma=true", "train_video.checkpoint_every=1")
    whole = train(values, encoded, tmp_path / "whole")
    recorded = [loss for _, loss in losses(whole)]
    assert len(recorded) == STEPS
    assert all(0.5 < loss < 30 for loss in recorded)  # a new model predicts no noise: mse about 1, and the bound
    with started(values, encoded, tmp_path / "stopped") as (_, work):
        wait_for_step(work, 2)
    same(whole, train(values, encoded, tmp_path / "stopped"))


def test_a_stage_starts_from_a_released_file(encoded: Path, tmp_path: Path) -> None:
    from opensora.models.stdit import STDiT
    from opensora.training.checkpoint import stdit_config

    torch.manual_seed(5)
    state = STDiT(stdit_config(config(), "train_video", 4)).state_dict()
    torch.save({"ema": state}, tmp_path / "released.pth")
    values = config(f"train_video.init_from={tmp_path / 'released.pth'}", "train_video.steps=1", "train_video.lr=1e-9")
    made = final_weights(train(values, encoded, tmp_path / "run"))
    for name, value in state.items():
        torch.testing.assert_close(made[f"model/{name}"], value, atol=1e-6, rtol=0)
