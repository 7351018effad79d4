"""The manifest: what is written is read, and foreign files are refused by column."""

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from opensora.manifest import SCHEMA, VERSION_KEY, Clip, ManifestError, drop_reasons, read_manifest, write_manifest

CLIPS = [
    Clip("a", "x.mp4", scores={"black": 0.25}, caption="a dog", kept=True),
    Clip("b", "y.mp4", kept=False, reason="unreadable: no moov"),
]


def test_round_trip(tmp_path: Path) -> None:
    write_manifest(tmp_path / "m.parquet", CLIPS)
    assert read_manifest(tmp_path / "m.parquet") == CLIPS
    assert [path.name for path in tmp_path.iterdir()] == ["m.parquet"]


def test_empty_manifest(tmp_path: Path) -> None:
    write_manifest(tmp_path / "m.parquet", [])
    assert read_manifest(tmp_path / "m.parquet") == []


def test_reasons_are_counted() -> None:
    assert drop_reasons(CLIPS) == {"unreadable": 1}


def test_foreign_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "m.parquet"
    with pytest.raises(ManifestError, match="run the step before"):
        read_manifest(path)
    path.write_text("no parquet")
    with pytest.raises(ManifestError, match="not a readable parquet"):
        read_manifest(path)
    pq.write_table(pa.table({"a": [1]}), path)
    with pytest.raises(ManifestError, match="version none, expected 1"):
        read_manifest(path)


def test_missing_and_mistyped_columns_are_named(tmp_path: Path) -> None:
    path = tmp_path / "m.parquet"
    write_manifest(path, CLIPS)
    table = pq.read_table(path)
    pq.write_table(table.drop_columns(["caption"]), path)
    with pytest.raises(ManifestError, match="lacks the column 'caption'"):
        read_manifest(path)
    index = SCHEMA.get_field_index("frames")
    pq.write_table(table.set_column(index, "frames", table["frames"].cast(pa.string())), path)
    with pytest.raises(ManifestError, match="column 'frames' is string"):
        read_manifest(path)
    assert VERSION_KEY in table.schema.metadata
