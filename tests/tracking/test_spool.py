"""The spool: lines whole or absent, whatever is killed or full, and marks by store."""

import json
import logging
from pathlib import Path

import pytest

from opensora.tracking.spool import SPOOL, SpoolReader, SpoolWriter, count_records
from tests.small_disk import small_disk


def entry(number: int, size: int = 0) -> dict:
    return {"kind": "metrics", "time": number, "text": "x" * size}


def write(place: Path, *numbers: int) -> None:
    writer = SpoolWriter(place)
    for number in numbers:
        writer.append(entry(number))
    assert writer.close() == 0


def times(reader: SpoolReader) -> list[int | None]:
    return [record["time"] if record else None for record, _ in reader.lines()]


@pytest.mark.parametrize("torn", ['{"kind": "met', "\x00\x00", '{"kind": "metrics"}', "7"])
def test_half_a_line_spoils_neither_the_next_nor_the_rest(tmp_path: Path, torn: str) -> None:
    write(tmp_path, 1, 2)
    with (tmp_path / SPOOL).open("a") as handle:
        handle.write(torn)
    assert times(SpoolReader(tmp_path, "a")) == [1, 2]  # it may still be written
    write(tmp_path, 3)
    assert times(SpoolReader(tmp_path, "a")) == [1, 2, None, 3]


def test_each_store_has_its_own_mark(tmp_path: Path) -> None:
    write(tmp_path, 1, 2, 3)
    reader = SpoolReader(tmp_path, "a")
    reader.mark(list(reader.lines())[1][1])
    assert times(SpoolReader(tmp_path, "a")) == [3]
    assert times(SpoolReader(tmp_path, "b")) == [1, 2, 3]


def test_a_mark_behind_the_end_or_unreadable_does_not_hide_records(tmp_path: Path) -> None:
    write(tmp_path, 1)
    SpoolReader(tmp_path, "a").mark(10**6)  # a machine went down, and the file is shorter than it was
    write(tmp_path, 2)
    assert SpoolReader(tmp_path, "a").sent <= (tmp_path / SPOOL).stat().st_size
    (tmp_path / "sent.json").write_text("{")
    assert times(SpoolReader(tmp_path, "a")) == [1, 2]


def test_a_full_disk_is_said_once_and_loses_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with small_disk(tmp_path / "disk", "64k") as disk, caplog.at_level(logging.WARNING):
        writer = SpoolWriter(disk / "place")
        for number in range(200):
            writer.append(entry(number, size=1000))
        assert len(caplog.records) == 1
        assert "training goes on" in caplog.text
        lines = (disk / "place" / SPOOL).read_bytes().splitlines(keepends=True)
        assert 0 < len(lines) < 100
        assert all(json.loads(line)["time"] == number for number, line in enumerate(lines))  # none is torn
        assert writer.close() == 200 - len(lines)


def test_records_in_memory_follow_when_there_is_room_again(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", "256k") as disk:
        ballast = disk / "ballast"
        try:
            ballast.write_bytes(b"x" * 10**6)
        except OSError:
            assert ballast.exists()
        writer = SpoolWriter(disk)
        for number in range(50):
            writer.append(entry(number, size=1000))
        ballast.unlink()
        writer.append(entry(50))
        assert writer.close() == 0
        assert times(SpoolReader(disk, "a")) == list(range(51))


def test_a_place_that_cannot_be_written_raises_nothing(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    writer = SpoolWriter(tmp_path / "file" / "place")
    writer.append(entry(1))
    assert writer.close() == 1
    assert count_records(tmp_path / "file2") == 0
