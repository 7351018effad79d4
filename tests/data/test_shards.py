"""Shards: found by offset, whole under their final name, readable by any tar."""

import tarfile
from pathlib import Path

import pytest

from opensora.data.shards import ShardWriter, read_clip
from opensora.manifest import Clip
from opensora.step import StepError


def write(folder: Path, count: int, size: int, limit_mib: int) -> list[tuple[Clip, bytes]]:
    writer = ShardWriter(folder, limit_mib)
    clips = []
    for index in range(count):
        data = bytes([index]) * size
        shard, offset, length = writer.add(f"clip{index}", data, {"n": index})
        clips.append((Clip(f"clip{index}", "x", shard=shard, offset=offset, size=length), data))
    writer.close()
    return clips


def test_every_clip_comes_back_over_several_shards(tmp_path: Path) -> None:
    clips = write(tmp_path, 5, 700_000, 1)
    assert len({clip.shard for clip, _ in clips}) == 5
    assert all(read_clip(tmp_path, clip) == data for clip, data in clips)


def test_a_shard_is_an_ordinary_tar(tmp_path: Path) -> None:
    clips = write(tmp_path, 3, 1000, 1)
    with tarfile.open(tmp_path / clips[0][0].shard) as tar:
        assert tar.getnames() == [f"clip{index}.{kind}" for index in range(3) for kind in ("mp4", "json")]


def test_a_shard_being_written_has_no_final_name(tmp_path: Path) -> None:
    writer = ShardWriter(tmp_path, 1)
    writer.add("clip", b"x", {})
    assert [path.suffix for path in tmp_path.iterdir()] == [".part"]
    writer.close()
    assert [path.suffix for path in tmp_path.iterdir()] == [".tar"]


def test_missing_and_short_shards_are_named(tmp_path: Path) -> None:
    ((clip, _),) = write(tmp_path, 1, 1000, 1)
    with (tmp_path / clip.shard).open("r+b") as handle:
        handle.truncate(600)
    with pytest.raises(StepError, match="shorter than the manifest says"):
        read_clip(tmp_path, clip)
    (tmp_path / clip.shard).unlink()
    with pytest.raises(StepError, match="is missing; run `opensora split` again"):
        read_clip(tmp_path, clip)
