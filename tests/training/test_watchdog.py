"""The watchdog: it says where a process stands, also in a collective, and says nothing while steps end."""

import logging
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from opensora.training.watchdog import Watchdog
from tests.conftest import ROOT

# One process goes on waiting in a collective that the other, which stands in a read, does not enter.
STALL = """
import datetime, logging, os, sys, threading
from pathlib import Path
import torch.distributed as dist
from opensora.training.watchdog import Watchdog
logging.basicConfig(format="%(message)s")
folder, rank = Path(sys.argv[1]), int(sys.argv[2])
dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
dist.barrier()
def read_a_clip():
    sys.stdin.read()
with Watchdog(2, rank, folder) as watchdog:
    watchdog.beat(41)
    dist.barrier() if rank == 0 else read_a_clip()
if rank:
    dist.barrier()
"""


def wait_for(condition: Callable[[], bool], limit_s: float = 90.0) -> None:
    deadline = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < deadline, "never came true"
        time.sleep(0.02)


def test_every_process_says_where_it_stands_also_in_a_collective(tmp_path: Path) -> None:
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", STALL, str(tmp_path), str(rank)],
            stdin=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | {"PYTHONPATH": str(ROOT)},
        )
        for rank in range(2)
    ]
    try:
        files = [tmp_path / f"stalled-rank-{rank}.txt" for rank in range(2)]
        wait_for(lambda: all(path.is_file() and "after step 41\n\nThread" in path.read_text() for path in files))
        lines = [process.communicate("", timeout=60)[1] for process in reversed(processes)][::-1]
        assert [process.returncode for process in processes] == [0, 0], lines
        stacks = [path.read_text() for path in files]
    finally:
        for process in processes:
            process.kill()
            process.wait(60)
    for rank, (stack, line) in enumerate(zip(stacks, lines, strict=True)):
        assert stack.startswith(f"rank {rank}: no step for 2 s after step 41\n")
        assert "Thread MainThread (training), innermost call last:" in stack
        assert f"rank {rank}: no step for 2 s after step 41; it is in " in line
    assert "in barrier" in lines[0]
    assert "in barrier" in stacks[0]
    assert "read_a_clip" in stacks[1]
    assert "in read_a_clip (<string>" in lines[1]


def test_a_stall_is_named_once_and_another_one_again(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with Watchdog(0.01, 3, tmp_path) as watchdog:
        wait_for(lambda: len(caplog.records) == 1)
        watchdog.beat(7)
        wait_for(lambda: len(caplog.records) == 2)
    first, second = (record.getMessage() for record in caplog.records)
    assert first.startswith("rank 3: no step for 0.01 s after step 0; it is in ")
    assert second.startswith("rank 3: no step for 0.01 s after step 7; it is in ")
    assert str(tmp_path / "stalled-rank-3.txt") in second
    assert caplog.records[0].levelno == logging.ERROR


def test_steps_that_end_in_time_and_clocks_that_jump_name_nobody(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [1000.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    monkeypatch.setattr(time, "time", lambda: -1e9)
    with Watchdog(60, 0, tmp_path) as watchdog:
        for step in range(100):
            now[0] += 59
            watchdog.beat(step)
    assert not list(tmp_path.iterdir())
    assert not caplog.records
    assert "watchdog" not in {thread.name for thread in threading.enumerate()}


def test_a_place_that_cannot_be_written_still_names_the_process(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with Watchdog(0.01, 0, tmp_path / "gone"):
        wait_for(lambda: bool(caplog.records))
    assert "cannot be written to" in caplog.records[0].getMessage()
