"""Times of the frames of a video, always rising, whatever the file's timestamps are."""

from collections import deque
from fractions import Fraction

MAX_FPS = 240.0
MAX_GAP_S = 10.0  # from one frame to the next; more is a jump of the clock, as in joined broadcasts
MAX_BACK_S = 0.5  # from one frame to the next; more is a clock that began anew
SAME_S = 1e-6  # by which a frame whose time is not past the one before it follows that one


class Clock:
    """Times of frames in seconds from the first."""

    def __init__(self, fps: float) -> None:
        self.step = 1 / min(fps, MAX_FPS)
        self.offset = 0.0
        self.last: float | None = None

    def tell(self, stamp: float | None, intact: bool = True) -> float:
        """The time of the next frame, whose timestamp is `stamp` seconds.

        One without a timestamp, or after a jump of the clock, follows by the usual step; one that is not past the frame
        before it follows at once. After a jump all times are moved, unless the frame is not intact: decoders show such
        ones out of turn.
        """
        if self.last is None:
            self.offset, self.last = stamp or 0.0, 0.0
            return 0.0
        following = self.last + self.step
        seconds = following if stamp is None else stamp - self.offset
        if stamp is not None and not -MAX_BACK_S <= seconds - self.last <= MAX_GAP_S:
            self.offset, seconds = stamp - following if intact else self.offset, following
        self.last = max(seconds, self.last + SAME_S)
        return self.last


class Slots:
    """Times of display for AVI, whose packets have a place in the order of the file and no time of display.

    The packets' places, in order, are those of the frames as they are shown.
    """

    def __init__(self) -> None:
        self._free: deque[tuple[int, float]] = deque()

    def put(self, number: int, place: int | None, unit: Fraction | None) -> None:
        """Packet `number` lies at `place` units of time."""
        if place is not None and unit is not None:
            self._free.append((number, float(place * unit)))

    def take(self, number: int, is_key: bool) -> float | None:
        """Seconds at which the next frame is shown, made of packet `number`.

        No frame from before a key frame is shown after it, so that places of frames that did not come out end there.
        """
        while is_key and len(self._free) > 1 and self._free[0][0] < number:
            self._free.popleft()
        return self._free.popleft()[1] if self._free else None
