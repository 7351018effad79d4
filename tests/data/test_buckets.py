"""Buckets and plans: full batches of one shape, no draw twice, and any position restored exactly."""

import json
from collections import Counter
from collections.abc import Container
from hashlib import sha256
from itertools import islice
from pathlib import Path

import numpy as np
import pytest

from opensora.config import BucketConfig, ConfigError, TrainConfig
from opensora.data import clip_table
from opensora.data.buckets import CROP, Bucket, Draw, Plan, assign, draw_seed, stage_buckets
from opensora.data.clip_table import ClipTable
from opensora.manifest import Clip, ManifestError, part_name, write_part
from opensora.step import StepError

WIDE, TALL, LONG = Bucket(4, 36, 64, 3), Bucket(4, 64, 36, 2), Bucket(8, 36, 64, 2, interval=2)
PICTURE = Bucket(1, 36, 64, 5)
FIRST = [[28, 31, 34, 32], [24, 29, 28, 25], [7, 1, 5, 15, 10, 5], [17, 20, 17, 21]]  # clips from step 137 on


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


def drawn(plan: Plan, steps: int, start: int = 0, skip: Container[int] = ()) -> list[list[Draw]]:
    """The global batches of some steps: the ranks' shares in order."""
    parts = []
    for rank in range(plan.world_size):
        batches = list(islice(plan.batches(rank, start, skip), steps * plan.accumulate))
        parts.append([batches[step * plan.accumulate :][: plan.accumulate] for step in range(steps)])
    for shares in zip(*parts, strict=True):
        assert len({batch.position for share in shares for batch in share}) == 1
    return [
        [draw for share in shares for batch in share for draw in batch.draws] for shares in zip(*parts, strict=True)
    ]


def epoch_steps(plan: Plan, epochs: int) -> int:
    """Steps of the first epochs of a plan without single frames."""
    return plan._videos.batches_before(epochs)


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
    for batch in drawn(plan, 60):
        (index,) = {draw.bucket for draw in batch}
        assert len(batch) == 2 * plan.buckets[index].batch_size
    names = {(draw.bucket, mixed.text("clip_id", draw.row)[0]) for batch in drawn(plan, 60) for draw in batch}
    assert names == {(0, "c"), (1, "t"), (2, "l")}


def test_every_clip_comes_once_an_epoch_and_what_is_left_over_comes_first_in_the_next(mixed: ClipTable) -> None:
    plan = Plan(mixed, [WIDE, TALL, LONG], 0, 2)
    epochs = 12  # 17 x 12 is a multiple of 6, 7 x 12 and 11 x 12 are of 4: nothing is left over
    batches = drawn(plan, epoch_steps(plan, epochs))
    rows = Counter(draw.row for batch in batches for draw in batch)
    assert rows == dict.fromkeys(range(35), epochs)
    by_epoch = Counter((draw.row, draw.seed[1]) for batch in batches for draw in batch)
    assert set(by_epoch.values()) == {1}
    first = drawn(plan, epoch_steps(plan, 1))
    assert len(first) == 17 // 6 + 7 // 4 + 11 // 4
    assert [d.row for b in first for d in b] != [d.row for b in drawn(plan, len(first), len(first)) for d in b]


def test_buckets_are_shuffled_together(mixed: ClipTable) -> None:
    order = [batch[0].bucket for batch in drawn(Plan(mixed, [WIDE, TALL, LONG], 0, 1), 40)]
    assert sum(one != other for one, other in zip(order, order[1:], strict=False)) > 12


def test_no_two_draws_of_a_run_are_the_same(mixed: ClipTable) -> None:
    plan = Plan(mixed, [WIDE, TALL, LONG], 3, 3)
    draws = [draw for batch in drawn(plan, 400) for draw in batch]
    assert len({draw.seed for draw in draws}) == len(draws)
    crops = {tuple(draw.random(CROP).integers(2**63, size=2)) for draw in draws}
    assert len(crops) == len(draws)


@pytest.mark.parametrize("share", [0.0, 0.3])
@pytest.mark.parametrize("step", [1, 6, 23, 1000])
def test_any_position_is_restored_exactly(mixed: ClipTable, step: int, share: float) -> None:
    def plan() -> Plan:
        return Plan(mixed, [WIDE, TALL, LONG, PICTURE], 1, 2, accumulate=2, image_share=share)

    whole = drawn(plan(), step + 9)[step:]
    state = json.loads(json.dumps(plan().state_dict(step)))
    resumed = plan()
    assert drawn(resumed, 9, resumed.load_state_dict(state)) == whole


