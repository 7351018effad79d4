"""The step `score`: scores as columns first, thresholds on them second, the reason of every drop recorded."""

import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import cv2
import numpy as np

from opensora.config import ScoreConfig
from opensora.data.executor import run_tasks
from opensora.data.shards import read_clip
from opensora.data.video import read_frames
from opensora.manifest import Clip, drop_reasons, kept_clips, read_manifest, write_manifest
from opensora.progress import track
from opensora.step import Report, StepError, StepFolder, fingerprint, read_report

BLACK = 16  # of 255, darker pixels are black
SMALL = 128  # pixels of the longer side on which motion is measured
MOTION_FPS = 2.0  # frames a second that motion looks at
BATCH = 16  # clips a task
TIMEOUT_S = 300.0  # a task
SCORES = "scores.jsonl"


@dataclass(frozen=True)
class Task:
    """Some clips and the folder of their shards."""

    clips: list[Clip]
    shards: Path


def run(config: ScoreConfig, inputs: Path, output: Path) -> Report:
    """Score the kept clips of the split step in `inputs`, then apply the thresholds.

    Scores are kept beside the step, by clip: another threshold decodes nothing again.

    Raises:
        StepError: no clip passes.
    """
    clips = read_manifest(inputs / "manifest.parquet")
    folder = StepFolder(output, fingerprint(config.model_dump(), [asdict(clip) for clip in clips]))
    if folder.is_done():
        return read_report(output)
    work = folder.open()
    known = _score_all(kept_clips(clips), inputs, output.parent / ".cache" / SCORES, config.workers)
    scored = [replace(clip, scores=known.get(clip.clip_id, {})) if clip.kept else clip for clip in clips]
    scored = apply_thresholds(add_duplicate_distance(scored), config)
    write_manifest(work / "manifest.parquet", scored)
    if not kept_clips(scored):
        reasons = ", ".join(f"{count} {reason}" for reason, count in drop_reasons(scored).items())
        raise StepError(f"no clip passes the thresholds ({reasons}); lower them in params.yaml under `score`")
    kept = kept_clips(scored)
    return folder.finish(Report("score", total=len(scored), kept=len(kept), dropped=drop_reasons(scored)))


def _score_all(clips: list[Clip], shards: Path, cache: Path, workers: int) -> dict[str, dict[str, float]]:
    """Scores by clip id; those in the cache are not computed again, new ones are appended to it."""
    known: dict[str, dict[str, float]] = {}
    if cache.is_file():
        for line in cache.read_text().splitlines():
            try:
                row = json.loads(line)
            except json.JSONDecodeError:
                continue  # the last line of a run that was killed
            known[row["clip_id"]] = row["scores"]
    new = [clip for clip in clips if clip.clip_id not in known]
    tasks = [Task(new[start : start + BATCH], shards) for start in range(0, len(new), BATCH)]
    cache.parent.mkdir(parents=True, exist_ok=True)
    with cache.open("a") as handle:
        for outcome in track(run_tasks(score_clips, tasks, workers, TIMEOUT_S), len(tasks), "scoring clips"):
            if outcome.value is None:
                raise StepError(f"scoring failed: {outcome.failure}")
            for clip_id, scores in outcome.value:
                known[clip_id] = scores
                handle.write(json.dumps({"clip_id": clip_id, "scores": scores}) + "\n")
            handle.flush()
    return known


def score_clips(task: Task) -> list[tuple[str, dict[str, float]]]:
    """(clip id, scores) of every clip of a task."""
    cv2.setNumThreads(1)
    return [(clip.clip_id, measure(read_frames(read_clip(task.shards, clip)), clip.fps)) for clip in task.clips]


def measure(frames: np.ndarray, fps: float) -> dict[str, float]:
    """Scores of a clip uint8 [T, H, W, 3]; the hash stands as its two 32-bit halves, which floats hold exactly."""
    grey = np.stack([cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY) for frame in frames])
    middle = grey[len(grey) // 2]
    difference = np.abs(np.diff(grey.astype(np.int16), axis=0)).mean() if len(grey) > 1 else 0.0
    high, low = divmod(perceptual_hash(middle), 1 << 32)
    return {
        "duration_s": len(frames) / fps,
        "short_side": float(min(frames.shape[1:3])),
        "black": float((grey < BLACK).mean()),
        "brightness": float(grey.mean()),
        "frame_difference": float(difference),
        "sharpness": float(cv2.Laplacian(middle, cv2.CV_64F).var()),
        "motion": motion(grey, fps),
        "hash_high": float(high),
        "hash_low": float(low),
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
            value = np.uint64((int(clip.scores["hash_high"]) << 32) + int(clip.scores["hash_low"]))
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
