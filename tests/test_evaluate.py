"""The measures tell a perfect sampler from a wrong one, and evaluation leaves what others read."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from opensora.config import ConfigError, load_config
from opensora.demo.shapes import Scene, all_scenes, render_clip
from opensora.evaluate import describe_sample, evaluation_prompts, follows, measure, run
from opensora.step import StepError
from tests.conftest import ROOT

PROMPTS = [scene.caption for scene in all_scenes()]


def rows(shown: Callable[[Scene], Scene], frames: int = 8) -> list[dict]:
    """What a sampler that shows `shown(scene)` for each prompt gets."""
    rng = np.random.default_rng(3)
    return [describe_sample(scene.caption, render_clip(shown(scene), frames, 32, rng)) for scene in all_scenes()]


@pytest.fixture(scope="module")
def perfect() -> dict[str, float]:
    return measure(PROMPTS, rows(lambda scene: scene))


def test_a_perfect_sampler_is_perfect(perfect: dict[str, float]) -> None:
    for name in (
        "prompt_following_seen",
        "prompt_following_held_out",
        "prompt_following",
        "colour",
        "shape",
        "direction",
    ):
        assert perfect[name] == 1


def test_one_wrong_part_is_seen_alone(perfect: dict[str, float]) -> None:
    back = {"left": "right", "right": "left", "up": "down", "down": "up"}
    wrong = measure(PROMPTS, rows(lambda scene: Scene(scene.colour, scene.shape, back[scene.direction])))
    assert wrong["direction"] == wrong["prompt_following_seen"] == wrong["prompt_following_held_out"] == 0
    assert wrong["colour"] == wrong["shape"] == 1


def test_one_answer_for_all_prompts_scores_as_chance(perfect: dict[str, float]) -> None:
    same = measure(PROMPTS, rows(lambda scene: all_scenes()[0]))
    assert (same["colour"], same["shape"], same["direction"]) == (1 / 4, 1 / 3, 1 / 4)
    assert same["prompt_following"] == 1 / 48
    assert same["fd_randconv"] > 3 * perfect["fd_randconv"]


def test_noise_shows_nothing() -> None:
    noise = np.random.default_rng(0).integers(0, 256, (8, 32, 32, 3), dtype=np.uint8)
    verdict = follows(PROMPTS[0], describe_sample(PROMPTS[0], noise))
    assert verdict is not None
    assert not verdict["prompt"]


def test_a_picture_has_no_direction() -> None:
    scores = measure(PROMPTS, rows(lambda scene: scene, frames=1))
    assert "direction" not in scores
    assert scores["prompt_following_seen"] == 1


def test_other_prompts_are_measured_without_the_detector() -> None:
    frames = np.zeros((4, 32, 32, 3), np.uint8)
    scores = measure(["a lighthouse"], [describe_sample("a lighthouse", frames)])
    assert set(scores) == {"flicker", "dynamic_degree", "motion_smoothness"}


def test_the_step_leaves_metrics_gallery_and_samples(checkpoint: Path, tmp_path: Path) -> None:
    base = tmp_path / "smoke"
    shutil.copytree(checkpoint.parents[2], base)
    config = load_config(ROOT / "params.yaml", "smoke")
    stages = {"train_video": base / "train_video"}
    arguments = {"extra": {"caption_exact_match": 0.5}, "seconds": {"split": 2.0}, "peak_memory_mib": 7.0}
    report = run(config, stages, base / "evaluate", tmp_path, **arguments)
    metrics = json.loads((base / "evaluate" / "metrics.json").read_text())
    assert metrics["caption_exact_match"] == 0.5
    assert metrics["seconds"] == {"split": 2.0}
    assert metrics["fd_extractor"] == "randconv"
    assert 0 <= metrics["prompt_following_seen"] <= 1
    assert "data:video/mp4" in (base / "evaluate" / "gallery.html").read_text()
    assert len(list((base / "evaluate" / "samples" / "train_video").glob("*.mp4"))) == 2
    assert (base / "evaluate" / "frames.png").is_file()
    assert run(config, stages, base / "evaluate", tmp_path, **arguments) == report  # a repeat does nothing

    (base / "train_video" / "checkpoints" / checkpoint.name / "model.safetensors").write_bytes(b"")
    with pytest.raises(StepError.__base__, match="no usable checkpoint"):
        run(config, stages, base / "evaluate", tmp_path, **arguments)


def test_prompts_come_from_the_configuration_and_its_file(tmp_path: Path) -> None:
    config = load_config(ROOT / "params.yaml", "smoke").evaluate
    (tmp_path / "scenes.txt").write_text("# two\na river\t5\na field\n")
    both = config.model_copy(update={"prompts": ("a cat",), "prompts_file": str(tmp_path / "scenes.txt")})
    assert evaluation_prompts(both) == ["a cat", "a river", "a field"]
    assert len(evaluation_prompts(config.model_copy(update={"prompts": ()}))) == 48
    with pytest.raises(ConfigError, match=r"no prompts file at none\.txt"):
        evaluation_prompts(config.model_copy(update={"prompts_file": "none.txt"}))
    released = load_config(ROOT / "params.yaml", "h800").evaluate
    assert (ROOT / released.prompts_file).is_file()
