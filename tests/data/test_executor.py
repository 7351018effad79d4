"""The executor: the same bytes by every way, retries, what is done is not done again, and nothing half-written."""

import errno
import json
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from opensora.config import ExecutorConfig
from opensora.data.executor import STATUS, run_shards
from opensora.data.workers import advance, call_isolated
from opensora.manifest import Clip, part_name, read_manifest, write_part
from opensora.step import StepError
from tests.conftest import ROOT, killed_in_the_end

KINDS = ("sequential", "pool", "ray")


@dataclass(frozen=True)
class Task:
    number: int
    part: Path
    trouble: str = ""  # what happens at the first attempt, or "always …"


def double(number: int) -> int:
    return 2 * number


def work(task: Task) -> None:
    """Writes two rows; the value comes from a process of its own, as decoding does."""
    mark = task.part.with_suffix(".tried")
    first = not mark.exists()
    mark.touch()
    match task.trouble if first or task.trouble.startswith("always") else "":
        case "raise" | "always raise":
            raise ValueError("bad shard")
        case "die" | "always die":
            os._exit(3)
        case "full":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        case "quota":
            raise OSError(errno.EDQUOT, os.strerror(errno.EDQUOT))
        case "read-only":
            raise OSError(errno.EROFS, os.strerror(errno.EROFS))
        case "slow":
            time.sleep(60)
    doubled = call_isolated(double, task.number, 120).value
    write_part(task.part, [Clip(f"{task.number}-{row}", "x", frames=doubled or 0) for row in range(2)])
    advance()
    advance()


def tasks(folder: Path, count: int = 4, **trouble: str) -> list[Task]:
    folder.mkdir(parents=True, exist_ok=True)
    return [Task(index, folder / part_name(index), trouble.get(f"t{index}", "")) for index in range(count)]


def statuses(folder: Path) -> list[tuple[str, str, int]]:
    lines = [json.loads(line) for line in (folder / STATUS).read_text().splitlines()]
    return sorted((line["shard"], line["status"], line["attempt"]) for line in lines)


