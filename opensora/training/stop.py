"""Being told to stop: before the first step a process ends at once, in the loop between two steps.

Nothing heavy is imported here: an entry point calls `listen` before it imports torch, which takes seconds.
"""

import os
import signal
import threading
from dataclasses import dataclass, field
from types import FrameType
from typing import Any

from opensora.config import UserError

SIGNALS = (signal.SIGTERM, signal.SIGINT)


class Stopped(UserError):
    """SIGTERM or Ctrl-C arrived; a checkpoint was written, and the next start goes on from it."""

    def __init__(self, number: int) -> None:
        super().__init__(f"stopped by {signal.Signals(number).name} after a checkpoint; start again to resume")
        self.number = number
        self.exit_code = 128 + number


def listen() -> None:
    """End this process with 128 + the signal's number and one line when it is told to stop while no loop answers.

    Nothing is lost then: no step is being done. Without a handler the first process of a container would not end at
    all, as the kernel gives it no default action. For entry points.
    """
    for number in SIGNALS:
        signal.signal(number, _leave)


def _leave(number: int, frame: FrameType | None) -> None:
    # Not SystemExit: an import in progress may catch it, and leaving the interpreter takes as long as it likes.
    if os.environ.get("RANK", "0") == "0":
        os.write(2, f"stopped by {signal.Signals(number).name}; start the same command again to resume\n".encode())
    os._exit(128 + number)


@dataclass
class StopFlag:
    """The signal that arrived while this context was entered, or 0; the loop looks at it between steps."""

    number: int = 0
    _before: dict[signal.Signals, Any] = field(default_factory=dict)

    def __enter__(self) -> "StopFlag":
        if threading.current_thread() is threading.main_thread():  # only that one may set signals
            self._before = {number: signal.signal(number, self._set) for number in SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _set(self, number: int, frame: FrameType | None) -> None:
        self.number = number
