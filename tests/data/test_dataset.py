"""Latents and batches: crops follow the interval, the posterior is drawn from, and a missing or torn file is named."""

import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from opensora.data.buckets import Bucket, Draw, Plan
from opensora.data.dataset import LatentDataset
from opensora.data.loader import load_batches
from opensora.data.shards import write_tensors
from opensora.manifest import Clip, part_name, write_part
from opensora.step import StepError
from tests.data.made_latents import BUCKETS, write_latents


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_latents(tmp_path_factory.mktemp("encode"))


@pytest.fixture(scope="module")
def data(folder: Path) -> LatentDataset:
    return LatentDataset(folder, BUCKETS, max_tokens=4)


def read(data: LatentDataset, steps: int) -> list[dict]:
    return list(load_batches(data, Plan(data.clips, data.buckets, 0, 2), 0, start=0, steps=steps))


def test_crops_follow_the_interval_and_text_is_padded(data: LatentDataset) -> None:
    assert data.latent_size == (2, 2)
    shapes = set()
    for batch in read(data, 12):
        shapes.add(batch["latent"].shape)
        for latent, name in zip(batch["latent"], batch["clip_id"], strict=True):
            values = latent[0, :, 0, 0] - 100 * int(name[1:])
            assert (values.diff() == (2 if len(values) == 3 else 1)).all()
            assert 0 <= values[0] <= values[-1] <= 9
        kept = batch["mask"].bool()
        assert (batch["text"][kept] == 1).all()
        assert (batch["text"][~kept] == 0).all()
    assert shapes == {(2, 4, 3, 2, 2), (1, 4, 2, 2, 4)}


def test_latents_are_drawn_from_the_posterior(folder: Path, tmp_path: Path) -> None:
    for name in ("t", part_name(0)):
        (tmp_path / name).symlink_to(folder / name)
    shape = (10, 4, 2, 2)
    tensors = {f"c0/8x8/{name}": torch.full(shape, value) for name, value in (("mean", 3.0), ("std", 0.5))}
    write_tensors(tmp_path / "l", tensors)
    data = LatentDataset(tmp_path, BUCKETS, max_tokens=4)
    clip = data.clips.row(0)
    drawn = torch.stack([data.sample(Draw(0, 0, (0, epoch, 0, 0)), clip)["latent"] for epoch in range(400)])
    assert drawn.mean().item() == pytest.approx(3, abs=0.02)
    assert drawn.std().item() == pytest.approx(0.5, abs=0.02)
    assert len(drawn.unique(dim=0)) == 400


def test_large_data_is_read_by_rows_with_the_same_result(
    folder: Path, data: LatentDataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("opensora.data.dataset.KEEP_BYTES", 0)
    large = LatentDataset(folder, BUCKETS, max_tokens=4)
    for one, other in zip(read(large, 8), read(data, 8), strict=True):
        assert torch.equal(one["latent"], other["latent"])
        assert one["clip_id"] == other["clip_id"]
    assert not large._kept
    assert data._kept


def test_single_frames_and_videos_of_a_size_share_the_memory(folder: Path) -> None:
    data = LatentDataset(folder, [BUCKETS[0], Bucket(1, 8, 8, 2)], max_tokens=4)
    clip = data.clips.row(0)
    frames = [data.sample(Draw(0, bucket, (0, 0, bucket, 0)), clip)["latent"].shape[1] for bucket in range(2)]
    assert frames == [3, 1]
    assert data._kept is not None
    assert len(data._kept) == 2  # mean and deviation


def test_another_process_gets_neither_the_table_nor_the_latents(data: LatentDataset) -> None:
    read(data, 8)
    there = pickle.loads(pickle.dumps(data))
    assert (there.clips, there._kept) == (None, None)
    draw, clip = Draw(2, 0, (0, 0, 0, 0)), data.clips.row(2)
    assert torch.equal(there.sample(draw, clip)["latent"], data.sample(draw, clip)["latent"])
    assert len(pickle.dumps(data)) < 2000


def cut_short(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-50])


def garble(path: Path) -> None:
    path.write_bytes(b"\xff" * path.stat().st_size)


@pytest.mark.parametrize(("damage", "words"), [(Path.unlink, "missing"), (cut_short, "damaged"), (garble, "damaged")])
@pytest.mark.parametrize("name", ["l", "t"])
def test_a_missing_or_damaged_shard_is_named(
    tmp_path: Path, name: str, damage: Callable[[Path], None], words: str
) -> None:
    path = write_latents(tmp_path) / name
    damage(path)
    with pytest.raises(StepError, match=rf"{path} is {words}.*run `opensora encode` again"):
        read(LatentDataset(tmp_path, BUCKETS, max_tokens=4), 12)


def test_a_folder_without_kept_clips_is_an_error(tmp_path: Path) -> None:
    write_part(tmp_path / part_name(0), [Clip("a", "x", kept=False, reason="dark")])
    with pytest.raises(StepError, match="no clip is left in"):
        LatentDataset(tmp_path, BUCKETS, max_tokens=4)
