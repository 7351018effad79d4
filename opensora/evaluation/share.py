"""Work shared by processes: each takes a GPU of its own where there are some, and leaves a file a task."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol, TypeVar, cast

from opensora.data.workers import run_tasks
from opensora.progress import track
from opensora.step import UNWRITABLE, StepError

Value = TypeVar("Value")
TIMEOUT_S = 24 * 3600.0


class Task(Protocol):
    """A piece of work that knows where its result goes."""

    @property
    def name(self) -> str:
        """What it belongs to, as a stage."""

    @property
    def result(self) -> Path:
        """Written last: the task is done when it is there."""

    def do(self) -> None:
        """Do it, and leave `result`."""


def share(tasks: Sequence[Task], processes: int, may_fail: str = "") -> str:
    """Do all tasks whose result is not there yet.

    Args:
        may_fail: name of tasks whose failure is reported, not raised.

    Returns:
        Why a task of that name failed; empty if none did.

    Raises:
        StepError: another task failed.
        OSError: nothing can be written any more, which is no fault of what was at work.
    """
    left = [task for task in tasks if not task.result.is_file()]
    failure = ""
    for outcome in track(run_tasks(_do, left, processes, TIMEOUT_S), len(left), "evaluating (batches)"):
        if outcome.error_number in UNWRITABLE:
            raise OSError(outcome.error_number, outcome.failure)
        if outcome.failure:
            name = left[outcome.index].name
            if name != may_fail:
                raise StepError(f"generation with {name} failed: {outcome.failure}")
            failure = failure or outcome.failure
    return failure


def _do(task: Task) -> None:
    import torch

    from opensora.data.gpu import process_device

    torch.set_num_threads(1)
    device = process_device()
    if device != "cpu":
        torch.cuda.set_device(device)  # what is sent to "cuda" from here on goes there
    task.do()


_loaded: dict[str, tuple[object, object]] = {}


def keep_loaded(kind: str, key: object, load: Callable[[], Value]) -> Value:
    """What `load` makes; this process keeps one of a kind, until another `key` is asked for."""
    if kind not in _loaded or _loaded[kind][0] != key:
        _loaded.pop(kind, None)  # memory is free before the next one is loaded
        _loaded[kind] = (key, load())
    return cast(Value, _loaded[kind][1])
