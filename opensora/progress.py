"""Progress of long work: a bar on a terminal, a plain line now and then elsewhere."""

import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TypeVar

Item = TypeVar("Item")
PLAIN_EVERY_S = 5.0


def track(items: Iterable[Item], total: int, label: str, *, lines: bool = True) -> Iterator[Item]:
    """Yield `items` and show how many of `total` are done; `lines=False` for work that prints lines of its own."""
    with progress(total, label, lines=lines) as advance:
        for item in items:
            yield item
            advance()


@contextmanager
def progress(total: int, label: str, *, lines: bool = True) -> Iterator[Callable[[], None]]:
    """Show how many of `total` are done; gives a function to call at each. For work that is no simple loop."""
    if sys.stderr.isatty():
        from rich.console import Console
        from rich.progress import Progress

        with Progress(console=Console(stderr=True), transient=True) as bars:
            task = bars.add_task(label, total=total)
            yield lambda: bars.advance(task)
        return
    say = plain_lines(label, total) if lines else None
    count = 0

    def advance() -> None:
        nonlocal count
        count += 1
        if say:
            say(count)

    yield advance


def plain_lines(label: str, total: int) -> Callable[..., None]:
    """A function to call with the number done; prints a line every few seconds. For processes that share a terminal."""
    last = time.monotonic()

    def say(done: int, *_: object) -> None:
        nonlocal last
        now = time.monotonic()
        if now - last >= PLAIN_EVERY_S and done < total:
            print(f"{label} {done}/{total}", file=sys.stderr, flush=True)
            last = now

    return say
