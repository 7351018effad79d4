"""Buckets and plans: full batches of one shape, no draw twice, and any position restored exactly."""

import json
from collections import Counter
from itertools import islice
from pathlib import Path

import numpy as np
import pytest

from opensora.data.buckets import CROP, Bucket, Draw, Plan, assign, draw_seed
from opensora.data.clip_table import ClipTable
from opensora.manifest import Clip, ManifestError, part_name, write_part
from opensora.step import StepError

WIDE, TALL, LONG = Bucket(4, 36, 64, 3), Bucket(4, 64, 36, 2), Bucket(8, 36, 64, 2, interval=2)


def table(folder: Path, clips: list[Clip], parts: int = 1) -> ClipTable:
    folder.mkdir(parents=True, exist_ok=True)
    for index in range(parts):
        write_part(folder / part_name(index), clips[index::parts])
    return ClipTable(folder)


def clips(count: int, frames: int = 10, height: int = 36, width: int = 64, name: str = "c") -> list[Clip]:
    return [Clip(f"{name}{index}", "x", frames=frames, height=height, width=width) for index in range(count)]


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> ClipTable:
    """17 wide clips and 7 tall ones for `WIDE` and `TALL`, 11 long ones for `LONG`."""
    rows = clips(17) + clips(7, height=64, width=36, name="t") + clips(11, frames=15, name="l")
    return table(tmp_path_factory.mktemp("mixed"), rows)


def drawn(plan: Plan, steps: int, world: int = 1, start: int = 0) -> list[list[Draw]]:
    """The global batches of some steps: the ranks' parts in order."""
    parts = [list(islice(plan.batches(rank, start), steps)) for rank in range(world)]
    return [[draw for part in batch for draw in part] for batch in zip(*parts, strict=True)]


def test_a_clip_goes_where_least_is_cut_away(tmp_path: Path) -> None:
    square, small = Bucket(4, 36, 36, 1), Bucket(4, 18, 32, 1)
    rows = [
        Clip("wide", "x", frames=10, height=36, width=64),
        Clip("nearly square", "x", frames=10, height=40, width=44),
        Clip("tall", "x", frames=10, height=64, width=36),
        Clip("long", "x", frames=15, height=72, width=128),
        Clip("low", "x", frames=10, height=20, width=36),
        Clip("short", "x", frames=3, height=72, width=128),
        Clip("tiny", "x", frames=10, height=10, width=10),
        Clip("a little small", "x", frames=10, height=33, width=58),
    ]
    buckets = [square, small, TALL, WIDE, LONG]
    found, reasons = assign(buckets, table(tmp_path, rows))
    chosen = [buckets[index] if index >= 0 else None for index in found]
    assert chosen == [WIDE, square, TALL, LONG, small, None, None, WIDE]
    assert reasons == {"too short": 1, "too small": 1}


def test_batches_are_full_and_of_one_bucket_on_all_ranks(mixed: ClipTable) -> None:
    plan = Plan(mixed, [WIDE, TALL, LONG], 0, 2)
    for batch in drawn(plan, 60, 2):
        (index,) = {draw.bucket for draw in batch}
        assert len(batch) == 2 * plan.buckets[index].batch_size
    names = {(draw.bucket, mixed.text("clip_id", draw.row)[0]) for batch in drawn(plan, 60, 2) for draw in batch}
    assert names == {(0, "c"), (1, "t"), (2, "l")}


def test_every_clip_comes_once_an_epoch_and_what_is_left_over_comes_first_in_the_next(mixed: ClipTable) -> None:
    plan = Plan(mixed, [WIDE, TALL, LONG], 0, 2)
    epochs = 12  # 17 x 12 is a multiple of 6, 7 x 12 and 11 x 12 are of 4: nothing is left over
    batches = drawn(plan, plan.steps_before(epochs), 2)
    rows = Counter(draw.row for batch in batches for draw in batch)
    assert rows == dict.fromkeys(range(35), epochs)
    by_epoch = Counter((draw.row, draw.seed[1]) for batch in batches for draw in batch)
    assert set(by_epoch.values()) == {1}
    first = drawn(plan, plan.steps_before(1), 2)
    assert len(first) == 17 // 6 + 7 // 4 + 11 // 4
    assert [d.row for b in first for d in b] != [d.row for b in drawn(plan, len(first), 2, len(first)) for d in b]


def test_buckets_are_shuffled_together(mixed: ClipTable) -> None:
    order = [batch[0].bucket for batch in drawn(Plan(mixed, [WIDE, TALL, LONG], 0, 1), 40)]
    assert sum(one != other for one, other in zip(order, order[1:], strict=False)) > 12


def test_no_two_draws_of_a_run_are_the_same(mixed: ClipTable) -> None:
    plan = Plan(mixed, [WIDE, TALL, LONG], 3, 3)
    draws = [draw for batch in drawn(plan, 400, 3) for draw in batch]
    assert len({draw.seed for draw in draws}) == len(draws)
    crops = {tuple(draw.random(CROP).integers(2**63, size=2)) for draw in draws}
    assert len(crops) == len(draws)


