"""Refused records that are offered again: none is lost to a full disk, or to a process that sends meanwhile."""

import errno
import json
import os
from pathlib import Path

import pytest

from opensora.step import lock_file
from opensora.tracking.drain import SpoolState, retry_rejected
from opensora.tracking.spool import LOCK, SPOOL, SYSTEM, SpoolReader, SpoolWriter, read_rejected
from tests.small_disk import small_disk

COUNT = 20


def refuse(spool: Path, count: int = COUNT) -> None:
    """A spool of one record beside which others lie that were refused."""
    writer = SpoolWriter(spool)
    writer.append({"kind": "start", "time": 0})
    assert writer.close() == 0
    for number in range(count):
        SpoolReader(spool, "a").reject({"kind": "metrics", "time": number + 1, "text": "x" * 4000}, "why")


def times(spool: Path) -> list[int]:
    return [json.loads(line)["time"] for line in (spool / SPOOL).read_text().splitlines()]


def test_a_full_disk_keeps_what_was_refused(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", "256k") as disk:
        place = disk / "demo" / ".mlflow" / "abc" / "evaluate"
        refuse(place)
        ballast = disk / "ballast"
        with pytest.raises(OSError, match="No space left"):
            ballast.write_bytes(bytes(10**6))
        os.truncate(ballast, ballast.stat().st_size - 3 * 4096)  # there is room for some of them
        with pytest.raises(OSError, match="No space left") as caught:
            retry_rejected(disk)
        assert caught.value.errno == errno.ENOSPC
        assert len(read_rejected(place)) == COUNT
        assert times(place) == [0]
        ballast.unlink()
        assert retry_rejected(disk) == COUNT
        assert times(place) == list(range(COUNT + 1))
        assert read_rejected(place) == []
        assert retry_rejected(disk) == 0


def test_a_run_that_is_being_sent_is_left_alone_and_named(tmp_path: Path) -> None:
    place = tmp_path / "demo" / ".mlflow" / "abc" / "evaluate"
    refuse(place, 2)
    refuse(place / SYSTEM, 1)
    told: list[SpoolState] = []
    held = lock_file(place / LOCK)
    assert held
    with held:
        assert retry_rejected(tmp_path, told.append) == 0
    assert [(state.run, state.rejected, state.in_use) for state in told] == [("demo/abc/evaluate", 3, True)]
    assert retry_rejected(tmp_path, told.append) == 3
    assert len(told) == 1
    assert times(place) == [0, 1, 2]
    assert times(place / SYSTEM) == [0, 1]
