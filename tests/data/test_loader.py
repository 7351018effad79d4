"""Loading: any number of workers reads the same from any position, also when they are killed on the way."""

import os
import signal
from collections.abc import Container
from contextlib import suppress
from itertools import islice

import psutil
import pytest
import torch

from opensora.data.buckets import Bucket, Plan
from opensora.data.dataset import LatentDataset
from opensora.data.loader import load_batches
from opensora.step import StepError
from tests.data.made_latents import BUCKETS, write_latents


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> LatentDataset:
    return LatentDataset(write_latents(tmp_path_factory.mktemp("encode")), BUCKETS, max_tokens=4)


def plan(data: LatentDataset, accumulate: int = 1) -> Plan:
    return Plan(data.clips, BUCKETS, 0, 2 // accumulate, accumulate)


def read(
    data: LatentDataset, start: int = 0, steps: int = 12, workers: int = 0, rank: int = 0, skip: Container[int] = ()
) -> list[dict]:
    return list(load_batches(data, plan(data), rank, start=start, steps=steps, workers=workers, skip=skip))


def readers_now() -> set[psutil.Process]:
    children = psutil.Process().children(recursive=True)
    found = set()
    for child in children:
        with suppress(psutil.NoSuchProcess):
            if "spawn_main" in " ".join(child.cmdline()):
                found.add(child)
    return found


def same(one: list[dict], other: list[dict]) -> bool:
    for first, second in zip(one, other, strict=True):
        assert first.keys() == second.keys()
        for name, value in first.items():
            assert torch.equal(value, second[name]) if isinstance(value, torch.Tensor) else value == second[name]
    return True


def test_workers_change_nothing_at_any_position(data: LatentDataset) -> None:
    whole = read(data, rank=1)
    assert [batch["position"] for batch in whole] == list(range(12))
    assert same(read(data, 3, 8, workers=2, rank=1, skip={5}), [*whole[3:5], *whole[6:12]])


def test_ranks_do_not_overlap(data: LatentDataset) -> None:
    seeds = [seed for rank in range(2) for batch in read(data, steps=40, rank=rank) for seed in batch["noise_seed"]]
    assert len(set(seeds)) == len(seeds)


def test_a_missing_tensor_is_named_from_a_worker_too(data: LatentDataset) -> None:
    buckets = [BUCKETS[0], Bucket(2, 8, 12, 1)]
    other = LatentDataset(data.clips.folder, buckets, max_tokens=4)
    for workers in (0, 1):
        with pytest.raises(StepError, match=r"l has no tensor c\d/8x12/mean; run `opensora encode` again") as caught:
            list(load_batches(other, Plan(other.clips, buckets, 0, 1), 0, start=0, steps=20, workers=workers))
        assert "Traceback" not in str(caught.value)


def test_workers_that_are_killed_are_replaced_and_no_sample_changes(
    data: LatentDataset, caplog: pytest.LogCaptureFixture
) -> None:
    expected = list(load_batches(data, plan(data, 2), 0, start=2, steps=20, skip={4}))
    before = readers_now()
    batches = load_batches(data, plan(data, 2), 0, start=2, steps=10**6, workers=2, restarts=1, skip={4})
    found = list(islice(batches, 3))  # a step and a half
    kill_all_but_one(readers_now() - before)
    found += islice(batches, 37)
    assert same(found, expected)
    (record,) = caplog.records
    assert record.getMessage().startswith("a process that reads training data died (")
    readers = readers_now() - before
    kill_all_but_one(readers)
    with pytest.raises(StepError, match=r"a process that reads training data died \(.*\), after 1 that were replaced"):
        list(batches)
    _, alive = psutil.wait_procs(readers, timeout=60)
    assert not alive


def kill_all_but_one(readers: set[psutil.Process]) -> None:
    """By SIGKILL, as where memory runs out; nothing is raised here, in the middle of what would be a training step."""
    killed = sorted(readers, key=lambda reader: reader.pid)[1:]
    for reader in killed:
        os.kill(reader.pid, signal.SIGKILL)
    psutil.wait_procs(killed, timeout=60)


def test_workers_leave_ctrl_c_to_the_training_process(data: LatentDataset, capfd: pytest.CaptureFixture) -> None:
    before = readers_now()
    batches = load_batches(data, plan(data), 0, start=0, steps=200, workers=1)
    first = [next(batches)]
    (reader,) = readers_now() - before
    for number in (signal.SIGINT, signal.SIGTERM):
        os.kill(reader.pid, number)
    assert same(first + list(islice(batches, 50)), read(data, steps=51))
    batches.close()
    psutil.wait_procs([reader], timeout=60)
    assert not reader.is_running()
    assert capfd.readouterr().err == ""
