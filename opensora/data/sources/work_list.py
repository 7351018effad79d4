"""The work list of `download`: every video once, with all its spans, in a file a shard; nothing stays in memory."""

import errno
import sqlite3
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from hashlib import blake2b, sha256
from itertools import groupby, islice
from operator import itemgetter
from pathlib import Path

from opensora.data.sources.item import Item
from opensora.data.sources.uri import stable_url

# Rows in the order of the list; a video that has several rows stands where it came first, with the others behind it.
GATHER = """
SELECT first.number, row.item FROM row AS first JOIN row ON row.key = first.key
WHERE NOT EXISTS (SELECT 1 FROM row AS earlier WHERE earlier.key = first.key AND earlier.number < first.number)
ORDER BY first.number, row.number
"""


@dataclass(frozen=True)
class WorkList:
    """What was written."""

    videos: int
    shards: int
    digest: str  # sha256 of all that decides what is brought


def write_work_list(
    items: Iterable[Item], folder: Path, shard_videos: int, identity: Callable[[Item], str]
) -> WorkList:
    """Write the files of all shards into the empty `folder`. Items of one URL become one, with the spans of all.

    The rows are gathered by a database on disk, which needs about twice the space of the list.

    Args:
        shard_videos: videos a shard.
        identity: what of an item, as text, decides what is brought.
    """
    digest, videos, shards = sha256(), 0, 0
    scratch = folder / "rows.sqlite"
    for shards, batch in enumerate(_batches(_gathered(items, scratch), shard_videos), 1):
        with items_file(folder, shards - 1).open("w", encoding="utf-8") as handle:
            for item in batch:
                handle.write(item.to_json() + "\n")
                digest.update(identity(item).encode() + b"\n")
        videos += len(batch)
    scratch.unlink()
    return WorkList(videos, shards, digest.hexdigest())


def items_file(folder: Path, shard: int) -> Path:
    """The file of a shard's items, one in JSON a line."""
    return folder / f"{shard:05d}.jsonl"


def read_items(path: Path) -> list[Item]:
    """The items of one shard."""
    with path.open(encoding="utf-8") as handle:
        return [Item.from_json(line) for line in handle]


def _gathered(items: Iterable[Item], scratch: Path) -> Iterator[Item]:
    base = sqlite3.connect(scratch, isolation_level=None)
    try:
        base.execute("PRAGMA journal_mode = OFF")  # a torn one is thrown away, not mended
        base.execute("PRAGMA synchronous = OFF")
        base.execute("CREATE TABLE row (number INTEGER PRIMARY KEY, key BLOB, item TEXT)")
        base.execute("BEGIN")
        base.executemany("INSERT INTO row VALUES (NULL, ?, ?)", map(_row, items))
        base.execute("CREATE INDEX by_key ON row (key, number)")
        base.execute("COMMIT")
        for _, rows in groupby(base.execute(GATHER), key=itemgetter(0)):
            yield _merge([Item.from_json(text) for _, text in rows])
    except sqlite3.OperationalError as error:
        if error.sqlite_errorcode == sqlite3.SQLITE_FULL:
            raise OSError(errno.ENOSPC, f"no space for the list of videos beside {scratch}") from error
        raise
    finally:
        base.close()


def _row(item: Item) -> tuple[bytes, str]:
    text = item.to_json()
    try:
        text.encode()
        return blake2b(stable_url(item.url).encode(), digest_size=16).digest(), text
    except UnicodeEncodeError:  # a name on disk or in a tar may be any bytes; a manifest holds text
        shown = item.url.encode(errors="backslashreplace").decode()
        return _row(Item(shown, reason="refused: its name or its row of the list is not UTF-8"))


def _merge(items: list[Item]) -> Item:
    """Items of one URL as one: the first says all but the spans, of which each counts once."""
    if len(items) == 1:
        return items[0]
    return replace(items[0], spans=tuple(dict.fromkeys(span for item in items for span in item.spans)))


def _batches(items: Iterator[Item], size: int) -> Iterator[list[Item]]:
    while batch := list(islice(items, size)):
        yield batch
