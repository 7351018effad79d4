"""VBench (Huang et al. 2024, arXiv 2311.17982): its prompt set, file names, total score, and what needs no weights.

The sixteen dimensions themselves are measured by the package `vbench` in an environment of its own (`vbench_runner`).
What is measured here without it bears VBench's name only where it is VBench's number:

- `temporal_flickering` is: the same formula over the same pixels, read by the same decoder. With `_still` it is of the
  videos that VBench's protocol would keep, by its rule with another optical flow.
- `dynamic_degree_farneback` has VBench's rule, by another optical flow; `motion_smoothness_linear` has the mean of the
  neighbours where VBench has frames interpolated by a network. Neither enters the total.
"""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from opensora.metrics.motion import flicker, motion_smoothness, moves, stands_still

SAMPLES = 5  # videos of a prompt
# Of each dimension the scores that count as 0 and as 1, and its weight among its kind, as published in VBench's
# scripts/constant.py; nothing is clipped.
QUALITY = {
    "subject_consistency": (0.1462, 1.0, 1.0),
    "background_consistency": (0.2615, 1.0, 1.0),
    "temporal_flickering": (0.6293, 1.0, 1.0),
    "motion_smoothness": (0.706, 0.9975, 1.0),
    "dynamic_degree": (0.0, 1.0, 0.5),
    "aesthetic_quality": (0.0, 1.0, 1.0),
    "imaging_quality": (0.0, 1.0, 1.0),
}
SEMANTIC = {
    "object_class": (0.0, 1.0, 1.0),
    "multiple_objects": (0.0, 1.0, 1.0),
    "human_action": (0.0, 1.0, 1.0),
    "color": (0.0, 1.0, 1.0),
    "spatial_relationship": (0.0, 1.0, 1.0),
    "scene": (0.0, 0.8222, 1.0),
    "appearance_style": (0.0009, 0.2855, 1.0),
    "temporal_style": (0.0, 0.364, 1.0),
    "overall_consistency": (0.0, 0.364, 1.0),
}
DIMENSIONS = (*QUALITY, *SEMANTIC)
QUALITY_WEIGHT, SEMANTIC_WEIGHT = 4, 1
# Without weights: the dimension whose prompts are taken, and the measure of frames and frames a second, which is None
# for a video that does not count.
MEASURES: dict[str, tuple[str, Callable[[np.ndarray, float], float | None]]] = {
    "temporal_flickering": ("temporal_flickering", lambda frames, fps: flicker(frames)),
    "temporal_flickering_still": (
        "temporal_flickering",
        lambda frames, fps: flicker(frames) if stands_still(frames) else None,
    ),
    "dynamic_degree_farneback": ("dynamic_degree", lambda frames, fps: float(moves(frames, fps))),
    "motion_smoothness_linear": ("motion_smoothness", lambda frames, fps: motion_smoothness(frames)),
}


@dataclass(frozen=True)
class Prompt:
    """One prompt of the set."""

    text: str
    dimensions: tuple[str, ...]  # that it is for


def read_prompts(path: Path) -> list[Prompt]:
    """The prompts of a `VBench_full_info.json`.

    Raises:
        OSError: the file cannot be read.
        ValueError: no such list; the message names the entry.
    """
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is no JSON: {error}") from error
    if not isinstance(entries, list):
        raise ValueError(f"{path} holds a {type(entries).__name__}, expected a list of prompts")
    prompts = []
    for number, entry in enumerate(entries):
        text = entry.get("prompt_en") if isinstance(entry, dict) else None
        dimensions = entry.get("dimension") if isinstance(entry, dict) else None
        if not isinstance(text, str) or not isinstance(dimensions, list) or not dimensions:
            raise ValueError(f"{path}: entry {number} lacks `prompt_en`, a text, or `dimension`, a list")
        unknown = [name for name in dimensions if name not in DIMENSIONS]
        if unknown:
            raise ValueError(f"{path}: entry {number} is for {unknown}, expected some of {', '.join(DIMENSIONS)}")
        video_name(text, 0)
        prompts.append(Prompt(text, tuple(dimensions)))
    if not prompts:
        raise ValueError(f"{path} holds no prompt")
    return prompts


def video_name(prompt: str, index: int) -> str:
    """The file name under which VBench looks for a prompt's video `index`, 0…4.

    Raises:
        ValueError: the prompt cannot be part of a file name.
    """
    name = f"{prompt}-{index}.mp4"
    if "/" in prompt or "\0" in prompt or len(name.encode()) > 255:
        raise ValueError(f"no file can be named after the prompt {prompt!r}: it holds a slash, or is too long")
    return name


def measure_videos(prompts: Sequence[Prompt], folder: Path) -> dict[str, float]:
    """Means of what can be measured without weights, over the videos in a folder, named as VBench wants them.

    A measure that no video counts for is absent.

    Raises:
        ValueError: a video cannot be read.
    """
    values: dict[str, list[float]] = {}
    for prompt in prompts:
        wanted = {name: call for name, (dimension, call) in MEASURES.items() if dimension in prompt.dimensions}
        for path in (folder / video_name(prompt.text, index) for index in range(SAMPLES) if wanted):
            frames, fps = read_video(path)
            for name, call in wanted.items():
                if (value := call(frames, fps)) is not None:
                    values.setdefault(name, []).append(value)
    return {name: float(np.mean(found)) for name, found in values.items()}


def read_video(path: Path) -> tuple[np.ndarray, float]:
    """Frames uint8 [T, H, W, 3] and frames a second, by OpenCV as VBench reads them; raises ValueError."""
    import cv2

    video = cv2.VideoCapture(str(path))
    try:
        frames = []
        while True:
            more, frame = video.read()
            if not more:
                break
            frames.append(cv2.cvtColor(frame, cv2.COLOR_BGR2RGB))
        fps = video.get(cv2.CAP_PROP_FPS)
    finally:
        video.release()
    if not frames or not fps > 0:
        raise ValueError(f"{path} is no video that OpenCV can read")
    return np.stack(frames), float(fps)


def final_scores(scores: Mapping[str, float]) -> dict[str, float]:
    """`quality`, `semantic` and `total` from the scores of the dimensions, as VBench's leaderboard has them (in 0…1).

    The seven dimensions of quality count four times as much as the nine of meaning. A score that lacks one of its
    dimensions is absent; VBench's own script takes 0 for it.

    Raises:
        ValueError: a name that is no dimension of VBench, or a score that is not finite.
    """
    for name, score in scores.items():
        if name not in DIMENSIONS:
            raise ValueError(f"{name!r} is no dimension of VBench; expected some of {', '.join(DIMENSIONS)}")
        if not math.isfinite(score):
            raise ValueError(f"the score of {name} is {score}")
    found = {}
    for kind, dimensions in (("quality", QUALITY), ("semantic", SEMANTIC)):
        if all(name in scores for name in dimensions):
            parts = [weight * (scores[name] - low) / (high - low) for name, (low, high, weight) in dimensions.items()]
            found[kind] = sum(parts) / sum(weight for _, _, weight in dimensions.values())
    if len(found) == 2:
        weighted = QUALITY_WEIGHT * found["quality"] + SEMANTIC_WEIGHT * found["semantic"]
        found["total"] = weighted / (QUALITY_WEIGHT + SEMANTIC_WEIGHT)
    return found
