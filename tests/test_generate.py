"""Generation: the same seed gives the same frames, whatever else is in the batch; nothing is made twice."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from opensora.config import ConfigError
from opensora.data.video import read_frames
from opensora.generate import RECORD, Pipeline, generate, read_prompts
from opensora.training.checkpoint import CheckpointError

PROMPTS = ["a red circle moving left", "a blue square moving up", "a green triangle moving down"]


@pytest.fixture(scope="module")
def pipeline(checkpoint: Path) -> Pipeline:
    return Pipeline.load(checkpoint)


def test_a_video_depends_on_its_seed_and_prompt_not_on_its_batch(pipeline: Pipeline) -> None:
    together = pipeline.sample(PROMPTS, [5, 6, 7], 3, 2.0)
    assert together.shape == (3, 4, 32, 32, 3)
    assert together.dtype == np.uint8
    alone = pipeline.sample(PROMPTS[1:2], [6], 3, 2.0)
    assert np.abs(alone[0].astype(int) - together[1]).max() <= 1  # another batch, another order of sums
    assert np.array_equal(pipeline.sample(PROMPTS, [5, 6, 7], 3, 2.0), together)
    assert not np.array_equal(pipeline.sample(PROMPTS[1:2], [8], 3, 2.0)[0], together[1])
    assert not np.array_equal(pipeline.sample(PROMPTS[:1], [6], 3, 2.0)[0], together[1])


def test_files_are_named_described_and_not_made_twice(checkpoint: Path, tmp_path: Path) -> None:
    paths = list(generate(checkpoint, PROMPTS[:2], [1, 2], tmp_path, steps=2, guidance=1.0))
    assert [path.name.split("-seed")[0] for path in paths] == ["a-red-circle-moving-left", "a-blue-square-moving-up"]
    assert all(read_frames(path.read_bytes()).shape == (4, 32, 32, 3) for path in paths)
    lines = [json.loads(line) for line in (tmp_path / RECORD).read_text().splitlines()]
    assert [(line["prompt"], line["seed"], line["steps"]) for line in lines] == [(PROMPTS[0], 1, 2), (PROMPTS[1], 2, 2)]
    times = [path.stat().st_mtime_ns for path in paths]
    paths[1].unlink()
    again = list(generate(checkpoint, PROMPTS[:2], [1, 2], tmp_path, steps=2, guidance=1.0))
    assert sorted(again) == sorted(paths)
    assert paths[0].stat().st_mtime_ns == times[0]
    assert paths[1].is_file()


def test_the_same_seed_gives_the_same_bytes(checkpoint: Path, tmp_path: Path) -> None:
    first = next(iter(generate(checkpoint, PROMPTS[:1], [3], tmp_path / "one", steps=2)))
    second = next(iter(generate(checkpoint, PROMPTS[:1], [3], tmp_path / "two", steps=2)))
    assert first.read_bytes() == second.read_bytes()


def test_steps_and_guidance_are_by_default_those_of_evaluation(checkpoint: Path, tmp_path: Path) -> None:
    next(iter(generate(checkpoint, PROMPTS[:1], [1], tmp_path)))
    line = json.loads((tmp_path / RECORD).read_text())
    assert (line["steps"], line["guidance"]) == (2, 4.0)


def test_prompt_files(tmp_path: Path) -> None:
    path = tmp_path / "prompts.txt"
    path.write_text("first\n\nsecond\t77\nthird\n")
    assert read_prompts(path, 10) == [("first", 10), ("second", 77), ("third", 12)]
    path.write_text("first\tsoon\n")
    with pytest.raises(ConfigError, match="line 1: the seed 'soon'"):
        read_prompts(path, 0)
    path.write_text("\n")
    with pytest.raises(ConfigError, match="holds no prompt"):
        read_prompts(path, 0)


def test_a_checkpoint_that_is_damaged_or_does_not_fit_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    copy = tmp_path / "smoke" / "train_video" / "checkpoints" / checkpoint.name
    shutil.copytree(checkpoint, copy)
    with pytest.raises(CheckpointError, match="needs demo_models/vae"):
        Pipeline.load(copy)
    with (copy / "ema.safetensors").open("r+b") as handle:
        handle.seek(-4, 2)
        handle.write(b"hurt")
    with pytest.raises(CheckpointError, match=r"ema\.safetensors has another sha256"):
        Pipeline.load(copy)
    with pytest.raises(CheckpointError, match="no usable checkpoint"):
        Pipeline.load(tmp_path)
