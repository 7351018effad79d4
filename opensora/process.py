"""Child processes that get the time to stop well when their parent is told to stop."""

import signal
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager


@contextmanager
def shielded() -> Iterator[None]:
    """Processes started inside do not see Ctrl-C, so that they do not all print a traceback; their parent ends them."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def run_child(command: Sequence[str], environment: Mapping[str, str] | None = None) -> int:
    """Run a command and return its exit code, negative for a signal.

    SIGTERM is passed on. Ctrl-C reaches the child by itself, as it belongs to the same terminal. Either way the child
    is waited for: training writes a checkpoint before it ends.
    """
    child = subprocess.Popen(command, env=environment)
    before = signal.signal(signal.SIGTERM, lambda number, frame: child.terminate())
    try:
        while True:
            try:
                return child.wait()
            except KeyboardInterrupt:
                continue
    finally:
        signal.signal(signal.SIGTERM, before)
