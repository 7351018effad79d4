"""Training samples straight from clips: the frames that a draw names, and a bad clip or shard by its name."""

import pickle
from pathlib import Path

import numpy as np
import pytest
import torch

from opensora.data.buckets import Bucket, Draw, Plan
from opensora.data.clip_dataset import ClipDataset
from opensora.data.clip_reader import scaled_frames
from opensora.data.loader import load_batches
from opensora.data.shards import read_clip
from opensora.manifest import read_manifest
from opensora.step import StepError
from tests.data.made_clips import encode, write_split

BUCKETS = [Bucket(3, 16, 24, 2, interval=4), Bucket(1, 16, 24, 2)]


@pytest.fixture
def split(tmp_path: Path) -> Path:
    """Four clips of 40 frames of 32x48 pixels in two shards."""
    random = np.random.default_rng(0)
    made = []
    for index in range(4):
        frames = list(random.integers(0, 256, (40, 32, 48, 3), np.uint8))
        made.append(encode(frames, clip_id=f"c{index}", caption=f"words {index}"))
    return write_split(tmp_path / "split", [made[:2], made[2:]])


@pytest.fixture
def data(split: Path) -> ClipDataset:
    return ClipDataset(split, split, BUCKETS)


def test_a_sample_is_the_crop_that_its_draw_names(data: ClipDataset, split: Path) -> None:
    rows = {clip.clip_id: clip for clip in read_manifest(split)}
    starts = set()
    for epoch in range(6):
        for bucket in range(2):
            draw = Draw(epoch % 4, bucket, (0, epoch, bucket, 0))
            sample = data.sample(draw, data.clips.row(draw.row))
            clip = rows[sample["clip_id"]]
            whole = [frame for (frame,) in scaled_frames(read_clip(split, clip), [(16, 24)])]
            crop = draw.crop(40, BUCKETS[bucket])
            assert sample["frames"].dtype == torch.uint8
            assert np.array_equal(sample["frames"].numpy(), np.stack(whole[crop]))
            assert (sample["caption"], sample["noise_seed"]) == (clip.caption, draw.noise_seed)
            assert sample["draw"] == draw
            starts.add(crop.start)
    assert len(starts) > 6


def test_batches_of_videos_and_single_frames(data: ClipDataset) -> None:
    plan = Plan(data.clips, BUCKETS, 0, 1, accumulate=2, image_share=0.5)
    batches = list(load_batches(data, plan, 0, start=0, steps=6))
    assert {tuple(batch["frames"].shape) for batch in batches} == {(2, 3, 16, 24, 3), (2, 1, 16, 24, 3)}
    for first, second in zip(batches[::2], batches[1::2], strict=True):
        assert first["frames"].shape == second["frames"].shape
        assert first["clip_id"] + second["clip_id"] == plan.clip_ids(first["position"])


def test_another_process_gets_no_table(data: ClipDataset) -> None:
    there = pickle.loads(pickle.dumps(data))
    assert there.clips is None
    draw, clip = Draw(1, 0, (0, 0, 0, 0)), data.clips.row(1)
    assert torch.equal(there.sample(draw, clip)["frames"], data.sample(draw, clip)["frames"])


def test_a_shard_that_is_missing_short_or_unreadable_is_named(data: ClipDataset, split: Path) -> None:
    clip = data.clips.row(3)
    path = split / clip["shard"]
    draw, whole = Draw(3, 0, (0, 0, 0, 0)), path.read_bytes()
    path.write_bytes(whole[: clip["offset"] + 10])
    with pytest.raises(StepError, match=rf"shard {path} is shorter than the manifest says \(clip c3\)"):
        data.sample(draw, clip)
    path.unlink()
    with pytest.raises(StepError, match=rf"shard {path} of clip c3 is missing; run `opensora split` again"):
        data.sample(draw, clip)
    path.mkdir()
    with pytest.raises(StepError, match=rf"shard {path} of clip c3 cannot be read: .*directory"):
        data.sample(draw, clip)


def test_a_clip_that_does_not_decode_is_named(data: ClipDataset, split: Path) -> None:
    clip = data.clips.row(2)
    path = split / clip["shard"]
    whole = bytearray(path.read_bytes())
    whole[clip["offset"] : clip["offset"] + clip["size"]] = bytes(clip["size"])
    path.write_bytes(whole)
    with pytest.raises(StepError, match=rf"clip c2 in {path} cannot be decoded: .*; run `opensora split` again"):
        data.sample(Draw(2, 0, (0, 0, 0, 0)), clip)


def test_a_clip_with_fewer_frames_than_its_row_says_is_named(data: ClipDataset) -> None:
    clip = data.clips.row(2) | {"frames": 60}
    draw = next(d for d in (Draw(2, 0, (0, epoch, 0, 0)) for epoch in range(99)) if d.crop(60, BUCKETS[0]).stop > 41)
    with pytest.raises(StepError, match=r"clip c2 in .* cannot be decoded: it has 40 frames, and number \d+ was asked"):
        data.sample(draw, clip)
