"""Batches of a plan, read ahead in processes of their own or in this one."""

import signal
from collections.abc import Generator
from itertools import islice
from typing import Any, Protocol

import torch
from torch.utils.data import DataLoader, Dataset

from opensora.config import UserError
from opensora.data.buckets import Draw, Plan
from opensora.data.clip_table import ClipTable
from opensora.process import end_with_parent, shielded
from opensora.step import StepError

LAST_STEP_S = 20  # how long a worker outlives SIGTERM, of the half minute that is usual before SIGKILL


class Samples(Protocol):
    """A data set: makes the sample that a draw names."""

    clips: ClipTable

    def sample(self, draw: Draw) -> dict[str, Any]:
        """Tensors, which a batch stacks, and other values, which it lists."""


class _Batches(Dataset):
    """Its index is the list of a batch's draws, its item the batch, or the error that says why there is none."""

    def __init__(self, data: Samples) -> None:
        self.data = data

    def __getitem__(self, draws: list[Draw]) -> dict[str, Any] | UserError:
        try:
            samples = [self.data.sample(draw) for draw in draws]
        except UserError as error:  # torch would wrap the message in a traceback
            return error
        return {name: _gather([sample[name] for sample in samples]) for name in samples[0]}


def _gather(values: list[Any]) -> Any:
    return torch.stack(values) if isinstance(values[0], torch.Tensor) else values


def load_batches(
    data: Samples, plan: Plan, rank: int, start: int, stop: int, workers: int = 0
) -> Generator[dict[str, Any]]:
    """The batches of a process for the steps [start, stop).

    The samples are the same with any number of workers. They read ahead, but a run's position is the number of steps
    that it has done: what lies read when it stops is read again.

    Args:
        workers: processes that read; 0 reads in this one. Each needs the data set's memory once.

    Raises:
        StepError: a sample cannot be read, or a worker died.
    """
    loader = DataLoader(
        _Batches(data),
        batch_size=None,  # the plan has made the batches
        sampler=islice(plan.batches(rank, start), stop - start),
        num_workers=workers,
        collate_fn=_as_it_is,
        worker_init_fn=_begin_worker,
        multiprocessing_context="spawn" if workers else None,  # fork would copy locks that other threads hold
        generator=torch.Generator(),  # else it draws from the global one
    )
    with shielded():
        batches = iter(loader)
    try:
        for batch in batches:
            if isinstance(batch, UserError):
                raise batch
            yield batch
    except RuntimeError as error:
        if not str(error).startswith("DataLoader worker"):
            raise
        raise StepError(
            f"a process that reads training data died ({error}); start again to resume. If memory ran out, "
            "lower loader_workers; in a container /dev/shm must hold some batches"
        ) from error
    finally:
        del batches  # now, not when an error's traceback is collected: this ends the workers


def _as_it_is(batch: Any) -> Any:
    return batch


def _begin_worker(number: int) -> None:
    """Signals for the whole group are the training process's to answer: its last step still needs this worker."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: signal.alarm(LAST_STEP_S))  # SIGALRM ends the process
    end_with_parent()
