"""Joint training on videos and single frames: the same samples and losses, however many micro-batches share a step."""

from pathlib import Path

import pytest

from opensora.data.buckets import Plan, stage_buckets
from opensora.data.clip_table import ClipTable
from opensora.training.stop import Stopped
from tests.training.runs import STEPS, config, losses, stopped_at, train

JOINT = ("model.class_dropout_prob=0.0", "train_video.image_share=0.5")  # each micro-batch draws its dropped captions
WHOLE = ("train_video.batch_size=4", "train_video.image_batch_size=6")
HALVES = ("train_video.batch_size=2", "train_video.image_batch_size=3", "train_video.accumulate=2")


def test_a_stopped_joint_run_goes_on_in_other_micro_batches_with_the_same_losses(
    encoded: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = config(*JOINT, *WHOLE)
    expected = losses(train(whole, encoded, tmp_path / "whole"))
    with monkeypatch.context() as patch:
        stopped_at(4, patch)
        with pytest.raises(Stopped):
            train(whole, encoded, tmp_path / "stopped")
    found = losses(train(config(*JOINT, *HALVES), encoded, tmp_path / "stopped"))
    assert found[:4] == expected[:4]
    assert [loss for _, loss in found] == pytest.approx([loss for _, loss in expected], rel=1e-4)
    stage = whole.train_video
    plan = Plan(ClipTable(encoded), stage_buckets(stage), stage.seed, 1, image_share=stage.image_share)
    frames = [plan.buckets[next(plan.batches(0, step)).draws[0].bucket].frames for step in range(4, STEPS)]
    assert set(frames) == {1, stage.frames}  # of either kind after the stop
