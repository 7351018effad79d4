"""Where the shots of a video are: one pass over its frames, detection, and what is trimmed and cut of the shots.

All numbers of frames are in order of display, and spans [start, end) do not hold their end.
"""

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import cv2
import numpy as np

from opensora.config import SplitConfig
from opensora.data.container import nominal_rate, open_video
from opensora.data.detectors import DetectorBySize, Span, make_detector
from opensora.data.timeline import Timeline, measure_timeline
from opensora.data.video import DEFAULT_FPS, TruncatedError, pictures

BUSY = 3.0  # a frame that changes that many times as much as its shot usually does is part of a transition
BENT = 0.5  # a frame that differs so much from a blend of its neighbours, as a share of their difference, moves
APART = 2  # frames from a frame to those neighbours: next to it, slow motion looks like a blend
CHANGE = 1.5  # mean change of hue, saturation and brightness that is no transition in the stillest shot
DARK = 6.0  # mean level, 0…255, of a frame that is black
MAX_TRIM = 0.25  # share of a shot that is taken for a transition at either end


@dataclass(frozen=True)
class Scan:
    """What one pass over a video told."""

    timeline: Timeline
    aspect: Fraction  # width of a pixel over its height
    intact: np.ndarray  # bool [N]: the frame decodes
    change: np.ndarray  # float32 [N]: ContentDetector's value, from the frame before
    level: np.ndarray  # float32 [N]: mean brightness
    bend: np.ndarray  # float32 [N]: see `Bend`
    shots: list[Span]  # as detected; none holds frames of two sizes
    joints: tuple[int, ...] = ()  # frames from which on all have another size
    ending: TruncatedError | None = None  # why the video ends before it should


def scan_video(path: Path, config: SplitConfig, transnetv2: Path | None = None) -> Scan:
    """Decode a video once, find its shots, and measure what trimming needs.

    Raises:
        VideoError: it is no video; see `video.pictures`.
    """
    with open_video(path) as (_, stream):
        nominal = nominal_rate(stream)
        aspect = Fraction(stream.sample_aspect_ratio or 1)
    min_frames = max(1, round(config.min_shot_s * (float(nominal) or DEFAULT_FPS)))
    detectors = DetectorBySize(lambda: make_detector(config, min_frames, transnetv2))
    bend = Bend()
    seconds, intact, change, level = [], [], [], []
    ending = None
    try:
        for picture in pictures(path):
            small = _small(picture.frame.to_ndarray(format="bgr24"))
            seconds.append(picture.seconds)
            intact.append(picture.intact)
            change.append(detectors.push(small, (picture.frame.width, picture.frame.height)))
            level.append(small.mean())
            bend.push(small)
    except TruncatedError as error:
        ending = error
    return Scan(
        measure_timeline(np.array(seconds), nominal or Fraction(DEFAULT_FPS)),
        aspect=aspect or Fraction(1),
        intact=np.array(intact, bool),
        change=np.array(change, np.float32),
        level=np.array(level, np.float32),
        bend=bend.values(),
        shots=detectors.shots(),
        joints=tuple(detectors.joints),
        ending=ending,
    )


def _small(frame: np.ndarray) -> np.ndarray:
    """A frame at the size at which PySceneDetect looks, in its way, so that the shots are the same."""
    from scenedetect.scene_manager import compute_downscale_factor

    factor = compute_downscale_factor(max(frame.shape[:2]))
    if factor <= 1:
        return frame
    size = (max(1, round(frame.shape[1] / factor)), max(1, round(frame.shape[0] / factor)))
    return cv2.resize(frame, size, interpolation=cv2.INTER_LINEAR)


