"""VBench's prompt set, names, rules and totals, against the published forms."""

import json
from pathlib import Path

import numpy as np
import pytest

from opensora.clip_file import write_clip
from opensora.metrics.motion import flicker
from opensora.metrics.vbench import (
    DIMENSIONS,
    QUALITY,
    SAMPLES,
    SEMANTIC,
    final_scores,
    measure_videos,
    read_prompts,
    read_video,
    video_name,
)

PROMPTS = [  # in the published form
    {"prompt_en": "In a still frame, a stop sign", "dimension": ["temporal_flickering"]},
    {
        "prompt_en": "a bird and a cat",
        "dimension": ["multiple_objects"],
        "auxiliary_info": {"multiple_objects": {"object": "bird and cat"}},
    },
    {"prompt_en": "a person swimming in ocean", "dimension": ["dynamic_degree", "motion_smoothness"]},
]
LAVIE = {  # its row of the leaderboard as we know it, in percent; it could not be looked up here
    "subject_consistency": 91.41,
    "background_consistency": 97.47,
    "temporal_flickering": 98.30,
    "motion_smoothness": 96.38,
    "dynamic_degree": 49.72,
    "aesthetic_quality": 54.94,
    "imaging_quality": 61.90,
    "object_class": 91.82,
    "multiple_objects": 33.32,
    "human_action": 96.80,
    "color": 86.39,
    "spatial_relationship": 34.09,
    "scene": 52.69,
    "appearance_style": 23.56,
    "temporal_style": 25.93,
    "overall_consistency": 26.41,
}
RNG = np.random.default_rng(0)


@pytest.fixture
def full_info(tmp_path: Path) -> Path:
    path = tmp_path / "VBench_full_info.json"
    path.write_text(json.dumps(PROMPTS))
    return path


def write(folder: Path, name: str, frames: np.ndarray) -> None:
    write_clip(folder / name.removesuffix(".mp4"), frames, 8)


def sliding(step: int) -> np.ndarray:
    picture = np.kron(RNG.integers(0, 256, (8, 24, 3), dtype=np.uint8), np.ones((8, 8, 1), np.uint8))
    return np.stack([picture[:, step * index : step * index + 64] for index in range(8)])


def test_prompts_by_dimension(full_info: Path) -> None:
    prompts = read_prompts(full_info)
    assert [prompt.text for prompt in prompts] == [entry["prompt_en"] for entry in PROMPTS]
    assert prompts[2].dimensions == ("dynamic_degree", "motion_smoothness")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is no JSON"),
        ('{"prompt_en": "a"}', "holds a dict, expected a list"),
        ('["a"]', "entry 0 lacks"),
        ("[]", "holds no prompt"),
        ('[{"prompt_en": "a/b", "dimension": ["scene"]}]', "no file can be named"),
        ('[{"prompt_en": "a", "dimension": ["scene"]}, {"prompt_en": "a"}]', "entry 1 lacks"),
        ('[{"prompt_en": "a", "dimension": ["colour"]}]', r"entry 0 is for \['colour'\]"),
    ],
)
def test_other_files_are_refused(full_info: Path, content: str, message: str) -> None:
    full_info.write_text(content)
    with pytest.raises(ValueError, match=message):
        read_prompts(full_info)


def test_names_of_videos() -> None:
    assert video_name("A 3D model of a 1800s victorian house.", 4) == "A 3D model of a 1800s victorian house.-4.mp4"
    for prompt in ("a/b", "long " * 60):
        with pytest.raises(ValueError, match="no file can be named"):
            video_name(prompt, 0)


def test_measures_without_weights(full_info: Path, tmp_path: Path) -> None:
    folder = tmp_path / "videos"
    folder.mkdir()
    prompts = read_prompts(full_info)
    still, other, moving = ([video_name(prompt.text, index) for index in range(SAMPLES)] for prompt in prompts)
    frozen = np.repeat(sliding(0)[:1], 8, axis=0)
    noisy = np.clip(frozen + RNG.integers(-20, 20, frozen.shape), 0, 255).astype(np.uint8)
    for name, frames in zip(still, (frozen, noisy, sliding(4), frozen, frozen), strict=True):
        write(folder, name, frames)
    for name, frames in zip(moving, (sliding(4), frozen, frozen, sliding(4), frozen), strict=True):
        write(folder, name, frames)
    found = measure_videos(prompts, folder)  # no dimension of `other` is measured, and its videos are not looked for
    assert not any((folder / name).exists() for name in other)
    assert set(found) == {
        "temporal_flickering",
        "temporal_flickering_still",
        "dynamic_degree_farneback",
        "motion_smoothness_linear",
    }
    values = [flicker(read_video(folder / name)[0]) for name in still]
    assert found["temporal_flickering"] == pytest.approx(np.mean(values))
    assert found["temporal_flickering_still"] > found["temporal_flickering"]  # the sliding one is left out
    assert found["dynamic_degree_farneback"] == pytest.approx(0.4)
    assert measure_videos(prompts[1:2], folder) == {}
    (folder / moving[1]).write_bytes(b"no video")
    with pytest.raises(ValueError, match="is no video that OpenCV can read"):
        measure_videos(prompts, folder)


def test_the_formula_of_temporal_flickering(tmp_path: Path) -> None:
    """As VBench writes it: the mean of cv2.absdiff of frames in float32, over what cv2.VideoCapture reads."""
    import cv2

    write(tmp_path, "clip.mp4", sliding(3))
    video, frames = cv2.VideoCapture(str(tmp_path / "clip.mp4")), []
    while (read := video.read())[0]:
        frames.append(read[1].astype(np.float32))
    video.release()
    changes = [np.mean(cv2.absdiff(a, b)) for a, b in zip(frames[:-1], frames[1:], strict=True)]
    assert len(frames) == 8
    assert flicker(read_video(tmp_path / "clip.mp4")[0]) == pytest.approx((255.0 - np.mean(changes)) / 255.0, abs=1e-6)
    assert read_video(tmp_path / "clip.mp4")[1] == 8


def test_totals_of_the_leaderboard() -> None:
    assert set(LAVIE) == set(DIMENSIONS)
    assert (len(QUALITY), len(SEMANTIC)) == (7, 9)
    found = final_scores({name: score / 100 for name, score in LAVIE.items()})
    assert {name: round(100 * score, 2) for name, score in found.items()} == {
        "quality": 78.78,
        "semantic": 70.31,
        "total": 77.08,
    }
    assert final_scores({name: high for name, (_, high, _) in (QUALITY | SEMANTIC).items()}) == pytest.approx(
        {"quality": 1, "semantic": 1, "total": 1}
    )


def test_a_total_without_all_dimensions_is_absent() -> None:
    quality = dict.fromkeys(QUALITY, 0.9)
    assert set(final_scores(quality)) == {"quality"}
    assert final_scores({"scene": 0.5}) == {}
    with pytest.raises(ValueError, match="'dynamic_degree_farneback' is no dimension"):
        final_scores(quality | {"dynamic_degree_farneback": 1.0})
    with pytest.raises(ValueError, match="the score of scene is nan"):
        final_scores({"scene": float("nan")})
