"""SIGKILL at random points, ten times: a run of two processes ends as one that was never stopped."""

import random
import time
from pathlib import Path

from tests.training.runs import LIMIT_S, begin, config, end, finish, losses, prepare, same

KILLS, STEPS = 10, 80
AHEAD = 6  # steps that a start may do before it is killed; a checkpoint comes every three


def steps(work: Path) -> int:
    path = work / "losses.jsonl"
    return path.read_text().count("\n") if path.is_file() else 0


def test_a_run_killed_ten_times_is_the_run_that_was_not(encoded: Path, tmp_path: Path) -> None:
    values = config("train_video.processes=2", "train_video.batch_size=2", f"train_video.steps={STEPS}")
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
    same(killed, whole)
    assert [step for step, _ in losses(killed)] == list(range(1, STEPS + 1))
    assert [path.name for path in (killed / "checkpoints").iterdir()] == [f"step-{STEPS:08d}"]
