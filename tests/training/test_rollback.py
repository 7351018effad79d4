"""Steps that are not fit to change the weights: skipped, remembered, and after some of them passed over."""

import json
import shutil
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from opensora.step import StepError
from opensora.training import saver
from opensora.training.checkpoint import save_checkpoint
from opensora.training.stop import Stopped
from tests.training.runs import STEPS, config, final_weights, losses, same, stopped_at, train

BAD_CLIP = "clip3"


@pytest.fixture(scope="module")
def spoiled(encoded: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The data set with one clip whose latents are no numbers."""
    folder = tmp_path_factory.mktemp("spoiled") / "encode"
    shutil.copytree(encoded, folder)
    latents = load_file(folder / "l")
    for name, value in latents.items():
        if name.startswith(f"{BAD_CLIP}/"):
            value.fill_(float("nan"))
    save_file(latents, folder / "l")
    return folder


def bad_lines(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "bad_steps.jsonl").read_text().splitlines()]


def test_a_bad_step_changes_nothing_and_its_clips_are_remembered(spoiled: Path, tmp_path: Path) -> None:
    folder = train(config(), spoiled, tmp_path)
    lines = [json.loads(line) for line in (folder / "losses.jsonl").read_text().splitlines()]
    skipped = [line["step"] for line in lines if line.get("skipped")]
    assert 0 < len(skipped) < STEPS
    assert all(line["loss"] is None for line in lines if line.get("skipped"))
    assert [line["step"] + 1 for line in bad_lines(folder)] == skipped
    assert all(BAD_CLIP in line["clip_ids"] for line in bad_lines(folder))
    weights = final_weights(folder)
    assert all(torch.isfinite(value).all() for value in weights.values())
    assert {float(value) for name, value in weights.items() if "step/" in name} == {STEPS - len(skipped)}


@pytest.fixture
def slow_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """A checkpoint is written long after the loop handed it over: later steps are trained before."""

    def slow(*args: Any, **values: Any) -> Path:
        time.sleep(0.2)
        return save_checkpoint(*args, **values)

    monkeypatch.setattr(saver, "save_checkpoint", slow)


@pytest.mark.usefixtures("slow_disk")
def test_after_bad_steps_in_a_row_the_run_goes_back_and_passes_them_over(
    spoiled: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = config(
        *("train_video.max_bad_steps=1", "train_video.max_rollbacks=20", "train_video.checkpoint_every=1"),
        # the first step must be good: there is nothing to go back to before it
        f"train_video.seed={good_start(spoiled)}",
    )
    folder = train(values, spoiled, tmp_path / "whole")
    assert [step for step, _ in losses(folder)] == list(range(1, STEPS + 1))
    assert all(loss is not None for _, loss in losses(folder))
    bad = [line for line in bad_lines(folder) if "clip_ids" in line]
    backs = [line for line in bad_lines(folder) if "rollback" in line]
    assert backs
    assert [line["positions"] for line in backs] == [[line["position"]] for line in bad]

    with monkeypatch.context() as patch:
        stopped_at(STEPS - 1, patch)
        with pytest.raises(Stopped):
            train(values, spoiled, tmp_path / "stopped")
    same(train(values, spoiled, tmp_path / "stopped"), folder)


def test_too_many_rollbacks_end_the_run(spoiled: Path, tmp_path: Path) -> None:
    values = config(
        *("train_video.max_bad_steps=1", "train_video.max_rollbacks=1", "train_video.checkpoint_every=1"),
        *(f"train_video.seed={good_start(spoiled)}", "train_video.steps=20"),
    )
    with pytest.raises(StepError, match=r"gone back 1 times \(max_rollbacks=1\)"):
        train(values, spoiled, tmp_path)
    assert list((tmp_path / "smoke" / ".partial" / "train_video" / "checkpoints").glob("step-*"))


def test_without_a_checkpoint_there_is_nothing_to_go_back_to(encoded: Path, tmp_path: Path) -> None:
    values = config("train_video.lr=1e30", "train_video.steps=40", "train_video.clip_norm=1e30")
    with pytest.raises(StepError, match=r"steps 2 to 6 were bad, and there is no checkpoint before them; lower lr"):
        train(values, encoded, tmp_path)
    assert not (tmp_path / "smoke" / "train_video").exists()


def good_start(folder: Path) -> int:
    """A seed whose first batch does not hold the bad clip."""
    from opensora.data.buckets import Plan, stage_buckets
    from opensora.data.clip_table import ClipTable

    buckets = stage_buckets(config().train_video)
    clips = ClipTable(folder)
    return next(seed for seed in range(100) if BAD_CLIP not in Plan(clips, buckets, seed, 1).clip_ids(0))
