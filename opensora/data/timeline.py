"""When each frame of a video is shown, and what a copy at a constant rate makes of it."""

from dataclasses import dataclass
from fractions import Fraction

import numpy as np

MAX_FPS = 240
BROKEN_FPS = 1000.0  # more frames a second on the average: the timestamps mean nothing
NEAR = 0.25  # of a frame's time: times closer than that are the same
STANDARD_RATES = (*(Fraction(rate * 1000, 1001) for rate in (24, 30, 60, 120)), *map(Fraction, (24, 25, 30, 50, 60)))


@dataclass(frozen=True)
class Timeline:
    """Times of all frames in order of display."""

    seconds: np.ndarray  # float64 [N], rising from 0
    rate: Fraction  # frames a second of a copy that loses none
    constant: bool  # that copy is frame for frame the same

    @property
    def frames(self) -> int:
        """Frames in all."""
        return len(self.seconds)

    def at(self, frame: int) -> float:
        """Seconds at which a frame begins; for the number of frames, at which the last one ends."""
        if frame < self.frames:
            return float(self.seconds[frame])
        return float(self.seconds[-1]) + self.period

    @property
    def period(self) -> float:
        """Seconds of a frame."""
        if self.constant and self.frames > 1:
            return float(self.seconds[-1]) / (self.frames - 1)
        return 1 / float(self.rate)

    def frame_at(self, seconds: float) -> int:
        """The first frame that begins then or later; the number of frames when none does."""
        return int(np.searchsorted(self.seconds, seconds - NEAR * self.period))

    def repeats(self, start: int, end: int, fps: Fraction) -> np.ndarray:
        """How often each of the frames [start, end) is shown in a copy of them at `fps`: int [end - start]."""
        if self.constant and fps == self.rate:
            return np.ones(end - start, np.int64)
        lasts = self.at(end) - self.at(start)
        ticks = np.arange(max(1, int(np.ceil(lasts * float(fps) - NEAR)))) / float(fps)
        shown = np.searchsorted(self.seconds[start:end], self.at(start) + ticks + NEAR / float(fps), "right") - 1
        return np.bincount(shown, minlength=end - start)


def measure_timeline(seconds: np.ndarray, nominal: Fraction) -> Timeline:
    """The timeline of frames shown at these times, at least one.

    Args:
        nominal: frames a second as the file says; believed where it agrees with the times.
    """
    count = len(seconds)
    mean = float(seconds[-1]) / max(count - 1, 1)
    if mean < 1 / BROKEN_FPS:  # or a single frame
        return Timeline(np.arange(count) / float(nominal), min(nominal, Fraction(MAX_FPS)), True)
    constant = bool(np.abs(seconds - mean * np.arange(count)).max() < 0.5 * mean)
    if constant:
        agrees = abs(float(nominal) * mean - 1) * count < 0.5  # of a frame, at the end
        rate = nominal if agrees else _standard(1 / mean)
    else:
        # Not the mean: where frames were left out, the others still come at the camera's rate.
        rate = _standard(1 / float(np.median(np.diff(seconds))))
    limited = min(rate, Fraction(MAX_FPS)).limit_denominator(1001)
    return Timeline(seconds, limited, constant and limited == rate)


def _standard(rate: float) -> Fraction:
    """The usual rate next to a measured one, whose times may be rounded to milliseconds."""
    nearest = min(STANDARD_RATES, key=lambda usual: abs(float(usual) / rate - 1))
    return nearest if abs(float(nearest) / rate - 1) < 0.02 else Fraction(rate).limit_denominator(1001)
