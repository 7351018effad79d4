"""Where the shots of a video are: one pass over its frames, detection, and what is trimmed and cut of the shots.

All numbers of frames are in order of display, and spans [start, end) do not hold their end.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any, Protocol

import cv2
import numpy as np

from opensora.config import SplitConfig
from opensora.data.timeline import Timeline, measure_timeline
from opensora.data.video import DEFAULT_FPS, nominal_rate, open_video, pictures

THRESHOLDS = {"content": 27.0, "adaptive": 3.0, "transnetv2": 0.5}
WINDOW, STEP, MARGIN = 100, 50, 25  # frames that TransNetV2 sees at once, and of those it judges the middle ones
INPUT_WIDTH, INPUT_HEIGHT = 48, 27  # pixels of its frames
BUSY = 3.0  # a frame that changes that many times as much as its shot usually does is part of a transition
CHANGE = 1.5  # mean change of hue, saturation and brightness that is no transition in the stillest shot
DARK = 6.0  # mean level, 0…255, of a frame that is black
MAX_TRIM = 0.25  # share of a shot that is taken for a transition at either end

Span = tuple[int, int]


@dataclass(frozen=True)
class Scan:
    """What one pass over a video told."""

    timeline: Timeline
    aspect: Fraction  # width of a pixel over its height
    intact: np.ndarray  # bool [N]: the frame decodes
    change: np.ndarray  # float32 [N]: ContentDetector's value, from the frame before
    level: np.ndarray  # float32 [N]: mean brightness
    shots: list[Span]  # as detected


class Detector(Protocol):
    """Takes frames in order; says where shots are."""

    def push(self, small: np.ndarray) -> float:
        """Take the next frame uint8 [h, w, 3], BGR; its change from the one before."""

    def shots(self, count: int) -> list[Span]:
        """The shots of the `count` frames that were taken."""


def scan_video(path: Path, config: SplitConfig, transnetv2: Path | None = None) -> Scan:
    """Decode a video once, find its shots, and measure what trimming needs.

    Raises:
        VideoError: it is no video, or it breaks off; see `video.pictures`.
    """
    with open_video(path) as (_, stream):
        nominal = nominal_rate(stream)
        aspect = Fraction(stream.sample_aspect_ratio or 1)
    min_frames = max(1, round(config.min_shot_s * (float(nominal) or DEFAULT_FPS)))
    detector = make_detector(config, min_frames, transnetv2)
    seconds, intact, change, level = [], [], [], []
    for picture in pictures(path):
        small = _small(picture.frame.to_ndarray(format="bgr24"))
        seconds.append(picture.seconds)
        intact.append(picture.intact)
        change.append(detector.push(small))
        level.append(small.mean())
    timeline = measure_timeline(np.array(seconds), nominal or Fraction(DEFAULT_FPS))
    return Scan(
        timeline,
        aspect=aspect or Fraction(1),
        intact=np.array(intact, bool),
        change=np.array(change, np.float32),
        level=np.array(level, np.float32),
        shots=detector.shots(len(seconds)),
    )


def _small(frame: np.ndarray) -> np.ndarray:
    """A frame at the size at which PySceneDetect looks, in its way, so that the shots are the same."""
    from scenedetect.scene_manager import compute_downscale_factor

    factor = compute_downscale_factor(frame.shape[1])
    if factor <= 1:
        return frame
    size = (max(1, round(frame.shape[1] / factor)), max(1, round(frame.shape[0] / factor)))
    return cv2.resize(frame, size, interpolation=cv2.INTER_LINEAR)


def make_detector(config: SplitConfig, min_frames: int, transnetv2: Path | None) -> Detector:
    """The detector that `config` names."""
    threshold = config.threshold or THRESHOLDS[config.detector]
    match config.detector:
        case "transnetv2":
            assert transnetv2, "the step finds the file"
            return TransNetV2(transnetv2, threshold, min_frames)
        case kind:
            return ContentChange(kind, threshold, min_frames)


class ContentChange:
    """PySceneDetect's ContentDetector or AdaptiveDetector (scenedetect.com/docs)."""

    def __init__(self, kind: str, threshold: float, min_frames: int) -> None:
        from scenedetect import AdaptiveDetector, ContentDetector, FrameTimecode

        self.detector: Any
        if kind == "content":
            self.detector = ContentDetector(threshold, min_scene_len=min_frames)
        else:
            self.detector = AdaptiveDetector(threshold, min_scene_len=min_frames)
        self._start = FrameTimecode(0, DEFAULT_FPS)  # frames are counted, so any rate does
        self._count = 0
        self._cuts: set[int] = set()

    def push(self, small: np.ndarray) -> float:
        found = self.detector.process_frame(self._start + self._count, small)
        self._cuts |= {cut.frame_num for cut in found}
        self._count += 1
        return float(self.detector._frame_score or 0.0)  # the library shows it in its statistics alone

    def shots(self, count: int) -> list[Span]:
        found = self.detector.post_process(self._start + count)
        edges = [0, *sorted(self._cuts | {cut.frame_num for cut in found}), count]
        return list(zip(edges[:-1], edges[1:], strict=True))


