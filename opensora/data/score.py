"""The step `score`: scores as columns first, thresholds on them second, the reason of every drop recorded."""

from dataclasses import dataclass, replace
from pathlib import Path

import cv2
import numpy as np

from opensora.config import ExecutorConfig, ScoreConfig
from opensora.data.executor import run_shards
from opensora.data.shards import read_clip
from opensora.data.video import read_frames
from opensora.data.workers import advance
from opensora.manifest import (
    Clip,
    Tally,
    count_rows,
    list_parts,
    manifest_hash,
    read_manifest,
    read_part,
    write_part,
)
from opensora.step import Report, StepError, StepFolder, fingerprint, read_report

BLACK = 16  # of 255, darker pixels are black
SMALL = 128  # pixels of the longer side on which motion is measured
MOTION_FPS = 2.0  # frames a second that motion looks at


@dataclass(frozen=True)
class Task:
    """One shard of clips to measure."""

    inputs: Path  # part of the split step's manifest; its folder holds the tar files
    part: Path  # the same rows with scores


def run(config: ScoreConfig, inputs: Path, output: Path, executor: ExecutorConfig) -> Report:
    """Score the kept clips of the split step in `inputs`, then apply the thresholds.

    Scores are kept beside the step: another threshold decodes nothing again.

    Raises:
        StepError: no clip passes.
    """
    given = manifest_hash(inputs)
    folder = StepFolder(output, fingerprint(config.model_dump(exclude={"workers"}), given))
    if folder.is_done():
        return read_report(output)
    work = folder.open()
    cache = output.parent / ".cache" / f"scores-{given[:16]}"
    cache.mkdir(parents=True, exist_ok=True)
    tasks = [Task(part, cache / part.name) for part in list_parts(inputs)]
    run_shards(score_shard, tasks, executor, config.workers, "scoring clips", count_rows(inputs))
    scored = apply_thresholds(add_duplicate_distance(read_manifest(cache)), config)
    tally = Tally().add(scored)
    start = 0
    for part in list_parts(inputs):
        end = start + len(read_part(part))
        write_part(work / part.name, scored[start:end])
        start = end
    if not tally.kept:
        raise StepError(f"no clip passes the thresholds ({tally.reasons}); lower them in params.yaml under `score`")
    return folder.finish(Report("score", total=tally.total, kept=tally.kept, dropped=dict(tally.dropped)))


def score_shard(task: Task) -> None:
    """Measure the kept clips of one part."""
    cv2.setNumThreads(1)
    rows = []
    for clip in read_part(task.inputs):
        if clip.kept:
            frames = read_frames(read_clip(task.inputs.parent, clip))
            grey = cv2.cvtColor(frames[len(frames) // 2], cv2.COLOR_RGB2GRAY)
            clip = replace(clip, scores=measure(frames, clip.fps), perceptual_hash=f"{perceptual_hash(grey):016x}")
        rows.append(clip)
        advance()
    write_part(task.part, rows)


def measure(frames: np.ndarray, fps: float) -> dict[str, float]:
    """Scores of a clip uint8 [T, H, W, 3]."""
    grey = np.stack([cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY) for frame in frames])
    middle = grey[len(grey) // 2]
    difference = np.abs(np.diff(grey.astype(np.int16), axis=0)).mean() if len(grey) > 1 else 0.0
    return {
        "duration_s": len(frames) / fps,
        "short_side": float(min(frames.shape[1:3])),
        "black": float((grey < BLACK).mean()),
        "brightness": float(grey.mean()),
        "frame_difference": float(difference),
        "sharpness": float(cv2.Laplacian(middle, cv2.CV_64F).var()),
        "motion": motion(grey, fps),
    }


def motion(grey: np.ndarray, fps: float) -> float:
    """Mean Farneback flow of grey frames [T, H, W], as a share of the frame's diagonal a second."""
    step = max(1, round(fps / MOTION_FPS))
    if len(grey) <= step:
        step = max(1, len(grey) - 1)
    scale = min(1.0, SMALL / max(grey.shape[1:]))
    small = [cv2.resize(frame, None, fx=scale, fy=scale, interpolation=cv2.INTER_AREA) for frame in grey[::step]]
    if len(small) < 2:
        return 0.0
    flows = [
        cv2.calcOpticalFlowFarneback(before, after, None, 0.5, 3, 15, 3, 5, 1.2, 0)
        for before, after in zip(small[:-1], small[1:], strict=True)
    ]
    length = np.mean([np.linalg.norm(flow, axis=2).mean() for flow in flows])
    return float(length / np.hypot(*small[0].shape) * fps / step)


def perceptual_hash(grey: np.ndarray) -> int:
    """64 bits: signs of the lowest 8×8 cosine coefficients against their median."""
    small = cv2.resize(grey, (32, 32), interpolation=cv2.INTER_AREA).astype(np.float32)
    low = cv2.dct(small)[:8, :8].flatten()
    bits = low > np.median(low[1:])
    return int("".join("1" if bit else "0" for bit in bits), 2)


def add_duplicate_distance(clips: list[Clip]) -> list[Clip]:
    """Adds `duplicate_distance`: bits between a clip's hash and the nearest earlier kept one; 64 for the first."""
    seen = np.empty((0,), dtype=np.uint64)
    result = []
    for clip in clips:
        if clip.kept:
            value = np.uint64(int(clip.perceptual_hash, 16))
            distance = int(np.bitwise_count(seen ^ value).min()) if len(seen) else 64
            seen = np.append(seen, value)
            clip = replace(clip, scores=clip.scores | {"duplicate_distance": float(distance)})
        result.append(clip)
    return result


def apply_thresholds(clips: list[Clip], config: ScoreConfig) -> list[Clip]:
    """Drop clips whose scores miss a threshold; the first one missed is the reason."""
    at_least = {
        "duration_s": ("short", config.min_duration_s),
        "short_side": ("small", config.min_short_side),
        "frame_difference": ("static", config.min_frame_difference),
        "motion": ("still", config.min_motion),
        "sharpness": ("blurred", config.min_sharpness),
    }
    return [_judge(clip, at_least, config) if clip.kept else clip for clip in clips]


def _judge(clip: Clip, at_least: dict[str, tuple[str, float | None]], config: ScoreConfig) -> Clip:
    scores = clip.scores
    if config.max_black is not None and scores["black"] > config.max_black:
        return replace(clip, kept=False, reason=f"black: {scores['black']:.2f} > {config.max_black:g}")
    for name, (reason, limit) in at_least.items():
        if limit is not None and scores[name] < limit:
            return replace(clip, kept=False, reason=f"{reason}: {name} {scores[name]:.4g} < {limit:g}")
    near = config.max_duplicate_distance
    if near is not None and scores["duplicate_distance"] <= near:
        return replace(clip, kept=False, reason=f"duplicate: {scores['duplicate_distance']:.0f} bits from another clip")
    return clip
