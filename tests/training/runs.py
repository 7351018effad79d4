"""Runs of a stage that tests of training share: their configuration, records and results."""

import json
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from opensora.config import Config, load_config
from opensora.step import write_json
from opensora.training.journal import Journal
from opensora.training.stages import JOB, Source, run
from tests.conftest import ROOT, killed_in_the_end
from tests.training.rank import train_as

STAGE = "train_video"
STEPS = 8
COMMON = ("train_video.log_every=1", "train_video.checkpoint_every=3", f"train_video.steps={STEPS}")
LIMIT_S = 120.0
WORLD_SIZE = 2
IMPORTED = ["opensora.training.worker", "opensora.training.train", "opensora.tracking.tracker", "mlflow"]


def config(*overrides: str) -> Config:
    return load_config(ROOT / "params.yaml", "smoke", (*COMMON, *overrides))


def train(values: Config, encoded: Path, base: Path, before: Path | None = None) -> Path:
    """The stage in this process (and, where there are to be several, those it starts); returns its folder."""
    run(values, STAGE, Source(encoded), before, base / "smoke" / STAGE, base)
    return base / "smoke" / STAGE


@contextmanager
def started(values: Config, encoded: Path, base: Path) -> Iterator[tuple[subprocess.Popen, Path]]:
    """The same in a process of its own, and its work folder; what is left of it is killed in the end."""
    code = (
        "import sys, json; from pathlib import Path; from opensora.config import build_config;"
        "from opensora.training.stages import Source, run; from opensora.config import UserError\n"
        "config = build_config(json.loads(sys.argv[1]))\n"
        "base = Path(sys.argv[3])\n"
        "try: run(config, 'train_video', Source(Path(sys.argv[2])), None, base / 'smoke' / 'train_video', base)\n"
        "except UserError as error: print(error); sys.exit(error.exit_code)"
    )
    command = [sys.executable, "-c", code, values.model_dump_json(), str(encoded), str(base)]
    process = subprocess.Popen(command, env=os.environ | {"PYTHONPATH": str(ROOT)}, start_new_session=True)
    with killed_in_the_end(process):
        yield process, base / "smoke" / ".partial" / STAGE


def losses(folder: Path) -> list[tuple[int, float]]:
    lines = [json.loads(line) for line in (folder / "losses.jsonl").read_text().splitlines()]
    return [(line["step"], line["loss"]) for line in lines]


def final_weights(folder: Path) -> dict[str, torch.Tensor]:
    """Model, averages and optimizer of the newest checkpoint."""
    path = max((folder / "checkpoints").glob("step-*"))
    parts = {part: load_file(path / f"{part}.safetensors") for part in ("model", "ema", "optimizer")}
    return {f"{part}/{name}": value for part, state in parts.items() for name, value in state.items()}


def same(one: Path, other: Path) -> None:
    """Both runs had the same losses and ended with the same weights, bit for bit."""
    assert losses(one) == losses(other)
    first, second = final_weights(one), final_weights(other)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


def wait_for_step(work: Path, step: int) -> None:
    """Until the checkpoint of that step is there."""
    deadline = time.monotonic() + LIMIT_S
    while time.monotonic() < deadline:
        if (work / "checkpoints" / f"step-{step:08d}").is_dir():
            return
        time.sleep(0.02)
    raise AssertionError(f"step {step} was never reached")


def wait_for_losses(work: Path, count: int) -> None:
    """Until that many steps are recorded."""
    deadline = time.monotonic() + LIMIT_S
    path = work / "losses.jsonl"
    while time.monotonic() < deadline:
        if path.is_file() and path.read_text().count("\n") >= count:
            return
        time.sleep(0.01)
    raise AssertionError(f"step {count} was never recorded")


def stopped_at(step: int, patch: pytest.MonkeyPatch, how: signal.Signals = signal.SIGTERM) -> None:
    """Have this process told to stop while it trains that step."""
    record = Journal.record

    def record_and_signal(journal: Journal, number: int, loss: float, skipped: bool = False) -> None:
        record(journal, number, loss, skipped)
        if number == step - 1:
            os.kill(os.getpid(), how)

    patch.setattr(Journal, "record", record_and_signal)


def free_port() -> int:
    with socket.socket() as place:
        place.bind(("127.0.0.1", 0))
        return place.getsockname()[1]


def prepare(values: Config, encoded: Path, work: Path, previous: str = "") -> Path:
    """A work folder with the job in it, as the stage's own."""
    work.mkdir(parents=True)
    job = {"config": values.model_dump(mode="json"), "stage": STAGE, "previous": previous, "root": str(work)}
    write_json(work / JOB, job | {"source": {"manifest": str(encoded)}, "lineage": {}})
    return work


def begin(work: Path) -> list[BaseProcess]:
    """Two processes of the run, copies of one that has imported torch and the rest: a start costs a second, not ten."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(IMPORTED)
    port = free_port()
    processes = [
        context.Process(target=train_as, args=(rank, WORLD_SIZE, port, work), daemon=True) for rank in range(WORLD_SIZE)
    ]
    for process in processes:
        process.start()
    return processes


def end(processes: list[BaseProcess]) -> None:
    """Kill what is left of them, in that order."""
    for process in processes:
        process.kill()
        process.join(LIMIT_S)


def finish(work: Path) -> None:
    """Train in `work` to the end."""
    processes = begin(work)
    try:
        for process in processes:
            process.join(LIMIT_S)
        assert [process.exitcode for process in processes] == [0] * WORLD_SIZE
    finally:
        end(processes)
