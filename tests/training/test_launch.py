"""Launched beside others: the worker's own exit code, one checkpoint when told to stop, and the same run afterwards."""

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT
from tests.training.runs import STAGE, config, finish, losses, prepare, same, train, wait_for_losses

STEPS = 60
QUIET = ("model.class_dropout_prob=0.0", f"{STAGE}.steps={STEPS}", f"{STAGE}.checkpoint_every={STEPS}")
LAUNCH = ["opensora.launch", "--nproc-per-node", "2", "--monitor-interval", "0.1"]


def popen(module: list[str], *arguments: str) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-m", *module, *arguments],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def step(base: Path) -> list[str]:
    """The command's arguments, for two samples a process."""
    settings = (*QUIET, f"{STAGE}.batch_size=2", f"{STAGE}.log_every=1")
    return [STAGE, "--profile", "smoke", "--workdir", str(base), *(f"--set={text}" for text in settings)]


def end(process: subprocess.Popen) -> None:
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
    process.communicate(timeout=60)


def test_the_code_of_a_worker_comes_through(tmp_path: Path) -> None:
    process = popen(LAUNCH, "config", "--profile", "none")
    try:
        _, errors = process.communicate(timeout=120)
    finally:
        end(process)
    assert process.returncode == 2
    assert "unknown profile 'none'" in errors
    assert "Traceback" not in errors


def test_joined_processes_stop_and_go_on_also_as_another_number(encoded: Path, tmp_path: Path) -> None:
    """Started by the launcher and told to stop; gone on with by the launcher, and by one process of twice the batch."""
    two = config(*QUIET, f"{STAGE}.processes=2", f"{STAGE}.batch_size=2")
    shutil.copytree(encoded, tmp_path / "two" / "smoke" / "encode")
    image = Path("smoke") / "train_image"
    weights = train_image(encoded, tmp_path / "two" / image)
    whole = prepare(two, encoded, tmp_path / "whole", str(weights))
    finish(whole)
    process = popen(LAUNCH, *step(tmp_path / "two"))
    work = tmp_path / "two" / "smoke" / ".partial" / STAGE
    try:
        wait_for_losses(work, 3)
        process.send_signal(signal.SIGTERM)  # to the launcher alone, as an orchestrator does
        _, errors = process.communicate(timeout=90)
    finally:
        end(process)
    assert process.returncode == 128 + signal.SIGTERM
    assert "Traceback" not in errors
    assert errors.count("stopped by SIGTERM after a checkpoint; start again to resume") == 1
    (path,) = (work / "checkpoints").iterdir()
    reached = int(path.name.removeprefix("step-"))
    assert 3 <= reached < STEPS
    shutil.copytree(tmp_path / "two", tmp_path / "one")

    process = popen(LAUNCH, *step(tmp_path / "two"))
    try:
        output, errors = process.communicate(timeout=120)
    finally:
        end(process)
    assert process.returncode == 0, errors
    assert output.count(f"{STAGE}: 8 of 8 kept") == 1  # said by one of them
    same(tmp_path / "two" / "smoke" / STAGE, whole)
    assert not (tmp_path / "two" / "smoke" / STAGE / "stopped.json").exists()

    one = config(*QUIET, f"{STAGE}.batch_size=4")
    alone = train(one, tmp_path / "one" / "smoke" / "encode", tmp_path / "one", weights)
    assert losses(alone)[:reached] == losses(whole)[:reached]
    for (_, first), (_, second) in zip(losses(alone), losses(whole), strict=True):
        assert first == pytest.approx(second, rel=1e-3)  # the same samples and noise; sums of another order


def train_image(encoded: Path, folder: Path) -> Path:
    """The stage before, which the command line asks for."""
    from opensora.training.stages import Source, run

    run(config("train_image.steps=1"), "train_image", Source(encoded), None, folder, folder.parents[1])
    return folder
