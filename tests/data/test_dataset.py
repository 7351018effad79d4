"""Latents and batches: crops follow the interval, and any number of workers reads the same from any position."""

import os
import signal
from itertools import islice
from pathlib import Path

import psutil
import pytest
import torch

from opensora.data.buckets import Bucket, Draw, Plan
from opensora.data.dataset import LatentDataset
from opensora.data.loader import load_batches
from opensora.data.shards import text_key, write_tensors
from opensora.manifest import Clip, part_name, write_part
from opensora.step import StepError

BUCKETS = [Bucket(3, 8, 8, 2, interval=2), Bucket(2, 8, 16, 1)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six square clips and three wide ones; frame `i` of clip `n` is 100·n + i everywhere, without deviation."""
    folder = tmp_path_factory.mktemp("encode")
    tensors, texts, clips = {}, {}, []
    for index in range(9):
        width = 8 if index < 6 else 16
        frames = torch.arange(10.0)[:, None, None, None].expand(10, 4, 2, width // 4) + 100 * index
        tensors[f"c{index}/8x{width}/mean"] = frames.half()
        tensors[f"c{index}/8x{width}/std"] = torch.zeros_like(frames).half()
        texts[text_key(f"t{index}")] = torch.ones(2 + index % 2, 5).half()
        about = {"frames": 10, "height": 8, "width": width, "caption": f"t{index}"}
        clips.append(Clip(f"c{index}", "x", **about, latent_shard="l", text_shard="t"))
    clips.append(Clip("short", "x", frames=4, height=8, width=8, latent_shard="l", text_shard="t"))
    write_tensors(folder / "l", tensors)
    write_tensors(folder / "t", texts)
    write_part(folder / part_name(0), clips)
    return folder


@pytest.fixture(scope="module")
def data(folder: Path) -> LatentDataset:
    return LatentDataset(folder, BUCKETS, max_tokens=4)


def read(data: LatentDataset, start: int, stop: int, workers: int = 0, rank: int = 0) -> list[dict]:
    plan = Plan(data.clips, BUCKETS, 0, 2)
    return list(load_batches(data, plan, rank, start, stop, workers))


def readers_now() -> set[psutil.Process]:
    children = psutil.Process().children(recursive=True)
    return {child for child in children if "spawn_main" in " ".join(child.cmdline())}


def same(one: list[dict], other: list[dict]) -> bool:
    for first, second in zip(one, other, strict=True):
        assert first.keys() == second.keys()
        for name, value in first.items():
            assert torch.equal(value, second[name]) if isinstance(value, torch.Tensor) else value == second[name]
    return True


def test_crops_follow_the_interval_and_text_is_padded(data: LatentDataset) -> None:
    assert data.latent_size == (2, 2)
    shapes = set()
    for batch in read(data, 0, 12):
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
    drawn = torch.stack([data.sample(Draw(0, 0, (0, epoch, 0, 0)))["latent"] for epoch in range(400)])
    assert drawn.mean().item() == pytest.approx(3, abs=0.02)
    assert drawn.std().item() == pytest.approx(0.5, abs=0.02)
    assert len(drawn.unique(dim=0)) == 400


def test_large_data_is_read_by_rows_with_the_same_result(
    folder: Path, data: LatentDataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("opensora.data.dataset.KEEP_BYTES", 0)
    large = LatentDataset(folder, BUCKETS, max_tokens=4)
    assert large._kept is None
    assert same(read(large, 0, 8), read(data, 0, 8))


@pytest.mark.parametrize("workers", [1, 2])
def test_workers_change_nothing_at_any_position(data: LatentDataset, workers: int) -> None:
    assert same(read(data, 3, 12, workers, rank=1), read(data, 0, 12, rank=1)[3:])


def test_ranks_do_not_overlap(data: LatentDataset) -> None:
    seeds = [seed for rank in range(2) for batch in read(data, 0, 40, rank=rank) for seed in batch["noise_seed"]]
    assert len(set(seeds)) == len(seeds)


def test_a_missing_tensor_is_named_from_a_worker_too(folder: Path) -> None:
    buckets = [BUCKETS[0], Bucket(2, 8, 12, 1)]
    data = LatentDataset(folder, buckets, max_tokens=4)
    for workers in (0, 1):
        with pytest.raises(StepError, match=r"l has no tensor c\d/8x12/mean; run `opensora encode` again") as caught:
            list(load_batches(data, Plan(data.clips, buckets, 0, 1), 0, 0, 20, workers))
        assert "Traceback" not in str(caught.value)


def test_a_worker_that_dies_is_an_error_that_says_so(data: LatentDataset) -> None:
    before = readers_now()
    batches = load_batches(data, Plan(data.clips, BUCKETS, 0, 2), 0, 0, 10**6, 2)
    next(batches)
    readers = list(readers_now() - before)
    os.kill(readers[0].pid, signal.SIGKILL)
    with pytest.raises(StepError, match="a process that reads training data died"):
        list(batches)
    _, alive = psutil.wait_procs(readers, timeout=20)
    assert not alive


def test_workers_leave_ctrl_c_to_the_training_process(data: LatentDataset, capfd: pytest.CaptureFixture) -> None:
    before = readers_now()
    batches = load_batches(data, Plan(data.clips, BUCKETS, 0, 2), 0, 0, 200, 1)
    first = [next(batches)]
    (reader,) = readers_now() - before
    for number in (signal.SIGINT, signal.SIGTERM):
        os.kill(reader.pid, number)
    assert same(first + list(islice(batches, 50)), read(data, 0, 51))
    batches.close()
    psutil.wait_procs([reader], timeout=20)
    assert not reader.is_running()
    assert capfd.readouterr().err == ""


def test_a_folder_without_kept_clips_is_an_error(tmp_path: Path) -> None:
    write_part(tmp_path / part_name(0), [Clip("a", "x", kept=False, reason="dark")])
    with pytest.raises(StepError, match="no clip is left in"):
        LatentDataset(tmp_path, BUCKETS, max_tokens=4)