def test_a_position_far_away_costs_no_more(mixed: ClipTable) -> None:
    plan = Plan(mixed, [WIDE, TALL, LONG, PICTURE], 0, 1, image_share=0.25)
    far = 10**15
    epoch = plan._videos.epoch_of(far)
    assert plan._videos.batches_before(epoch) <= far < plan._videos.batches_before(epoch + 1)
    batch = next(plan.batches(0, far))
    assert (batch.position, len(batch.draws) in {2, 3, 5}) == (far, True)


def test_the_order_is_the_one_of_the_first_version(mixed: ClipTable) -> None:
    """Runs go on with another version of the code, and the demo's figures hold."""
    plan = Plan(mixed, [WIDE, TALL, LONG], 5, 2)
    found = [[draw.row for draw in batch] for batch in drawn(plan, 4, 137)]
    assert found == FIRST


def test_a_step_takes_the_same_samples_however_many_share_it(mixed: ClipTable) -> None:
    plans = []
    for world, accumulate in ((1, 1), (2, 1), (1, 2), (3, 2), (1, 6), (6, 1), (2, 3)):
        wide = Bucket(4, 36, 64, 12 // (world * accumulate))
        picture = Bucket(1, 36, 64, 6 // (world * accumulate))
        plans.append(Plan(mixed, [wide, picture], 0, world, accumulate, image_share=0.5))
    whole = drawn(plans[0], 30)
    assert {len(batch) for batch in whole} == {12, 6}
    state = json.loads(json.dumps(plans[0].state_dict(30)))
    for plan in plans[1:]:
        assert [Counter(batch) for batch in drawn(plan, 30)] == [Counter(batch) for batch in whole]
        assert plan.load_state_dict(state) == 30


def test_micro_batches_of_a_step_are_of_one_bucket_and_full(mixed: ClipTable) -> None:
    plan = Plan(mixed, [WIDE, TALL, LONG], 0, 1, accumulate=3)
    batches = list(islice(plan.batches(0), 90))
    for first in range(0, 90, 3):
        step = batches[first : first + 3]
        assert len({draw.bucket for batch in step for draw in batch.draws}) == 1
        assert {batch.position for batch in step} == {first // 3}
        assert {len(batch.draws) for batch in step} == {plan.buckets[step[0].draws[0].bucket].batch_size}


def test_a_position_in_another_plan_is_refused(mixed: ClipTable, tmp_path: Path) -> None:
    state = Plan(mixed, [WIDE, TALL], 0, 2).state_dict(7)
    other = table(tmp_path, clips(17) + clips(7, height=64, width=36))
    for plan, words in (
        (Plan(mixed, [WIDE, TALL], 1, 2), "another seed: 0, and this run has 1"),
        (Plan(mixed, [WIDE, TALL], 0, 1), "of 6, 4 samples, and this run has 3, 2: .* the product is 6, 4 again"),
        (Plan(mixed, [WIDE, LONG], 0, 2), "another list of buckets"),
        (Plan(mixed, [WIDE, TALL, PICTURE], 0, 2, image_share=0.1), "another list of buckets"),
        (Plan(other, [WIDE, TALL], 0, 2), "another list of clips"),
    ):
        with pytest.raises(StepError, match=words):
            plan.load_state_dict(state)
    state = Plan(mixed, [WIDE, PICTURE], 0, 2, image_share=0.2).state_dict(7)
    with pytest.raises(StepError, match="another image_share: 1/5, and this run has 1/10"):
        Plan(mixed, [WIDE, PICTURE], 0, 2, image_share=0.1).load_state_dict(state)


def test_positions_are_passed_over_on_all_processes(mixed: ClipTable) -> None:
    plan = Plan(mixed, [WIDE, TALL, LONG, PICTURE], 0, 2, accumulate=2, image_share=0.3)
    whole, skip = drawn(plan, 20), {0, 3, 4, 11}
    assert drawn(plan, 16, skip=skip) == [batch for position, batch in enumerate(whole) if position not in skip]
    assert [batch.position for batch in islice(plan.batches(1, 2, skip), 5)] == [2, 2, 5, 5, 6]


def test_the_clips_of_a_step_are_named_on_any_process(mixed: ClipTable) -> None:
    plan = Plan(mixed, [WIDE, TALL, LONG, PICTURE], 0, 2, accumulate=2, image_share=0.3)
    for position, batch in enumerate(drawn(plan, 12)):
        assert plan.clip_ids(position) == [mixed.text("clip_id", draw.row) for draw in batch]


@pytest.mark.parametrize("share", [0.1, 0.3, 1 / 3, 0.5, 0.75])
def test_images_take_their_share_of_the_steps_and_leave_the_videos_their_order(mixed: ClipTable, share: float) -> None:
    joint = drawn(Plan(mixed, [WIDE, TALL, PICTURE], 2, 1, image_share=share), 1200)
    images = [batch for batch in joint if batch[0].bucket == 2]
    videos = [batch for batch in joint if batch[0].bucket != 2]
    assert len(images) == round(1200 * share)
    assert abs(len([batch for batch in joint[:60] if batch[0].bucket == 2]) - 60 * share) <= 1
    assert videos == drawn(Plan(mixed, [WIDE, TALL], 2, 1), len(videos))
    rows = Counter(draw.row for batch in images for draw in batch)
    wide = [row for row in range(len(mixed)) if mixed.widths[row] == 64]
    assert set(rows) == set(wide)  # also those that are too short for some bucket of videos
    assert max(rows.values()) - min(rows.values()) <= 2  # of two epochs that batches of 5 run over
    assert len({draw.seed for batch in joint for draw in batch}) == sum(len(batch) for batch in joint)
    kinds = "".join(str(batch[0].bucket == 2)[0] for batch in joint)
    assert kinds[:600] != kinds[600:]  # no beat that something else could keep


def test_clips_too_short_for_videos_are_images(tmp_path: Path) -> None:
    rows = table(tmp_path, clips(6) + clips(4, frames=2, name="s") + clips(3, height=9, width=16, name="low"))
    plan = Plan(rows, [WIDE, PICTURE], 0, 1, image_share=0.5)
    assert (len(plan), plan.excluded) == (10, {"too small": 3})
    with pytest.raises(StepError, match=r"1x36x64 at interval 1 has 10 clips of 1 frames or more, .* 4 x 3 processes"):
        Plan(rows, [Bucket(4, 36, 64, 1), Bucket(1, 36, 64, 4)], 0, 3, image_share=0.5)


def test_the_shapes_of_a_stage() -> None:
    shape = BucketConfig(frames=8, height=64, width=36, batch_size=3, frame_interval=2)
    stage = TrainConfig(frames=16, height=36, width=64, batch_size=2, frame_interval=3, buckets=(shape,))
    videos = [Bucket(16, 36, 64, 2, 3), Bucket(8, 64, 36, 3, 2)]
    assert stage_buckets(stage) == videos
    joint = stage.model_copy(update={"image_share": 0.1, "image_batch_size": 20})
    assert stage_buckets(joint) == [*videos, Bucket(1, 36, 64, 20), Bucket(1, 64, 36, 20)]
    with pytest.raises(ConfigError, match="8x64x36 at interval 2 is twice"):
        stage_buckets(stage.model_copy(update={"buckets": (shape, shape.model_copy(update={"batch_size": 9}))}))
    with pytest.raises(ConfigError, match=r"image_share 0\.1 mixes single frames into videos"):
        stage_buckets(joint.model_copy(update={"frames": 1}))


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


def test_a_table_holds_the_kept_clips_of_all_parts_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clip_table, "AT_ONCE", 2)
    rows = [*clips(5), Clip("bad", "x", kept=False, reason="dark")]
    found = table(tmp_path, rows, parts=2)
    assert [found.text("clip_id", row) for row in range(len(found))] == ["c0", "c2", "c4", "c1", "c3"]
    assert found.identity == sha256(b"c0\nc2\nc4\nc1\nc3").hexdigest()
    assert found.row(1) == {"clip_id": "c2", "frames": 10, "height": 36, "width": 64}
    assert found.identity != table(tmp_path / "other", rows).identity
    with pytest.raises(StepError, match="no clip is left"):
        table(tmp_path / "none", rows[-1:])
    with pytest.raises(ManifestError, match="no manifest in"):
        ClipTable(tmp_path / "empty")


def test_no_two_noise_seeds_are_the_same() -> None:
    seeds = {draw_seed(seed, step, rank) for seed in range(3) for step in range(50) for rank in range(8)}
    assert len(seeds) == 3 * 50 * 8
    assert max(seeds) < 1 << 32
