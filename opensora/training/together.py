"""What one process does for all: the others wait for it, and end where it failed."""

from collections.abc import Callable
from typing import TypeVar

from opensora.parallel.engine import Engine

T = TypeVar("T")


def on_rank_zero(engine: Engine, action: Callable[[], T]) -> T | None:
    """Call `action` in rank 0 while the others wait; its result there, None elsewhere. Collective.

    Raises:
        SystemExit: in the other processes, when it raised in rank 0, which says why.
    """
    result, error = None, None
    if engine.rank == 0:
        try:
            result = action()
        except Exception as raised:  # told to the others first
            error = raised
    (failed,) = engine.any([error is not None])
    if error is not None:
        raise error
    if failed:
        raise SystemExit(1)
    return result
