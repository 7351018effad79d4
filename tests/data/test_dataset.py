"""Batches are a function of (seed, step, rank): resumable anywhere, never drawn twice."""

from itertools import islice

import pytest
import torch
from safetensors.torch import save_file

from opensora.data.dataset import LatentDataset, batches, draw_seed
from opensora.manifest import Clip
from opensora.step import StepError


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> LatentDataset:
    folder = tmp_path_factory.mktemp("encode")
    tensors, clips = {}, []
    for index in range(6):
        frames = torch.arange(10.0)[:, None, None, None].expand(10, 4, 2, 2) + 100 * index
        tensors[f"c{index}/8x8/mean"] = frames.half().contiguous()
        tensors[f"c{index}/8x8/std"] = torch.zeros(10, 4, 2, 2).half()
        tensors[f"c{index}/text"] = torch.ones(2 + index % 2, 5).half()
        clips.append(Clip(f"c{index}", "x", frames=10, latent_shard="s"))
    save_file(tensors, folder / "s")
    short = Clip("short", "x", frames=4, latent_shard="s")
    return LatentDataset(folder, [*clips, short], 8, 8, frames=3, interval=2, max_tokens=4)


def first(data: LatentDataset, count: int, rank: int = 0, world: int = 1, start: int = 0, seed: int = 0) -> list[dict]:
    return list(islice(batches(data, 2, seed, rank, world, start), count))


def test_crops_follow_the_interval_and_text_is_padded(data: LatentDataset) -> None:
    assert (len(data), data.excluded) == (6, 1)
    batch = first(data, 1)[0]
    assert batch["latent"].shape == (2, 4, 3, 2, 2)
    for latent, name in zip(batch["latent"], batch["clip_id"], strict=True):
        values = latent[0, :, 0, 0] - 100 * int(name[1:])
        assert (values.diff() == 2).all()
        assert 0 <= values[0] <= 5
    kept = batch["mask"].bool()
    assert (batch["text"][kept] == 1).all()
    assert (batch["text"][~kept] == 0).all()


def test_an_epoch_visits_every_clip_once_and_epochs_differ(data: LatentDataset) -> None:
    names = [name for batch in first(data, 6) for name in batch["clip_id"]]
    assert sorted(names[:6]) == sorted(names[6:]) == [f"c{index}" for index in range(6)]
    assert names[:6] != names[6:]


def test_resume_draws_the_same(data: LatentDataset) -> None:
    for whole, resumed in zip(first(data, 7)[4:], first(data, 3, start=4), strict=True):
        assert torch.equal(whole["latent"], resumed["latent"])
        assert whole["clip_id"] == resumed["clip_id"]


def test_ranks_share_an_epoch_without_overlap(data: LatentDataset) -> None:
    names = [batch["clip_id"] for rank in range(3) for batch in first(data, 1, rank=rank, world=3)]
    assert sorted(name for part in names for name in part) == [f"c{index}" for index in range(6)]


def test_another_seed_draws_differently(data: LatentDataset) -> None:
    assert [b["clip_id"] for b in first(data, 3)] != [b["clip_id"] for b in first(data, 3, seed=1)]


def test_clips_that_are_all_too_short_are_an_error(data: LatentDataset) -> None:
    with pytest.raises(StepError, match="no clip has the 41 frames"):
        LatentDataset(data.folder, data.clips, 8, 8, frames=21, interval=2, max_tokens=4)


def test_no_two_draws_share_a_seed() -> None:
    seeds = {draw_seed(seed, step, rank) for seed in range(3) for step in range(50) for rank in range(8)}
    assert len(seeds) == 3 * 50 * 8
    assert max(seeds) < 1 << 32
