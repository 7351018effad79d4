"""Worker processes for work on files that nobody vouches for: each task has a time limit, and a crash is a result."""

import multiprocessing
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from typing import Generic, TypeVar

from opensora.process import shielded

Task = TypeVar("Task")
Value = TypeVar("Value")
STOP_S = 5.0  # an idle worker has that long to end by itself


@dataclass(frozen=True)
class Outcome(Generic[Value]):
    """What became of one task: a value, or the reason why there is none."""

    index: int
    value: Value | None = None
    failure: str = ""  # "timeout: …", "crashed: …" or the message of an exception


class _Worker(Generic[Task, Value]):
    def __init__(self, function: Callable[[Task], Value]) -> None:
        context = multiprocessing.get_context("spawn")  # fork would copy locks that other threads hold
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(function, theirs), daemon=True)
        with shielded():
            self.process.start()
        theirs.close()
        self.index: int | None = None
        self.deadline = 0.0

    def give(self, index: int, task: Task, timeout_s: float) -> None:
        self.index, self.deadline = index, time.monotonic() + timeout_s
        self.pipe.send(task)

    def stop(self) -> None:
        """End the process: an idle one by closing its pipe, a busy or stuck one by force."""
        self.pipe.close()
        if self.index is None:
            self.process.join(STOP_S)
        self.process.kill()
        self.process.join()


def _serve(function: Callable[[Task], Value], pipe: Connection) -> None:
    try:
        while True:
            task = pipe.recv()
            try:
                pipe.send((function(task), ""))
            except Exception as error:  # any failure of one item is that item's result
                pipe.send((None, str(error) or type(error).__name__))
    except EOFError:
        return


def run_tasks(
    function: Callable[[Task], Value], tasks: Sequence[Task], workers: int, timeout_s: float
) -> Iterator[Outcome[Value]]:
    """Run `function` on every task in worker processes; outcomes come as they are ready.

    Args:
        function: importable by name; its argument and result are pickled.
        timeout_s: seconds a task; a worker that takes longer is killed and replaced.
    """
    pool: list[_Worker[Task, Value]] = [_Worker(function) for _ in range(min(workers, len(tasks)))]
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
                outcome = _outcome(worker, late=worker in late, timeout_s=timeout_s)
                open_tasks -= 1
                if not worker.process.is_alive() or worker in late:
                    worker.stop()
                    pool[pool.index(worker)] = fresh = _Worker(function)
                    worker = fresh
                worker.index = None
                following = next(waiting, None)
                if following is not None:
                    worker.give(*following, timeout_s)
                    open_tasks += 1
                yield outcome
    finally:
        for worker in pool:
            worker.stop()


def _outcome(worker: _Worker[Task, Value], late: bool, timeout_s: float) -> Outcome[Value]:
    assert worker.index is not None
    if late:
        return Outcome(worker.index, failure=f"timeout: no result after {timeout_s:g} s")
    try:
        value, failure = worker.pipe.recv()
        return Outcome(worker.index, value, failure)
    except (EOFError, ConnectionResetError):
        worker.process.join()
        return Outcome(worker.index, failure=f"crashed: the worker ended with code {worker.process.exitcode}")
