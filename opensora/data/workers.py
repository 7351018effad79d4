"""Worker processes for work that nobody vouches for: a hang is ended at a time limit, and a crash is a result."""

import atexit
import multiprocessing
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from typing import Any, Generic, TypeVar

from opensora.process import end_with_parent, shielded

Task = TypeVar("Task")
Value = TypeVar("Value")
STOP_S = 5.0  # an idle worker has that long to end by itself
FOREVER_S = 20 * 24 * 3600.0  # poll waits no longer than 24 days


@dataclass(frozen=True)
class Outcome(Generic[Value]):
    """What became of one task: a value, or the reason why there is none."""

    index: int
    value: Value | None = None
    failure: str = ""  # "timeout: …", "crashed: …" or the message of an exception
    error_number: int | None = None  # of an OSError


@dataclass(frozen=True)
class _Tick:
    """What a worker sends for each item of a task that is done."""


_tick: Callable[[], None] = lambda: None  # noqa: E731 (replaced where somebody listens)


def advance() -> None:
    """Say that one item of the task at work is done, to whoever shows the progress."""
    _tick()


def listen(tick: Callable[[], None]) -> Callable[[], None]:
    """From now on `advance` of this process calls `tick`; returns what it called before."""
    global _tick
    before, _tick = _tick, tick
    return before


def attempt(function: Callable[[Any], Any], task: object) -> Outcome[Any]:
    """Call `function`; any failure is the outcome."""
    try:
        return Outcome(0, function(task))
    except Exception as error:
        number = error.errno if isinstance(error, OSError) else None
        return Outcome(0, failure=str(error) or type(error).__name__, error_number=number)


@contextmanager
def share_cores(place: int, sharers: int) -> Iterator[None]:
    """Processes started inside keep to their share of the cores that this thread may use: `place` of 0…`sharers` - 1.

    Shares are equal, to one core. An encoder's threads live for moments, by which Linux moves two workers onto one core
    while another idles. With fewer cores than sharers, or where a process cannot choose, nothing changes.
    """
    if not hasattr(os, "sched_setaffinity"):
        yield
        return
    cores = sorted(os.sched_getaffinity(0))
    share = cores[place * len(cores) // sharers : (place + 1) * len(cores) // sharers]
    if len(cores) < sharers or len(share) == len(cores):
        yield
        return
    with suppress(OSError):
        os.sched_setaffinity(0, share)
    try:
        yield
    finally:
        with suppress(OSError):
            os.sched_setaffinity(0, cores)


class Worker(Generic[Task, Value]):
    """One process that calls `function` on what it is given; it ends with this process, however that ends."""

    def __init__(self, function: Callable[[Task], Value], place: int = 0, sharers: int = 1) -> None:
        """Start it, on share `place` of `sharers` of the cores; see `share_cores`."""
        self.place = place
        context = multiprocessing.get_context("spawn")  # fork would copy locks that other threads hold
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(function, theirs))  # may have workers of its own
        with shielded(), share_cores(place, sharers):
            self.process.start()
        theirs.close()
        self.index: int | None = None
        self.deadline = 0.0

    def give(self, index: int, task: Task, timeout_s: float) -> None:
        """Start work on a task."""
        self.index, self.deadline = index, time.monotonic() + timeout_s
        self.pipe.send(task)

    def take(self, timeout_s: float) -> Outcome[Value] | _Tick:
        """What the process sent, once its pipe is ready."""
        assert self.index is not None
        try:
            message: Outcome[Value] | _Tick = self.pipe.recv()
        except (EOFError, ConnectionResetError):
            self.process.join()
            return Outcome(self.index, failure=f"crashed: the worker ended with code {self.process.exitcode}")
        if isinstance(message, _Tick):
            return message
        return Outcome(self.index, message.value, message.failure, message.error_number)

    def stop(self) -> None:
        """End the process: an idle one by closing its pipe, a busy or stuck one by force."""
        self.pipe.close()
        if self.index is None:
            self.process.join(STOP_S)
        self.process.kill()
        self.process.join()


def _serve(function: Callable[[Task], Value], pipe: Connection) -> None:
    end_with_parent()
    listen(lambda: pipe.send(_Tick()))
    try:
        while True:
            pipe.send(attempt(function, pipe.recv()))
    except (EOFError, BrokenPipeError):
        return
    finally:
        stop_isolated()


def run_tasks(
    function: Callable[[Task], Value], tasks: Sequence[Task], workers: int, timeout_s: float = FOREVER_S
) -> Iterator[Outcome[Value]]:
    """Run `function` on every task in worker processes; outcomes come as they are ready.

    Args:
        function: importable by name; its argument and result are pickled.
        timeout_s: seconds a task; a worker that takes longer is killed and replaced.
    """
    size = min(workers, len(tasks))
    pool: list[Worker[Task, Value]] = [Worker(function, place, size) for place in range(size)]
    waiting = iter(enumerate(tasks))
    open_tasks = 0
    try:
        for worker in pool:
            index, task = next(waiting)
            worker.give(index, task, timeout_s)
            open_tasks += 1
        while open_tasks:
            now = time.monotonic()
            nearest = min(worker.deadline for worker in pool if worker.index is not None)
            busy = {worker.pipe: worker for worker in pool if worker.index is not None}
            ready = [busy[pipe] for pipe in wait(list(busy), max(0.0, nearest - now)) if isinstance(pipe, Connection)]
            late = [w for w in busy.values() if w not in ready and time.monotonic() >= w.deadline]
            for worker in ready + late:
                outcome = _late(worker, timeout_s) if worker in late else worker.take(timeout_s)
                if isinstance(outcome, _Tick):
                    advance()
                    continue
                open_tasks -= 1
                if not worker.process.is_alive() or worker in late:
                    worker.stop()
                    worker = pool[worker.place] = Worker(function, worker.place, size)
                worker.index = None
                following = next(waiting, None)
                if following is not None:
                    worker.give(*following, timeout_s)
                    open_tasks += 1
                yield outcome
    finally:
        for worker in pool:
            worker.stop()


def _late(worker: Worker, timeout_s: float) -> Outcome:
    assert worker.index is not None
    return Outcome(worker.index, failure=f"timeout: no result after {timeout_s:g} s")


_isolated: dict[Callable, Worker] = {}  # a process keeps one worker a function: starting one takes a second


def call_isolated(function: Callable[[Task], Value], task: Task, timeout_s: float) -> Outcome[Value]:
    """Call `function` in a process of its own, which is killed after `timeout_s` seconds.

    Args:
        function: importable by name; its argument and result are pickled.
    """
    worker = _isolated.get(function)
    if worker is None or not worker.process.is_alive():
        worker = _isolated[function] = Worker(function)
    worker.give(0, task, timeout_s)
    outcome: Outcome[Value] | _Tick = _Tick()
    while isinstance(outcome, _Tick):
        if worker.pipe.poll(max(0.0, worker.deadline - time.monotonic())):
            outcome = worker.take(timeout_s)
        else:
            outcome = _late(worker, timeout_s)
    if not worker.process.is_alive() or outcome.failure.startswith("timeout"):
        _isolated.pop(function).stop()
    worker.index = None
    return outcome


def stop_isolated() -> None:
    """End the processes that `call_isolated` left waiting."""
    while _isolated:
        _, worker = _isolated.popitem()
        worker.stop()


atexit.register(stop_isolated)
