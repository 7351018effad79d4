"""SIGKILL at random points, ten times: a run of two processes ends as one that was never stopped."""

import multiprocessing
import random
import time
from multiprocessing.process import BaseProcess
from pathlib import Path

from opensora.config import Config
from opensora.step import write_json
from opensora.training.stages import JOB
from tests.training import runs
from tests.training.rank import train_as

KILLS, STEPS, WORLD_SIZE = 10, 80, 2
AHEAD = 6  # steps that a start may do before it is killed; a checkpoint comes every three
LIMIT_S = 120.0
IMPORTED = ["opensora.training.worker", "opensora.training.train", "opensora.tracking", "mlflow"]


def prepare(values: Config, encoded: Path, work: Path) -> Path:
    """A work folder with the job in it, as the stage's own."""
    work.mkdir(parents=True)
    job = {"config": values.model_dump(mode="json"), "stage": runs.STAGE, "previous": "", "root": str(work.parent)}
    write_json(work / JOB, job | {"source": {"manifest": str(encoded)}})
    return work


def begin(work: Path) -> list[BaseProcess]:
    """All processes of the run, copies of one that has imported torch and the rest: ten starts would cost a minute."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(IMPORTED)
    port = runs.free_port()
    processes = [
        context.Process(target=train_as, args=(rank, WORLD_SIZE, port, work), daemon=True) for rank in range(WORLD_SIZE)
    ]
    for process in processes:
        process.start()
    return processes


def steps(work: Path) -> int:
    path = work / "losses.jsonl"
    return path.read_text().count("\n") if path.is_file() else 0


def end(processes: list[BaseProcess]) -> None:
    for process in processes:
        process.kill()
        process.join(LIMIT_S)


def finish(work: Path) -> None:
    processes = begin(work)
    try:
        for process in processes:
            process.join(LIMIT_S)
        assert [process.exitcode for process in processes] == [0] * WORLD_SIZE
    finally:
        end(processes)


def test_a_run_killed_ten_times_is_the_run_that_was_not(encoded: Path, tmp_path: Path) -> None:
    values = runs.config("train_video.processes=2", "train_video.batch_size=2", f"train_video.steps={STEPS}")
    whole = prepare(values, encoded, tmp_path / "whole")
    finish(whole)
    chance = random.Random(20240318)
    killed = prepare(values, encoded, tmp_path / "killed")
    reached = []
    for _ in range(KILLS):
        before = steps(killed) if killed.exists() else 0
        processes = begin(killed)
        try:
            goal = chance.randint(1, AHEAD)
            deadline = time.monotonic() + LIMIT_S
            seen = before
            while goal > 0 and time.monotonic() < deadline and all(process.is_alive() for process in processes):
                now = steps(killed)
                goal -= max(now - seen, 0)  # it falls when the record is cut to the checkpoint
                seen = now
                time.sleep(0.001)
            time.sleep(chance.uniform(0, 0.03))  # anywhere in a step
        finally:
            chance.shuffle(processes)
            end(processes)
        reached.append(steps(killed))
    assert min(reached) > 0
    assert max(reached) < STEPS, "no kill came too late"
    finish(killed)
    runs.same(killed, whole)
    assert [step for step, _ in runs.losses(killed)] == list(range(1, STEPS + 1))
    assert [path.name for path in (killed / "checkpoints").iterdir()] == [f"step-{STEPS:08d}"]
