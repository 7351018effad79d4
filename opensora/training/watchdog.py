"""A watchdog in each training process: when no step ends for too long, it says where the process stands."""

import logging
import sys
import threading
import time
import traceback
from pathlib import Path
from types import FrameType, TracebackType

PACKAGE = "opensora"
log = logging.getLogger(__name__)


class Watchdog:
    """A context in which `beat` is to be called at least every `timeout_s` seconds.

    When it is not, `stalled-rank-3.txt` holds the stacks of all threads, and one line is logged. All processes wait for
    one that is late, so all are named: it is the one whose line names another place than those of the rest. A process
    that waits in a collective lets other threads run. The time is monotonic: setting the clock changes nothing.
    """

    def __init__(self, timeout_s: float, rank: int, folder: Path) -> None:
        self.timeout_s, self.rank = timeout_s, rank
        self.path = folder / f"stalled-rank-{rank}.txt"
        self._last = (0, time.monotonic())
        self._ended = threading.Event()
        self._watched = threading.get_ident()
        self._thread = threading.Thread(target=self._watch, daemon=True, name="watchdog")

    def __enter__(self) -> "Watchdog":
        self._last = (self._last[0], time.monotonic())
        self._watched = threading.get_ident()
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, at: TracebackType | None) -> None:
        self._ended.set()
        self._thread.join()

    def beat(self, step: int) -> None:
        """A step has ended, the `step`-th of the run."""
        self._last = (step, time.monotonic())

    def _watch(self) -> None:
        named = None  # the beat after which the process was named: once a stall
        while True:
            now, last = time.monotonic(), self._last  # in this order, so that no beat between them makes it late
            left = self.timeout_s - (now - last[1])
            if left <= 0 and last != named:
                self._name(last[0])
                named = last
            if self._ended.wait(left if left > 0 else min(self.timeout_s, 1.0)):
                return

    def _name(self, step: int) -> None:
        frames = sys._current_frames()
        frames.pop(threading.get_ident(), None)
        place = _place(frames.get(self._watched))
        saved = f"all stacks are in {self.path}"
        try:
            self.path.write_text(self._stacks(frames, step))
        except OSError as error:
            saved = f"its stacks cannot be written to {self.path} ({error})"
        message = "rank %d: no step for %g s after step %d; it is %s; %s"
        log.error(message, self.rank, self.timeout_s, step, place, saved)

    def _stacks(self, frames: dict[int, FrameType], step: int) -> str:
        names = {thread.ident: thread.name for thread in threading.enumerate()}
        parts = [f"rank {self.rank}: no step for {self.timeout_s:g} s after step {step}\n"]
        for ident, frame in sorted(frames.items(), key=lambda item: item[0] != self._watched):
            words = " (training)" if ident == self._watched else ""
            parts.append(f"\nThread {names.get(ident, ident)}{words}, innermost call last:\n")
            parts += traceback.format_stack(frame)
        return "".join(parts)


def _place(frame: FrameType | None) -> str:
    """Where a thread is: the innermost call, and the innermost one of this package if that is another."""
    if frame is None:
        return "in a thread that has ended"
    ours: FrameType | None = frame
    while ours and not ours.f_globals.get("__name__", "").startswith(f"{PACKAGE}."):
        ours = ours.f_back
    return _line(frame) if ours in (None, frame) else f"{_line(frame)}, called {_line(ours)}"


def _line(frame: FrameType) -> str:
    return f"in {frame.f_code.co_name} ({Path(frame.f_code.co_filename).name}:{frame.f_lineno})"
