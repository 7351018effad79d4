"""The executor: calls a step's function on every shard, in this process, in a pool of processes, or by Ray Data.

A shard function reads one part of the manifest before it and writes one part (last) and the files that belong to it,
alone: which executor calls it, and in what order, changes no byte.
"""

import json
import logging
import pickle
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

from opensora.config import ExecutorConfig
from opensora.data.workers import FOREVER_S, Outcome, attempt, call_isolated, listen, run_tasks, stop_isolated
from opensora.progress import progress
from opensora.step import UNWRITABLE, StepError

STATUS = "shards.jsonl"
SHOWN = 3  # failures in an error's message


class ShardTask(Protocol):
    """All that a shard function needs, pickled to where it runs."""

    @property
    def part(self) -> Path:
        """The part of the manifest that the function writes when all else is written: the mark that it is done."""


AnyTask = TypeVar("AnyTask", bound=ShardTask)


@dataclass(frozen=True)
class _Timed:
    """A shard function that also says how long it took; picklable."""

    function: Callable[[Any], None]

    def __call__(self, task: ShardTask) -> float:
        start = time.monotonic()
        self.function(task)
        return time.monotonic() - start


def run_shards(
    function: Callable[[AnyTask], None],
    tasks: Sequence[AnyTask],
    executor: ExecutorConfig,
    workers: int,
    label: str,
    items: int = 0,
) -> None:
    """Call `function` on every task whose part is not there yet; one that fails is tried again.

    Every attempt leaves a line in `shards.jsonl` beside the parts: shard, status, seconds, attempt, error.

    Args:
        function: importable by name.
        items: items of all tasks, for the progress; the function says `advance()` after each. 0 counts shards.

    Raises:
        StepError: a shard failed in every attempt; the others are done.
        OSError: nothing can be written any more; no shard is begun after that.
    """
    left = [task for task in tasks if not task.part.is_file()]
    if not left:
        return
    timed = _Timed(function)
    share = len(left) / len(tasks)  # a resumed run shows what is left
    with progress(round(items * share) or len(left), label) as bar:
        before = listen(bar if items else lambda: None)
        try:
            for tries in range(executor.retries + 1):
                failed = []
                for outcome in _outcomes(timed, left, executor, workers):
                    task = left[outcome.index]
                    _note(task.part, outcome, tries + 1)
                    if outcome.error_number in UNWRITABLE:
                        raise OSError(outcome.error_number, outcome.failure)
                    if outcome.failure:
                        failed.append((task, outcome))
                    elif not items:
                        bar()
                if not failed:
                    break
                left = [task for task, _ in failed]
        finally:
            listen(before)
    if failed:
        _raise([(task.part, outcome) for task, outcome in failed], len(tasks))


def _raise(failed: list[tuple[Path, Outcome[float]]], total: int) -> None:
    said = "; ".join(f"{path.stem}: {outcome.failure}" for path, outcome in failed[:SHOWN])
    more = f" and {len(failed) - SHOWN} more" if len(failed) > SHOWN else ""
    raise StepError(f"{len(failed)} of {total} shards failed ({said}{more}); mend it and start again: the rest is done")


def _note(part: Path, outcome: Outcome[float], attempt_number: int) -> None:
    line = {
        "shard": part.stem.removeprefix("manifest-"),
        "status": "failed" if outcome.failure else "done",
        "seconds": round(outcome.value or 0.0, 3),
        "attempt": attempt_number,
        "error": outcome.failure,
        "host": socket.gethostname(),
    }
    with (part.parent / STATUS).open("a") as handle:
        handle.write(json.dumps(line) + "\n")


def _outcomes(
    function: _Timed, tasks: Sequence[AnyTask], executor: ExecutorConfig, workers: int
) -> Iterator[Outcome[float]]:
    match executor.kind:
        case "pool":
            yield from run_tasks(function, tasks, workers)
        case "sequential":
            try:
                for index, task in enumerate(tasks):
                    outcome = attempt(function, task)
                    yield Outcome(index, outcome.value, outcome.failure, outcome.error_number)
            finally:
                stop_isolated()
        case "ray":
            yield from _ray_outcomes(function, tasks, executor.ray_address, workers)


def _ray_outcomes(function: _Timed, tasks: Sequence[AnyTask], address: str, workers: int) -> Iterator[Outcome[float]]:
    """By Ray Data: a row a task. All machines of the cluster must see the same folders."""
    try:
        import ray
        import ray.data
    except ImportError:
        raise StepError("executor.kind is ray, which is not installed: pip install 'opensora-workflow[ray]'") from None
    ours = not ray.is_initialized()
    if ours:
        where: dict[str, Any] = {"address": address} if address else {"num_cpus": workers, "include_dashboard": False}
        ray.init(**where, log_to_driver=False, logging_level=logging.ERROR)
    try:
        ray.data.DataContext.get_current().enable_progress_bars = False
        rows = [{"index": index, "task": pickle.dumps(task)} for index, task in enumerate(tasks)]
        data = ray.data.from_items(rows, override_num_blocks=len(rows))
        for row in data.map(_RayCall(function), concurrency=min(workers, len(rows))).iter_rows():
            yield pickle.loads(row["outcome"])
    except ray.exceptions.RayError as error:
        raise StepError(f"Ray gave up: {error}; what is done is kept, start again to go on") from error
    finally:
        if ours:
            ray.shutdown()


@dataclass(frozen=True)
class _RayCall:
    """One call in a process of its own: Ray would try a shard that kills its worker again and again, without end."""

    function: _Timed

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        outcome = call_isolated(self.function, pickle.loads(row["task"]), FOREVER_S)
        value = Outcome(int(row["index"]), outcome.value, outcome.failure, outcome.error_number)
        return {"outcome": pickle.dumps(value)}
