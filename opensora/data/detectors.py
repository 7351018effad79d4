"""What finds shots: PySceneDetect's detectors, or TransNetV2; frames go in one after the other."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import cv2
import numpy as np

from opensora.config import SplitConfig
from opensora.data.video import DEFAULT_FPS
from opensora.step import StepError
from opensora.weights import WeightsError

THRESHOLDS = {"content": 27.0, "adaptive": 3.0, "transnetv2": 0.5}
WINDOW, STEP, MARGIN = 100, 50, 25  # frames that TransNetV2 sees at once, and of those it judges the middle ones
INPUT_WIDTH, INPUT_HEIGHT = 48, 27  # pixels of its frames

Span = tuple[int, int]


class Detector(Protocol):
    """Takes frames in order; says where shots are."""

    def push(self, small: np.ndarray) -> float:
        """Take the next frame uint8 [h, w, 3], BGR; its change from the one before."""

    def shots(self, count: int) -> list[Span]:
        """The shots of the `count` frames that were taken."""


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
        options.intra_op_num_threads = 1  # a worker a core; its own threads would choose their cores themselves
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


def check_transnetv2(path: Path) -> None:
    """Run the network once, before a step begins: else each video would be told to be bad.

    Raises:
        StepError: onnxruntime is not installed.
        WeightsError: the file is damaged, or another network.
    """
    try:
        session = TransNetV2(path, THRESHOLDS["transnetv2"], 1).session
    except ImportError:
        raise StepError(
            "split.detector is transnetv2, which needs onnxruntime: pip install 'opensora-workflow[shots]'"
        ) from None
    except Exception as error:  # onnxruntime has an exception of its own for everything
        raise WeightsError(f"{path} is no ONNX file that can be read: {_first_line(error)}") from error
    windows = np.zeros((2, WINDOW, INPUT_HEIGHT, INPUT_WIDTH, 3), np.uint8)
    try:
        (output,) = session.run(["output"], {"input": windows})
    except Exception as error:
        raise WeightsError(f"{path} is no TransNetV2: {_first_line(error)}") from error
    if output.shape != (2, WINDOW, 1):
        raise WeightsError(f"{path} is no TransNetV2: `output` is {list(output.shape)}, expected [2, {WINDOW}, 1]")


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


class DetectorBySize:
    """A detector from each change of the frames' size to the next: none can compare two sizes, and a clip has one."""

    def __init__(self, make: Callable[[], Detector]) -> None:
        self.joints: list[int] = []
        self._make, self._detector = make, make()
        self._size: tuple[int, int] | None = None
        self._shots: list[Span] = []  # before the last joint
        self._count = 0

    def push(self, small: np.ndarray, size: tuple[int, int]) -> float:
        """As a detector's, for a frame whose own size is (width, height)."""
        if self._size not in (None, size):
            self._shots, self._detector = self.shots(), self._make()
            self.joints.append(self._count)
        self._size = size
        self._count += 1
        return self._detector.push(small)

    def shots(self) -> list[Span]:
        """The shots of all frames so far, after which none comes."""
        first = self.joints[-1] if self.joints else 0
        return self._shots + [(first + start, first + end) for start, end in self._detector.shots(self._count - first)]
