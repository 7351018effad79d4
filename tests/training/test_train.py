"""Training: exact resume after every kind of stop, also with two processes."""

import json
import os
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

from opensora.config import Config, TrainConfig, load_config
from opensora.step import StepError
from opensora.training.stages import JOB, Source, run, train_in_process
from opensora.training.train import learning_rate
from tests.conftest import ROOT

STEPS = 8
COMMON = ("train_video.log_every=1", "train_video.checkpoint_every=3", f"train_video.steps={STEPS}")


def config(*overrides: str) -> Config:
    return load_config(ROOT / "params.yaml", "smoke", (*COMMON, *overrides))


def losses(folder: Path) -> list[tuple[int, float]]:
    lines = [json.loads(line) for line in (folder / "losses.jsonl").read_text().splitlines()]
    return [(line["step"], line["loss"]) for line in lines]


def train(values: Config, encoded: Path, base: Path) -> Path:
    run(values, "train_video", Source(encoded), None, base / "smoke" / "train_video", base)
    return base / "smoke" / "train_video"


def final_weights(folder: Path) -> dict[str, torch.Tensor]:
    (path,) = (folder / "checkpoints").glob("step-*")
    return load_file(path / "model.safetensors") | load_file(path / "ema.safetensors")


@pytest.fixture(scope="module")
def reference(encoded: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was never stopped."""
    return train(config(), encoded, tmp_path_factory.mktemp("reference"))


def same(one: Path, other: Path) -> None:
    assert losses(one) == losses(other)
    first, second = final_weights(one), final_weights(other)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


def start(values: Config, encoded: Path, base: Path) -> tuple[subprocess.Popen, Path]:
    """The same stage in a process of its own; returns it and its work folder."""
    code = (
        "import sys, json; from pathlib import Path; from opensora.config import build_config;"
        "from opensora.training.stages import Source, run; from opensora.config import UserError\n"
        "config = build_config(json.loads(sys.argv[1]))\n"
        "base = Path(sys.argv[3])\n"
        "try: run(config, 'train_video', Source(Path(sys.argv[2])), None, base / 'smoke' / 'train_video', base)\n"
        "except UserError as error: print(error); sys.exit(error.exit_code)"
    )
    command = [sys.executable, "-c", code, values.model_dump_json(), str(encoded), str(base)]
    return subprocess.Popen(command, env=os.environ | {"PYTHONPATH": str(ROOT)}), base / "smoke/.partial/train_video"


def wait_for_step(work: Path, step: int) -> None:
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        if (work / "checkpoints" / f"step-{step:08d}").is_dir():
            return
        time.sleep(0.02)
    raise AssertionError(f"step {step} was never reached")


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_a_stopped_run_ends_like_one_never_stopped(
    how: signal.Signals, reference: Path, encoded: Path, tmp_path: Path
) -> None:
    values = config()
    process, work = start(values, encoded, tmp_path)
    wait_for_step(work, 3)
    process.send_signal(how)
    code = process.wait(60)
    if not (tmp_path / "smoke" / "train_video").exists():  # it may have been faster than the signal
        assert code == {signal.SIGKILL: -9, signal.SIGTERM: 143, signal.SIGINT: 130}[how]
    same(train(values, encoded, tmp_path), reference)


def test_a_damaged_checkpoint_is_set_aside(reference: Path, encoded: Path, tmp_path: Path) -> None:
    values = config("train_video.keep_checkpoints=3")
    process, work = start(values, encoded, tmp_path)
    wait_for_step(work, 6)
    process.kill()
    process.wait()
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
    two = train(
        config(*quiet, "train_video.batch_size=2", "train_video.processes=2", "train_video.steps=1"),
        encoded,
        tmp_path / "two",
    )
    assert len(losses(one)) == len(losses(two)) == 1
    expected = final_weights(one)
    for name, value in final_weights(two).items():
        torch.testing.assert_close(value, expected[name], atol=1e-5, rtol=1e-4, msg=name)


def test_two_processes_resume_exactly(encoded: Path, tmp_path: Path) -> None:
    values = config("train_video.processes=2", "train_video.batch_size=2")
    whole = train(values, encoded, tmp_path / "whole")
    process, work = start(values, encoded, tmp_path / "stopped")
    wait_for_step(work, 3)
    process.send_signal(signal.SIGTERM)
    process.wait(90)
    same(train(values, encoded, tmp_path / "stopped"), whole)


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_and_sigterm_end_in_one_line_and_a_checkpoint(
    how: signal.Signals, encoded: Path, tmp_path: Path
) -> None:
    shutil.copytree(encoded, tmp_path / "smoke" / "encode")
    values = {"steps": 400, "checkpoint_every": 400, "processes": 2}
    command = [sys.executable, "-m", "opensora.cli", "train_image", "--profile", "smoke", "--workdir", str(tmp_path)]
    for name, value in values.items():
        command += ["--set", f"train_image.{name}={value}"]
    process = subprocess.Popen(
        command, cwd=ROOT, start_new_session=True, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True
    )
    record = tmp_path / "smoke" / ".partial" / "train_image" / "losses.jsonl"
    deadline = time.monotonic() + 120
    while not (record.is_file() and record.read_text().count("\n") >= 3) and time.monotonic() < deadline:
        time.sleep(0.01)
    if how == signal.SIGINT:
        os.killpg(process.pid, how)  # a terminal sends it to all
    else:
        process.send_signal(how)  # an orchestrator sends it to one
    _, errors = process.communicate(timeout=90)
    assert process.returncode == 128 + how
    assert f"error: stopped by {how.name} after a checkpoint; start again to resume" in errors
    assert "Traceback" not in errors
    (path,) = (record.parent / "checkpoints").glob("step-*")
    reached = int(path.name.removeprefix("step-"))
    assert 3 <= reached < 400
    assert len(record.read_text().splitlines()) == reached
    assert subprocess.run(command, cwd=ROOT, capture_output=True, timeout=120).returncode == 0
    folder = tmp_path / "smoke" / "train_image"
    assert [step for step, _ in losses(folder)] == list(range(1, 401))
    assert not (folder / "stopped.json").exists()


def test_a_killed_launcher_takes_its_processes_along(encoded: Path, tmp_path: Path) -> None:
    values = config("train_video.processes=2", "train_video.batch_size=2", "train_video.steps=100000")
    process, work = start(values, encoded, tmp_path)
    wait_for_step(work, 3)
    workers = psutil.Process(process.pid).children(recursive=True)
    process.kill()
    process.wait()
    _, alive = psutil.wait_procs(workers, timeout=20)
    assert not alive


def test_checkpoints_hold_what_resume_needs(reference: Path) -> None:
    (path,) = (reference / "checkpoints").glob("step-*")
    info = json.loads((path / "checkpoint.json").read_text())
    assert set(info["files"]) == {"model.safetensors", "ema.safetensors", "optimizer.safetensors", "rng.pt"}
    assert (info["step"], info["stage"]) == (STEPS, "train_video")
    assert info["config"]["train_video"]["steps"] == STEPS
    assert not list((reference / "checkpoints").glob("*.part"))


def test_activation_checkpointing_changes_nothing(reference: Path, encoded: Path, tmp_path: Path) -> None:
    folder = train(config("train_video.activation_checkpointing=full"), encoded, tmp_path)
    for (_, first), (_, second) in zip(losses(reference), losses(folder), strict=True):
        assert first == pytest.approx(second, rel=1e-4)


def test_a_loss_that_is_not_finite_stops_the_run_with_a_clear_line(encoded: Path, tmp_path: Path) -> None:
    values = config("train_video.lr=1e30", "train_video.steps=40", "train_video.clip_norm=1e30")
    with pytest.raises(StepError, match="not finite in 20 steps"):
        train(values, encoded, tmp_path)
    assert not (tmp_path / "smoke" / "train_video").exists()


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
    assert callable(train_in_process)


def test_a_stage_trains_with_iddpm_and_resumes_exactly(encoded: Path, tmp_path: Path) -> None:
    values = config("train_video.objective=iddpm", "model.pred_sigma=true", "train_video.checkpoint_every=1")
    whole = train(values, encoded, tmp_path / "whole")
    recorded = [loss for _, loss in losses(whole)]
    assert len(recorded) == STEPS
    assert all(0.5 < loss < 30 for loss in recorded)  # a new model predicts no noise: mse about 1, and the bound
    process, work = start(values, encoded, tmp_path / "stopped")
    wait_for_step(work, 2)
    process.kill()
    process.wait()
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
        torch.testing.assert_close(made[name], value, atol=1e-6, rtol=0)