def trim(shot: Span, scan: Scan, min_frames: int) -> Span:
    """A shot without the frames of a dissolve or fade, and without black ones, at its ends.

    A frame belongs to a transition when it, and all between it and the shot's end, changes more than `BUSY` times the
    shot's median, and more than `CHANGE`, and gradually: within a dissolve or fade a frame is the mean of those around
    it, in motion it is not. Of a shot of which little would be left nothing is trimmed.
    """
    start, end = shot
    inside = scan.change[start + 1 : end]
    if not len(inside):
        return shot
    busy = (scan.change > max(CHANGE, BUSY * float(np.median(inside)))) & is_gradual(scan.bend)
    dark = scan.level < DARK
    most = int(MAX_TRIM * (end - start))
    forwards = range(start, start + most)
    backwards = range(end - 1, end - 1 - most, -1)
    first = start + _run([bool(dark[n] or busy[n + 1]) for n in forwards], dark[start])
    last = end - _run([bool(dark[n] or busy[n]) for n in backwards], dark[end - 1])
    return (first, last) if last - first >= min_frames else shot


def is_gradual(bend: np.ndarray) -> np.ndarray:
    """Whether the step to each frame from the one before it lies within a blend: bool [N]."""
    padded = np.pad(bend, (APART, APART - 1), constant_values=np.inf)
    return np.lib.stride_tricks.sliding_window_view(padded, 2 * APART).min(axis=1) < BENT


class Bend:
    """How far each frame is from the mean of the two around it, as a share of how far those are from each other.

    0 in a fade or dissolve, 1 beside a hard cut, about as much or more in motion.
    """

    def __init__(self) -> None:
        self._last: deque[np.ndarray] = deque(maxlen=2 * APART + 1)
        self._values: list[float] = []

    def push(self, small: np.ndarray) -> None:
        """Take the next frame uint8 [h, w, 3], BGR."""
        self._last.append(cv2.cvtColor(small, cv2.COLOR_BGR2GRAY).astype(np.int16))
        self._values.append(np.inf)
        before, middle, after = self._last[0], self._last[len(self._last) // 2], self._last[-1]
        if len(self._last) > 2 * APART and before.shape == middle.shape == after.shape:
            apart = float(cv2.absdiff(before, after).mean())
            self._values[-1 - APART] = float(np.abs(before + after - 2 * middle).mean()) / max(apart, 1e-3)

    def values(self) -> np.ndarray:
        """Of all frames: float32 [N], infinite for those at the ends of the video."""
        return np.array(self._values, np.float32)


def _run(flags: Sequence[bool], even_one: bool) -> int:
    """How many flags are up before the first that is not; a single one is a jerk and no transition."""
    count = next((place for place, flag in enumerate(flags) if not flag), len(flags))
    return count if count > 1 or even_one else 0


def stretches(shot: Span, longest: int, stride: int | None) -> Iterator[Span]:
    """A shot as clips of at most `longest` frames: equal parts, or one every `stride` frames, the last at the end."""
    start, end = shot
    length = end - start
    if length <= longest:
        yield shot
    elif stride is None:
        edges = np.linspace(start, end, -(-length // longest) + 1).round().astype(int).tolist()
        yield from zip(edges[:-1], edges[1:], strict=True)
    else:
        yield from ((first, first + longest) for first in range(start, end - longest, stride))
        yield end - longest, end


def intact_runs(span: Span, intact: np.ndarray) -> list[Span]:
    """The parts of a span whose frames all decode."""
    edges = np.flatnonzero(np.diff(np.pad(intact[slice(*span)].astype(np.int8), 1)))
    return [(span[0] + first, span[0] + end) for first, end in edges.reshape(-1, 2).tolist()]


def find_clips(scan: Scan, config: SplitConfig) -> tuple[list[Span], list[Span]]:
    """Spans of the clips to cut, and spans that are lost to damage."""
    timeline = scan.timeline
    min_frames = max(1, round(config.min_shot_s / timeline.period))
    longest = max(1, round(config.max_clip_s / timeline.period))
    stride = max(1, round(config.stride_s / timeline.period)) if config.stride_s else None
    clips: list[Span] = []
    lost: list[Span] = []
    for shot in scan.shots:
        whole = bool(scan.intact[slice(*shot)].all())
        runs: Sequence[Span] = [shot] if whole else intact_runs(shot, scan.intact)
        good = [run for run in runs if whole or run[1] - run[0] >= min_frames]
        if not good or not whole:
            lost.append(shot)
        for run in good:
            kept = trim(run, scan, min_frames) if config.trim_transitions else run
            clips += stretches(kept, longest, stride)
    return clips, lost
