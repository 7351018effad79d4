"""Small pictures of clips: the first, middle and last frame side by side."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from opensora.data.shards import read_clip
from opensora.data.workers import run_tasks
from opensora.manifest import Clip

HEIGHT = 120  # pixels of a frame
QUALITY = 60  # of WebP
TIMEOUT_S = 60.0  # a clip


@dataclass(frozen=True)
class Task:
    """One clip to show."""

    shards: Path  # folder of the split step
    clip: Clip


def make_strips(shards: Path, clips: Sequence[Clip], workers: int, limit: int) -> dict[str, bytes]:
    """WebP by clip id, for the first clips that fit into `limit` bytes; damaged ones are left out.

    Args:
        shards: folder of the split step.
        workers: processes, which a damaged clip may crash or hang.
    """
    tasks = [Task(shards, clip) for clip in clips]
    pictures = {outcome.index: outcome.value for outcome in run_tasks(make_strip, tasks, workers, TIMEOUT_S)}
    strips: dict[str, bytes] = {}
    for index, clip in enumerate(clips):
        data = pictures[index]
        if data and limit >= len(data):
            strips[clip.clip_id] = data
            limit -= len(data)
    return strips


def make_strip(task: Task) -> bytes:
    """Three frames of a clip side by side, as WebP."""
    import cv2
    import numpy as np

    from opensora.data.video import read_frames

    last = task.clip.frames - 1
    picked = sorted({0, last // 2, last})
    frames = read_frames(read_clip(task.shards, task.clip), picked)
    width = max(1, round(frames.shape[2] * HEIGHT / frames.shape[1]))
    small = [cv2.resize(frame, (width, HEIGHT), interpolation=cv2.INTER_AREA) for frame in frames]
    strip = cv2.cvtColor(np.concatenate(small, axis=1), cv2.COLOR_RGB2BGR)
    return bytes(cv2.imencode(".webp", strip, [cv2.IMWRITE_WEBP_QUALITY, QUALITY])[1])
