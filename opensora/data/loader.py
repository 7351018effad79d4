"""Batches of a plan, read ahead in processes of their own or in this one."""

import logging
import signal
import threading
from collections.abc import Container, Generator, Iterator, Mapping
from contextlib import contextmanager
from itertools import islice
from typing import Any, Protocol

import torch
from torch.utils.data import DataLoader, Dataset

from opensora.config import UserError
from opensora.data.buckets import Batch, Draw, Plan
from opensora.data.clip_table import ClipTable
from opensora.process import end_with_parent, shielded
from opensora.step import StepError

LAST_STEP_S = 20  # how long a worker outlives SIGTERM, of the half minute that is usual before SIGKILL
log = logging.getLogger(__name__)


class Samples(Protocol):
    """A data set: makes the sample that a draw names. Pickled, it leaves its table behind."""

    clips: ClipTable

    def sample(self, draw: Draw, clip: Mapping[str, Any]) -> dict[str, Any]:
        """Tensors, which a batch stacks, and other values, which it lists.

        Args:
            clip: the draw's row of `clips`.
        """


class WorkerDied(Exception):
    """A process that reads ended before its time."""


Order = tuple[Batch, list[dict[str, Any]]]  # draws, and the rows of their clips: a worker needs no table of millions


class _Batches(Dataset):
    """Its index is an order, its item the batch, or the error that says why there is none."""

    def __init__(self, data: Samples) -> None:
        self.data = data

    def __getitem__(self, order: Order) -> dict[str, Any] | UserError:
        batch, clips = order
        try:
            samples = [self.data.sample(draw, clip) for draw, clip in zip(batch.draws, clips, strict=True)]
        except UserError as error:  # torch would wrap the message in a traceback
            return error
        gathered = {name: _gather([sample[name] for sample in samples]) for name in samples[0]}
        return gathered | {"position": batch.position}


def _gather(values: list[Any]) -> Any:
    return torch.stack(values) if isinstance(values[0], torch.Tensor) else values


def load_batches(
    data: Samples,
    plan: Plan,
    rank: int,
    *,
    start: int,
    steps: int,
    workers: int = 0,
    restarts: int = 0,
    skip: Container[int] = (),
) -> Generator[dict[str, Any]]:
    """The batches of a process for `steps` steps from position `start` on: `plan.accumulate` micro-batches a step.

    The samples are the same with any number of workers. They read ahead, but a run's position is that of the batch
    which it has trained on last, under "position": what lies read when it stops is read again. So it is when a worker
    dies: all are started again, and go on with the batch that is wanted.

    Args:
        rank: number of the process among those that read samples of their own.
        workers: processes that read; 0 reads in this one.
        restarts: how often workers that died are started again.
        skip: positions that are passed over.

    Raises:
        StepError: a sample cannot be read, or workers died too often.
    """
    left, position, done, died = steps * plan.accumulate, start, 0, 0
    while left:
        batches = islice(plan.batches(rank, position, skip), done, done + left)
        orders = ((batch, [data.clips.row(draw.row) for draw in batch.draws]) for batch in batches)
        try:
            for batch in _read(data, orders, workers):
                done = done + 1 if batch["position"] == position else 1
                position, left = batch["position"], left - 1
                yield batch
        except WorkerDied as error:
            died += 1
            advice = "if memory ran out, lower loader_workers; in a container /dev/shm must hold some batches"
            if died > restarts:
                raise StepError(
                    f"a process that reads training data died ({error}), after {restarts} that were replaced; "
                    f"{advice}; start again to resume"
                ) from error
            log.warning("a process that reads training data died (%s) and is replaced; %s", error, advice)


def _read(data: Samples, orders: Iterator[Order], workers: int) -> Generator[dict[str, Any]]:
    """The batches of the orders; raises what `load_batches` does, and WorkerDied."""
    loader = DataLoader(
        _Batches(data),
        batch_size=None,  # the plan has made the batches
        sampler=orders,
        num_workers=workers,
        collate_fn=_as_it_is,
        worker_init_fn=_begin_worker,
        multiprocessing_context="spawn" if workers else None,  # fork would copy locks that other threads hold
        generator=torch.Generator(),  # else it draws from the global one
    )
    with shielded(), _deaths_wait():
        batches = iter(loader)
    try:
        while True:
            died = ""
            try:
                batch = next(batches, None)
            except (RuntimeError, OSError, EOFError) as error:
                if not workers or not _is_death(error):
                    raise
                died = str(error) or type(error).__name__
            if died:  # raised here, as that error's traceback would keep the other workers
                raise WorkerDied(died)
            if batch is None:
                return
            if isinstance(batch, UserError):
                raise batch
            yield batch
    finally:
        del batches  # now, not when an error's traceback is collected: this ends the workers


def _is_death(error: Exception) -> bool:
    """Whether a worker ended, or its connection broke, which may show first; not: an error that a worker passed on."""
    message = str(error)
    return message.startswith("DataLoader worker") if type(error) is RuntimeError else not message.startswith("Caught ")


@contextmanager
def _deaths_wait() -> Iterator[None]:
    """A worker's death is noticed when its batch is wanted, and not, as torch has it, in the middle of any line."""
    if threading.current_thread() is not threading.main_thread():  # only that one may set signals
        yield
        return
    before = signal.getsignal(signal.SIGCHLD)
    try:
        yield
    finally:
        signal.signal(signal.SIGCHLD, before or signal.SIG_DFL)


def _as_it_is(batch: Any) -> Any:
    return batch


def _begin_worker(number: int) -> None:
    """Signals for the whole group are the training process's to answer: its last step still needs this worker."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: signal.alarm(LAST_STEP_S))  # SIGALRM ends the process
    end_with_parent()