class TransNetV2:
    """TransNet V2 (arXiv 2008.04838) from an ONNX file: `input` uint8 [2, 100, 27, 48, 3], `output` [2, 100, 1].

    Two windows at once, in BGR, as PySceneDetect uses such files. A transition is a run of frames above the threshold;
    the shot before it ends with the run's first frame, and the next begins after the run.
    """

    def __init__(self, path: Path, threshold: float, min_frames: int) -> None:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        self.session = onnxruntime.InferenceSession(str(path), options)
        self.threshold, self.min_frames = threshold, min_frames
        self._frames: list[np.ndarray] = []
        self._high: list[bool] = []
        self._before: np.ndarray | None = None

    def push(self, small: np.ndarray) -> float:
        frame = cv2.resize(small, (INPUT_WIDTH, INPUT_HEIGHT), interpolation=cv2.INTER_AREA)
        hsv = cv2.cvtColor(frame, cv2.COLOR_BGR2HSV)
        change = 0.0 if self._before is None else float(cv2.absdiff(hsv, self._before).mean())
        self._before = hsv
        self._frames += [frame] * (1 if self._frames else MARGIN + 1)
        if len(self._frames) == WINDOW + STEP:
            self._judge()
        return change

    def _judge(self) -> None:
        """Judge the middles of two windows and forget the frames before the next."""
        windows = np.stack([self._frames[:WINDOW], self._frames[STEP : STEP + WINDOW]])
        (output,) = self.session.run(["output"], {"input": windows})
        self._high += (output[:, MARGIN : MARGIN + STEP, 0] > self.threshold).flatten().tolist()
        self._frames = self._frames[2 * STEP :]

    def shots(self, count: int) -> list[Span]:
        while len(self._high) < count:
            self._frames += [self._frames[-1]] * (WINDOW + STEP - len(self._frames))
            self._judge()
        starts_ends = np.flatnonzero(np.diff(np.pad(np.array(self._high[:count], np.int8), 1)))
        shots, start = [], 0
        for first, after in starts_ends.reshape(-1, 2).tolist():
            if first + 1 - start >= self.min_frames and count - after >= self.min_frames:
                shots.append((start, first + 1))
                start = after
        return [*shots, (start, count)]


def trim(shot: Span, scan: Scan, min_frames: int) -> Span:
    """A shot without the frames of a dissolve or fade, and without black ones, at its ends.

    A frame belongs to a transition when it, and all between it and the shot's end, changes more than `BUSY` times the
    shot's median, and more than `CHANGE`: within a dissolve every frame differs from the next by the same share of the
    two pictures' difference, after a hard cut none does. Of a shot of which little would be left nothing is trimmed.
    """
    start, end = shot
    inside = scan.change[start + 1 : end]
    if not len(inside):
        return shot
    busy = scan.change > max(CHANGE, BUSY * float(np.median(inside)))
    dark = scan.level < DARK
    most = int(MAX_TRIM * (end - start))
    forwards = range(start, start + most)
    backwards = range(end - 1, end - 1 - most, -1)
    first = start + _run([bool(dark[n] or busy[n + 1]) for n in forwards], dark[start])
    last = end - _run([bool(dark[n] or busy[n]) for n in backwards], dark[end - 1])
    return (first, last) if last - first >= min_frames else shot


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
