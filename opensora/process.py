"""Child processes that get the time to stop well when their parent is told to stop."""

import multiprocessing
import os
import signal
import subprocess
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager


@contextmanager
def shielded() -> Iterator[None]:
    """Processes started inside do not see Ctrl-C, so that they do not all print a traceback; their parent ends them."""
    if threading.current_thread() is not threading.main_thread():  # only that one may set signals
        yield
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def run_child(command: Sequence[str]) -> int:
    """Run a command and return its exit code, negative for a signal.

    SIGTERM is passed on. Ctrl-C reaches the child by itself, as it belongs to the same terminal. Either way the child
    is waited for: training writes a checkpoint before it ends.

    Raises:
        KeyboardInterrupt: Ctrl-C came too late to stop the child, which ended well.
    """
    child = subprocess.Popen(command)
    before = signal.signal(signal.SIGTERM, lambda number, frame: child.terminate())
    try:
        interrupted = False
        while child.returncode is None:
            try:
                child.wait()
            except KeyboardInterrupt:
                interrupted = True
        if interrupted and child.returncode == 0:
            raise KeyboardInterrupt
        return child.returncode
    finally:
        signal.signal(signal.SIGTERM, before)


def end_with_parent() -> None:
    """End this process when the one that started it is gone: nobody would read what it does."""
    known = multiprocessing.parent_process()  # by now it may be gone
    parent = (known.pid if known else None) or os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os._exit(1)

    threading.Thread(target=watch, daemon=True, name="end with parent").start()