@pytest.mark.parametrize("step", [1, 5, 6, 7, 23, 100, 1000])
def test_any_position_is_restored_exactly(mixed: ClipTable, step: int) -> None:
    whole = drawn(Plan(mixed, [WIDE, TALL, LONG], 1, 2), step + 9, 2)[step:]
    state = json.loads(json.dumps(Plan(mixed, [WIDE, TALL, LONG], 1, 2).state_dict(step)))
    resumed = Plan(mixed, [WIDE, TALL, LONG], 1, 2)
    assert drawn(resumed, 9, 2, resumed.load_state_dict(state)) == whole


def test_a_position_far_away_costs_no_more(mixed: ClipTable) -> None:
    plan = Plan(mixed, [WIDE, TALL, LONG], 0, 1)
    epoch = plan.epoch_of(10**15)
    assert plan.steps_before(epoch) <= 10**15 < plan.steps_before(epoch + 1)
    assert len(next(plan.batches(0, 10**15))) in {2, 3}


def test_the_samples_do_not_depend_on_the_number_of_processes(tmp_path: Path) -> None:
    rows = table(tmp_path, clips(13))
    one = drawn(Plan(rows, [Bucket(4, 36, 64, 6)], 0, 1), 26)
    three = drawn(Plan(rows, [Bucket(4, 36, 64, 2)], 0, 3), 26, 3)
    assert one == three


def test_a_position_in_another_plan_is_refused(mixed: ClipTable, tmp_path: Path) -> None:
    state = Plan(mixed, [WIDE], 0, 2).state_dict(7)
    other = table(tmp_path, clips(17))
    for plan, words in (
        (Plan(mixed, [WIDE], 1, 2), "another seed: 0, and this run has 1"),
        (Plan(mixed, [WIDE], 0, 1), "another number of processes: 2, and this run has 1"),
        (Plan(mixed, [TALL], 0, 2), "another clips or buckets"),
        (Plan(other, [WIDE], 0, 2), "another clips or buckets"),
    ):
        with pytest.raises(StepError, match=words):
            plan.load_state_dict(state)


def test_another_seed_draws_differently(mixed: ClipTable) -> None:
    one, other = (drawn(Plan(mixed, [WIDE, TALL, LONG], seed, 1), 9) for seed in (0, 1))
    assert [draw.row for batch in one for draw in batch] != [draw.row for batch in other for draw in batch]


def test_no_batch_at_all_is_an_error_that_says_what_to_change(tmp_path: Path) -> None:
    rows = clips(3) + clips(4, frames=3, name="s") + clips(5, height=9, width=16, name="low")
    with pytest.raises(StepError) as caught:
        Plan(table(tmp_path, rows), [WIDE, LONG], 0, 2)
    for words in (
        "from the 12 clips",
        "4 too short, 5 too small, 3 too few for a batch",
        "4x36x64 at interval 1 has 3 clips of 4 frames or more, and a batch takes 3 x 2 processes",
        "8x36x64 at interval 2 has 0 clips of 15 frames or more",
        "lower frames, frame_interval, height and width, batch_size or processes",
    ):
        assert words in str(caught.value)


def test_a_bucket_with_too_few_clips_is_counted(tmp_path: Path) -> None:
    plan = Plan(table(tmp_path, clips(9) + clips(1, height=64, width=36, name="t")), [WIDE, TALL], 0, 1)
    assert (len(plan), plan.excluded) == (9, {"too few for a batch": 1})
    assert {draw.bucket for batch in drawn(plan, 20) for draw in batch} == {0}


def test_every_start_of_a_crop_is_as_likely_as_another() -> None:
    bucket = Bucket(3, 8, 8, 1, interval=3)
    crops = [Draw(0, 0, (0, epoch, 0, 0)).crop(12, bucket) for epoch in range(1200)]
    starts = Counter(crop.start for crop in crops)
    assert set(starts) == set(range(6))  # a sample stretches over 7 of 12 frames
    assert min(starts.values()) > 140
    assert {tuple(np.diff(range(12)[crop])) for crop in crops} == {(3, 3)}


def test_a_table_holds_the_kept_clips_of_all_parts_in_order(tmp_path: Path) -> None:
    rows = [*clips(5), Clip("bad", "x", kept=False, reason="dark")]
    found = table(tmp_path, rows, parts=2)
    assert [found.text("clip_id", row) for row in range(len(found))] == ["c0", "c2", "c4", "c1", "c3"]
    assert found.identity != table(tmp_path / "other", rows).identity
    with pytest.raises(StepError, match="no clip is left"):
        table(tmp_path / "none", rows[-1:])
    with pytest.raises(ManifestError, match="no manifest in"):
        ClipTable(tmp_path / "empty")


def test_no_two_noise_seeds_are_the_same() -> None:
    seeds = {draw_seed(seed, step, rank) for seed in range(3) for step in range(50) for rank in range(8)}
    assert len(seeds) == 3 * 50 * 8
    assert max(seeds) < 1 << 32
