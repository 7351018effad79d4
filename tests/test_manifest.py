"""The manifest: what is written is read, and foreign files are refused by column."""

from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from opensora.manifest import (
    SCHEMA,
    VERSION_KEY,
    Clip,
    ManifestError,
    Span,
    Tally,
    count_rows,
    iterate_manifest,
    list_parts,
    manifest_hash,
    part_index,
    part_name,
    read_manifest,
    read_part,
    write_part,
)

CLIPS = [
    Clip("a", "x.mp4", scores={"motion": 0.5, "black": 0.0}, caption="a cat"),
    Clip("b", "y \n'ü.mp4", spans=(Span(0.0, 1.5, "one"), Span(1.5, 2.0))),
    Clip("c", "z.mp4", kept=False, reason="unreadable: no header"),
]


def test_what_is_written_is_read(tmp_path: Path) -> None:
    write_part(tmp_path / part_name(0), CLIPS)
    assert read_part(tmp_path / part_name(0)) == CLIPS
    assert not list(tmp_path.glob("*.part"))


def test_parts_are_read_in_order(tmp_path: Path) -> None:
    for index in (2, 0, 10):
        write_part(tmp_path / part_name(index), [replace(clip, clip_id=f"{clip.clip_id}{index}") for clip in CLIPS])
    (tmp_path / "manifest-00003.parquet.part").write_text("half written")
    assert [part_index(path) for path in list_parts(tmp_path)] == [0, 2, 10]
    assert [clip.clip_id for clip in iterate_manifest(tmp_path)] == [
        "a0",
        "b0",
        "c0",
        "a2",
        "b2",
        "c2",
        "a10",
        "b10",
        "c10",
    ]
    assert len(read_manifest(tmp_path)) == count_rows(tmp_path) == 9
    with pytest.raises(ManifestError, match="is not named as a part"):
        part_index(tmp_path / "x.parquet")


def test_the_hash_follows_the_rows(tmp_path: Path) -> None:
    write_part(tmp_path / part_name(0), CLIPS)
    before = manifest_hash(tmp_path)
    write_part(tmp_path / part_name(0), [replace(CLIPS[0], scores={"black": 0.0, "motion": 0.5}), *CLIPS[1:]])
    assert manifest_hash(tmp_path) == before  # the order of scores says nothing
    write_part(tmp_path / part_name(0), CLIPS[::-1])
    assert manifest_hash(tmp_path) != before


def test_an_empty_part(tmp_path: Path) -> None:
    write_part(tmp_path / part_name(0), [])
    assert read_manifest(tmp_path) == []


def test_drops_are_tallied_by_reason() -> None:
    tally = Tally().add(CLIPS).add(CLIPS[2:])
    assert (tally.total, tally.kept, dict(tally.dropped), tally.reasons) == (4, 2, {"unreadable": 2}, "2 unreadable")


def test_foreign_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / part_name(0)
    with pytest.raises(ManifestError, match="no manifest in"):
        read_manifest(tmp_path)
    with pytest.raises(ManifestError, match="run the step before"):
        read_part(path)
    path.write_text("not parquet")
    with pytest.raises(ManifestError, match="not a readable parquet"):
        read_part(path)
    pq.write_table(pa.table({"clip_id": ["a"]}), path)
    with pytest.raises(ManifestError, match="version none"):
        read_part(path)


def test_the_column_that_is_wrong_is_named(tmp_path: Path) -> None:
    path = tmp_path / part_name(0)
    write_part(path, CLIPS)
    table = pq.read_table(path)
    pq.write_table(table.drop_columns(["fps"]), path)
    with pytest.raises(ManifestError, match="lacks the column 'fps'"):
        read_part(path)
    wrong = table.set_column(SCHEMA.get_field_index("frames"), "frames", pa.array(["1", "2", "3"]))
    pq.write_table(wrong.replace_schema_metadata({VERSION_KEY: b"2"}), path)
    with pytest.raises(ManifestError, match="'frames' is string, expected int64"):
        read_part(path)