@pytest.fixture(autouse=True)
def importable(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray's workers find this file's functions as this process does."""
    monkeypatch.setenv("PYTHONPATH", f"{ROOT}:{Path(__file__).parent}")


@pytest.fixture(scope="module")
def ended_ray() -> Iterator[None]:
    """It would take a gigabyte until all tests are done."""
    yield
    import ray

    ray.shutdown()


@pytest.fixture
def started(request: pytest.FixtureRequest, importable: None, ended_ray: None) -> None:
    """A Ray that runs already, for tests by Ray; one for all, as starting takes seconds."""
    import ray

    if request.getfixturevalue("kind") == "ray" and not ray.is_initialized():
        ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)


@pytest.mark.parametrize("kind", KINDS)
def test_every_way_gives_the_same_bytes_and_tries_again(tmp_path: Path, kind: str) -> None:
    run_shards(work, tasks(tmp_path / "one"), ExecutorConfig(kind="sequential"), 1, "working")
    run_shards(work, tasks(tmp_path / "two", t1="raise"), ExecutorConfig(kind=kind), 2, "working", items=8)
    for index in range(4):
        name = part_name(index)
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
    assert [clip.frames for clip in read_manifest(tmp_path / "two")] == [0, 0, 2, 2, 4, 4, 6, 6]
    assert statuses(tmp_path / "two") == [
        ("00000", "done", 1),
        ("00001", "done", 2),
        ("00001", "failed", 1),
        ("00002", "done", 1),
        ("00003", "done", 1),
    ]


@pytest.mark.usefixtures("started")
@pytest.mark.parametrize("kind", ["pool", "ray"])
def test_a_worker_that_dies_is_replaced_and_its_shard_tried_again(tmp_path: Path, kind: str) -> None:
    run_shards(work, tasks(tmp_path, t0="die"), ExecutorConfig(kind=kind), 2, "working")
    assert ("00000", "failed", 1) in statuses(tmp_path)
    assert len(read_manifest(tmp_path)) == 8


@pytest.mark.usefixtures("started")
@pytest.mark.parametrize(
    ("kind", "trouble", "reason"),
    [
        ("sequential", "always raise", "bad shard"),
        ("pool", "always raise", "bad shard"),
        ("pool", "always die", "crashed: the worker ended with code 3"),
        ("ray", "always die", "crashed: the worker ended with code 3"),
    ],
)
def test_a_shard_that_always_fails_is_named_and_the_others_are_done(
    tmp_path: Path, kind: str, trouble: str, reason: str
) -> None:
    with pytest.raises(StepError, match=rf"1 of 4 shards failed \(manifest-00002: {reason}\)"):
        run_shards(work, tasks(tmp_path, t2=trouble), ExecutorConfig(kind=kind), 2, "working")
    assert sorted(path.name for path in tmp_path.glob("*.parquet")) == [part_name(index) for index in (0, 1, 3)]
    before = len(statuses(tmp_path))
    run_shards(work, tasks(tmp_path), ExecutorConfig(kind=kind), 2, "working")
    assert len(statuses(tmp_path)) == before + 1  # only the missing one
    run_shards(work, tasks(tmp_path), ExecutorConfig(kind=kind), 2, "working")
    assert len(statuses(tmp_path)) == before + 1


@pytest.mark.usefixtures("started")
@pytest.mark.parametrize("kind", KINDS)
def test_a_full_disk_is_not_tried_again(tmp_path: Path, kind: str) -> None:
    with pytest.raises(OSError, match="No space left") as caught:
        run_shards(work, tasks(tmp_path, t0="full"), ExecutorConfig(kind=kind), 2, "working")
    assert caught.value.errno == 28
    assert ("00000", "done", 2) not in statuses(tmp_path)


@pytest.mark.parametrize("trouble", ["full", "quota", "read-only"])
def test_no_shard_is_begun_after_the_disk_took_no_more(tmp_path: Path, trouble: str) -> None:
    with pytest.raises(OSError, match=r"No space|quota|Read-only"):
        run_shards(work, tasks(tmp_path, t1=trouble), ExecutorConfig(kind="sequential"), 1, "working")
    assert sorted(path.stem for path in tmp_path.glob("*.tried")) == ["manifest-00000", "manifest-00001"]
    assert statuses(tmp_path) == [("00000", "done", 1), ("00001", "failed", 1)]
    run_shards(work, tasks(tmp_path), ExecutorConfig(kind="sequential"), 1, "working")
    assert len(read_manifest(tmp_path)) == 8


PROGRAM = """
import sys
from pathlib import Path
from opensora.config import ExecutorConfig
from opensora.data.executor import run_shards
from tests.data.test_executor import tasks, work
if __name__ == "__main__":
    found = tasks(Path(sys.argv[1]), t2="slow", t3="slow")
    run_shards(work, found, ExecutorConfig(kind=sys.argv[2]), 2, "working")
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_a_stopped_run_leaves_whole_parts_no_processes_and_goes_on(tmp_path: Path, number: int) -> None:
    (tmp_path / "program.py").write_text(PROGRAM)
    folder = tmp_path / "work"
    command = [sys.executable, str(tmp_path / "program.py"), str(folder), "pool"]
    child = subprocess.Popen(
        command, env=os.environ | {"PYTHONPATH": str(ROOT)}, start_new_session=True, stderr=subprocess.PIPE, text=True
    )
    deadline = time.monotonic() + 240
    with killed_in_the_end(child):
        while not all((folder / part_name(index)).with_suffix(".tried").exists() for index in range(4)):
            assert child.poll() is None
            assert time.monotonic() < deadline, "not every shard was begun"
            time.sleep(0.05)
        os.kill(child.pid, number)
        _, said = child.communicate(timeout=120)
        assert said.count("Traceback") <= 1  # its own alone, not one a worker
        while group_is_alive(child.pid):
            assert time.monotonic() < deadline, "a worker outlived the run"
            time.sleep(0.1)
    assert sorted(path.name for path in folder.glob("*.parquet*")) == [part_name(0), part_name(1)]
    run_shards(work, tasks(folder), ExecutorConfig(), 2, "working")
    assert len(read_manifest(folder)) == 8


def group_is_alive(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True
