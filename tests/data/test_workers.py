"""Worker processes: order does not matter, and hangs, crashes and errors are results."""

import os
import time

from opensora.data.workers import run_tasks


def work(task: str) -> str:
    if task == "hang":
        time.sleep(60)
    if task == "crash":
        os._exit(7)
    if task == "raise":
        raise ValueError("bad item")
    return task.upper()


def test_every_task_has_one_outcome() -> None:
    tasks = ["a", "crash", "b", "raise", "hang", "c", "d"]
    outcomes = {tasks[o.index]: o for o in run_tasks(work, tasks, workers=2, timeout_s=6)}
    assert {task: outcomes[task].value for task in "abcd"} == {"a": "A", "b": "B", "c": "C", "d": "D"}
    assert outcomes["raise"].failure == "bad item"
    assert outcomes["hang"].failure.startswith("timeout")
    assert outcomes["crash"].failure.startswith("crashed")
    assert len(outcomes) == len(tasks)


def test_no_tasks() -> None:
    assert list(run_tasks(work, [], workers=2, timeout_s=1)) == []
