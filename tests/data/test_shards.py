"""Shards: found by offset or key, whole under their final name, readable by any tar."""

import pickle
import tarfile
from pathlib import Path

import pytest
import torch

from opensora.data import shards
from opensora.data.shards import ShardWriter, TensorFiles, latent_names, read_clip, text_key, write_tensors
from opensora.manifest import Clip
from opensora.step import StepError


def write(folder: Path, count: int, size: int, limit_mib: int) -> list[tuple[Clip, bytes]]:
    writer = ShardWriter(folder, 3, limit_mib)
    clips = []
    for index in range(count):
        data = bytes([index]) * size
        shard, offset, length = writer.add(f"clip{index}", data, {"n": index})
        clips.append((Clip(f"clip{index}", "x", shard=shard, offset=offset, size=length), data))
    writer.close()
    return clips


def test_every_clip_comes_back_over_several_shards(tmp_path: Path) -> None:
    clips = write(tmp_path, 5, 700_000, 1)
    assert [clip.shard for clip, _ in clips] == [f"clips-00003-{number:02d}.tar" for number in range(5)]
    assert all(read_clip(tmp_path, clip) == data for clip, data in clips)


def test_a_shard_is_an_ordinary_tar(tmp_path: Path) -> None:
    clips = write(tmp_path, 3, 1000, 1)
    with tarfile.open(tmp_path / clips[0][0].shard) as tar:
        assert tar.getnames() == [f"clip{index}.{kind}" for index in range(3) for kind in ("mp4", "json")]


def test_a_shard_being_written_has_no_final_name(tmp_path: Path) -> None:
    writer = ShardWriter(tmp_path, 0, 1)
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


def test_names_of_tensors_are_what_the_docs_say() -> None:
    assert latent_names("c1", 36, 64) == ("c1/36x64/mean", "c1/36x64/std")
    assert text_key("a red circle") == text_key("a red circle") != text_key("a red square")
    assert len(text_key("")) == 16


def test_tensors_are_read_by_key_and_by_rows(tmp_path: Path) -> None:
    values = torch.arange(12.0).reshape(4, 3)
    write_tensors(tmp_path / "a", {"x": values, "y": values.T})  # .T is not contiguous
    files = TensorFiles(tmp_path)
    assert torch.equal(files.read("a", "x"), values)
    assert torch.equal(files.read("a", "y", slice(1, 3)), values.T[1:3])
    assert files.shape("a", "y") == [3, 4]
    assert torch.equal(pickle.loads(pickle.dumps(files)).read("a", "x"), values)
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_the_same_tensors_give_the_same_bytes(tmp_path: Path) -> None:
    tensors = {name: torch.full((2,), float(index)) for index, name in enumerate("abc")}
    write_tensors(tmp_path / "one", tensors)
    write_tensors(tmp_path / "other", dict(reversed(tensors.items())))
    assert (tmp_path / "one").read_bytes() == (tmp_path / "other").read_bytes()


def test_files_beyond_the_limit_are_closed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards, "OPEN_FILES", 2)
    for index in range(4):
        write_tensors(tmp_path / str(index), {"x": torch.tensor([index])})
    files = TensorFiles(tmp_path)
    for index in (0, 1, 2, 3, 0, 3):
        assert files.read(str(index), "x").item() == index
    assert len(files._open) == 2


def test_missing_and_damaged_files_and_tensors_are_named(tmp_path: Path) -> None:
    write_tensors(tmp_path / "a", {"x": torch.zeros(100)})
    files = TensorFiles(tmp_path)
    with pytest.raises(StepError, match="a has no tensor c1/8x8/mean; run `opensora encode` again"):
        files.read("a", "c1/8x8/mean")
    with pytest.raises(StepError, match="b is missing, which holds x"):
        files.read("b", "x")
    (tmp_path / "c").write_bytes((tmp_path / "a").read_bytes()[:-8])
    with pytest.raises(StepError, match="c is damaged"):
        files.read("c", "x")
