"""From the rows of single clips to the metrics of a stage, and which way each metric is better."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from opensora.demo.shapes import held_out_scenes, parse_caption
from opensora.evaluation.sampling import Row
from opensora.metrics.suite import Distance, Suite

PARTS = ("colour", "shape", "direction")
DISTANCES = ("fd_", "fvd_", "fid_")
MOTION = ("dynamic_degree", "flow_degree", "vbench_dynamic_degree", "dynamic_degree_farneback")
# What a prompt is judged by first, where it is measured.
PRIMARY = ("prompt_following", "clip_score", "motion_smoothness")


@dataclass(frozen=True)
class Measured:
    """What one checkpoint made of the prompts, in their order.

    Attributes:
        files: clips, relative to the step's folder.
        scores: scalars of every prompt.
        metrics: of all prompts together.
        height: of the clips, pixels.
        real_clips: how many the distances were measured to.
        seen: what the detector saw; empty where nobody kept it.
        distances: what each Fréchet distance is of; see `about`.
    """

    files: list[str]
    scores: list[dict[str, float]]
    metrics: dict[str, float]
    height: int
    real_clips: int = 0
    seen: list[dict[str, str | None] | None] = field(default_factory=list)
    distances: dict[str, dict[str, Any]] = field(default_factory=dict)


def better(name: str) -> int:
    """1 if more of a metric is better, −1 if less is, 0 if neither: motion alone is no merit."""
    if name.startswith(DISTANCES):
        return -1
    return 0 if name in MOTION else 1


def primary(names: Collection[str]) -> str:
    """What single prompts are judged by; empty where nothing is measured of them."""
    return next((name for name in (*PRIMARY, *names) if name in names), "")


def follows(prompt: str, row: Row) -> dict[str, bool] | None:
    """Which parts of a prompt of the embedded world a sample shows; None for other prompts.

    A picture has no direction: for one frame, colour and shape are the whole prompt.
    """
    scene = parse_caption(prompt)
    if scene is None:
        return None
    parts = PARTS if row["shape"][0] > 1 else PARTS[:2]
    right = {part: row["seen"][part] == getattr(scene, part) for part in parts}
    return right | {"prompt_following": all(right.values())}


def prompt_scores(prompts: Sequence[str], rows: Sequence[Row]) -> list[dict[str, float]]:
    """The scalars of every prompt; parts of a prompt that are right are 1, wrong ones 0."""
    scores = []
    for prompt, row in zip(prompts, rows, strict=True):
        scalars = {name: value for name, value in row["measures"].items() if isinstance(value, int | float)}
        scores.append(scalars | {name: int(right) for name, right in (follows(prompt, row) or {}).items()})
    return scores


def measure(
    suite: Suite, prompts: Sequence[str], rows: Sequence[Row], reference: Mapping[str, np.ndarray] | None
) -> dict[str, float]:
    """Metrics of one stage; those that cannot be measured are absent.

    Args:
        reference: features [N, D] of real clips by extractor.
    """
    metrics = suite.summary([row["measures"] for row in rows], reference)
    verdicts = [(prompt, follows(prompt, row)) for prompt, row in zip(prompts, rows, strict=True)]
    known = [(prompt, verdict) for prompt, verdict in verdicts if verdict is not None]
    held_out = {scene.caption for scene in held_out_scenes()}
    for name, wanted in {"": (False, True), "_seen": (False,), "_held_out": (True,)}.items():
        chosen = [verdict["prompt_following"] for prompt, verdict in known if (prompt in held_out) in wanted]
        if chosen:
            metrics[f"prompt_following{name}"] = float(np.mean(chosen))
    for part in PARTS:
        values = [verdict[part] for _, verdict in known if part in verdict]
        if values:
            metrics[part] = float(np.mean(values))
    return metrics


def about(distances: Mapping[str, Distance]) -> dict[str, dict[str, Any]]:
    """By metric, what each distance that was taken is of; two compare only where all of this is equal."""
    return {
        name: {"extractor": one.extractor, "sha256": one.sha256, "n": one.n, "reference_n": one.reference_n}
        for name, one in distances.items()
        if one.value is not None
    }


def headline(metrics: Mapping[str, object], first: str, last: str) -> dict[str, object]:
    """The last stage's prompt-following, and the image stage's share of right colours and shapes, over all prompts."""
    names = {f"prompt_following_{part}": f"{last}_prompt_following_{part}" for part in ("seen", "held_out")}
    names["image_stage_accuracy"] = f"{first}_prompt_following"
    return {name: metrics[source] for name, source in names.items() if source in metrics}
