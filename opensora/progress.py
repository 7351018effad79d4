"""Progress of long work: a bar on a terminal, a plain line now and then elsewhere."""

import sys
import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

Item = TypeVar("Item")
PLAIN_EVERY_S = 5.0


def track(items: Iterable[Item], total: int, label: str) -> Iterator[Item]:
    """Yield `items` and show how many of `total` are done."""
    if sys.stderr.isatty():
        from rich.console import Console
        from rich.progress import track as bar

        yield from bar(items, label, total, console=Console(stderr=True), transient=True)
        return
    last = time.monotonic()
    for done, item in enumerate(items, 1):
        yield item
        now = time.monotonic()
        if now - last >= PLAIN_EVERY_S and done < total:
            print(f"{label} {done}/{total}", file=sys.stderr, flush=True)
            last = now
