"""Real clips: drawn by a fixed seed, measured once, and named by what they are."""

import os
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from opensora.demo.shapes import all_scenes
from opensora.evaluation.reference import (
    Reference,
    Shape,
    keep_features,
    load_features,
    real_reference,
    reference_tasks,
    rendered_reference,
)
from opensora.evaluation.sampling import load_suite
from tests.small_disk import small_disk

SHAPE = Shape(4, 32, 32, 2)


def draw(clips: Path, count: int = 6, shape: Shape = SHAPE, extractors: object = "randconv") -> Reference:
    return real_reference(clips / "score", clips / "split", count, shape, extractors)


def test_a_draw_is_fixed_and_its_name_says_what_it_is_of(clips: Path, tmp_path: Path) -> None:
    reference = draw(clips)
    assert len({clip.clip_id for clip in reference.clips}) == 6
    assert reference == draw(clips)
    others = [draw(clips, 5), draw(clips, shape=Shape(4, 32, 32, 1)), draw(clips, extractors="videomae")]
    assert len({reference.key, *(other.key for other in others)}) == 4
    assert replace(reference, code="other measures").file(tmp_path) != reference.file(tmp_path)


def test_features_are_those_of_the_clips_and_are_made_once(clips: Path, tmp_path: Path) -> None:
    reference, cache = draw(clips), tmp_path / "cache"
    (tmp_path / "parts").mkdir()
    tasks = reference_tasks([reference, reference], cache, tmp_path, {})
    for task in tasks:
        task.do()
    keep_features(tasks, cache)
    features = load_features(reference, cache)
    assert features is not None
    frames = reference.clips[2].read(reference.shards, SHAPE)
    assert frames.shape == (4, 32, 32, 3)
    assert np.array_equal(features["randconv"][2], load_suite({}).reference(frames)["randconv"])
    assert features["randconv"].shape == (6, 64)
    assert not reference_tasks([reference], cache, tmp_path, {})

    with small_disk(tmp_path / "small", "8k") as small:  # nothing is left where they do not fit
        (small / "ballast").write_bytes(b"x" * (shutil.disk_usage(small).free))
        with pytest.raises(OSError, match="No space left"):
            keep_features(tasks, small)
        assert list(small.rglob("*.*")) == []

    kept = reference.file(cache)
    os.utime(kept, (1, 1))
    assert load_features(reference, cache) is not None
    assert kept.stat().st_mtime > 1  # it is in use, and the last to be removed
    kept.write_bytes(kept.read_bytes()[:200])  # a damaged file is made again
    assert load_features(reference, cache) is None
    assert reference_tasks([reference], cache, tmp_path, {})


@pytest.mark.parametrize(
    ("count", "shape", "reason"),
    [
        (6, Shape(99, 32, 32, 1), "of 16 clips have the 99 frames"),
        (0, SHAPE, "evaluate.reference_clips is 0"),
    ],
)
def test_too_few_clips_are_said(clips: Path, count: int, shape: Shape, reason: str) -> None:
    reference = draw(clips, count, shape)
    assert reason in reference.reason
    assert (reference.key, reference.clips) == ("", ())


def test_no_clips_at_all_are_said(tmp_path: Path) -> None:
    assert "holds no clips" in real_reference(tmp_path, tmp_path, 5, SHAPE, "").reason


def test_the_embedded_world_renders_the_scenes_of_the_prompts() -> None:
    prompts = [scene.caption for scene in all_scenes()[:3]]
    assert [clip.scene for clip in rendered_reference(prompts, SHAPE, "").clips] == [0, 1, 2]
    assert len(rendered_reference([*prompts, "a dog"], SHAPE, "").clips) == len(all_scenes())
