"""Worker processes: order does not matter, and hangs, crashes and errors are results."""

import os
import time
from pathlib import Path

import pytest

from opensora.data.workers import call_isolated, run_tasks, share_cores


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
    outcomes = {tasks[o.index]: o for o in run_tasks(work, tasks, workers=2, timeout_s=20)}
    assert {task: outcomes[task].value for task in "abcd"} == {"a": "A", "b": "B", "c": "C", "d": "D"}
    assert outcomes["raise"].failure == "bad item"
    assert outcomes["hang"].failure.startswith("timeout")
    assert outcomes["crash"].failure.startswith("crashed")
    assert len(outcomes) == len(tasks)


def test_no_tasks() -> None:
    assert list(run_tasks(work, [], workers=2, timeout_s=1)) == []


def cores() -> set[int]:
    return os.sched_getaffinity(0)


def child_cores(_: object) -> set[int]:
    return cores()


def tell_cores(task: str) -> set[int]:
    """The cores of this process's child; one task lets its worker die, one waits for the file that another writes."""
    name, _, path = task.partition(" ")
    if name == "crash":
        os._exit(7)
    deadline = time.monotonic() + 60
    while name == "wait" and not Path(path).exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    if name == "touch":
        Path(path).touch()
    return call_isolated(child_cores, None, 60).value or set()


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="processes cannot choose their cores here")
def test_workers_and_their_children_share_the_cores(tmp_path: Path) -> None:
    before = cores()
    mark = tmp_path / "mark"
    # The first worker dies; the one in its place takes the third task, as the second waits for it.
    tasks = ["crash", f"wait {mark}", f"touch {mark}"]
    found = {outcome.index: outcome.value for outcome in run_tasks(tell_cores, tasks, workers=2)}
    if len(before) > 1:
        assert not found[1] & found[2]
    assert found[1] | found[2] == before == cores()


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="processes cannot choose their cores here")
def test_more_workers_than_cores_keep_them_all() -> None:
    before = cores()
    with share_cores(0, len(before) + 1):
        assert cores() == before
    shares = []
    for place in range(len(before)):
        with share_cores(place, len(before)):
            shares.append(cores())
    assert sorted(map(list, shares)) == [[core] for core in sorted(before)]
    assert cores() == before
