"""The file that a run's records are written to first, and the mark of how far each store has them.

Beside `spool.jsonl` lie `sent.json` (bytes that each store has) and `rejected.jsonl` (what a store refused, and why).
What the machine does is measured by another process than the one that trains, and has a spool of its own below.
"""

import fcntl
import json
import logging
import os
import threading
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from opensora.step import write_json

SPOOL, SENT, REJECTED = "spool.jsonl", "sent.json", "rejected.jsonl"
LOCK = "lock"  # beside a spool, held by whoever sends it
SYSTEM = "system"  # folder beside a run's spool: the spool of its system metrics
CHUNK = 1 << 20  # bytes read at once
MEMORY = 100_000  # records kept while the disk takes none
log = logging.getLogger(__name__)


class SpoolWriter:
    """Appends records, a line each. A record that was appended outlives this process, however it ends.

    A line is one write to a file that stays open, some ten microseconds. It is not synced: only a machine that goes
    down can lose the last seconds, and whoever sends the records syncs them before. While the disk takes nothing,
    records wait in memory. Threads may share it.
    """

    def __init__(self, place: Path) -> None:
        self.path = place / SPOOL
        self._lock = threading.Lock()
        self._file: int | None = None
        self._waiting: deque[bytes] = deque(maxlen=MEMORY)
        self._said = False

    def append(self, record: dict[str, Any]) -> None:
        """Write the record; an error of the disk is said once and raises nothing."""
        line = json.dumps(record).encode() + b"\n"
        with self._lock:
            self._waiting.append(line)
            try:
                if self._file is None:
                    self._file = self._open()
                while self._waiting:
                    self._write(self._waiting[0])
                    self._waiting.popleft()
            except OSError as error:
                if not self._said:
                    self._said = True
                    log.warning("tracking: %s: %s; records wait in memory, training goes on", self.path, error.strerror)

    def append_all(self, records: Sequence[dict[str, Any]]) -> None:
        """Write all of the records or none.

        Raises:
            OSError: the disk does not take them.
        """
        lines = b"".join(json.dumps(record).encode() + b"\n" for record in records)
        with self._lock:
            if self._file is None:
                self._file = self._open()
            self._write(lines)

    def close(self) -> int:
        """Returns how many records the disk never took."""
        with self._lock:
            if self._file is not None:
                os.close(self._file)
                self._file = None
            return len(self._waiting)

    def _open(self) -> int:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        file = os.open(self.path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o644)
        size = os.fstat(file).st_size
        if size and os.pread(file, 1, size - 1) != b"\n":  # a process was killed in the middle of a line
            os.write(file, b"\n")
        return file

    def _write(self, line: bytes) -> None:
        """All of the line, or lines, or none."""
        assert self._file is not None
        written = os.write(self._file, line)
        if written < len(line):
            with suppress(OSError):
                os.ftruncate(self._file, os.fstat(self._file).st_size - written)
            raise OSError(28, os.strerror(28))


class SpoolReader:
    """What one store has not got yet, and the mark that it has.

    Args:
        store: its address without credentials; each store has a mark of its own.
    """

    def __init__(self, place: Path, store: str) -> None:
        self.place, self.store = place, store
        self.path = place / SPOOL
        marks = read_marks(place)
        size = self.path.stat().st_size if self.path.is_file() else 0
        self.sent = min(marks.get(store, 0), size)  # a machine that went down may have lost the end of the spool

    def sync(self) -> None:
        """Bring the file to the disk, so that no store has what the spool could lose."""
        with suppress(OSError), self.path.open("rb") as handle:
            os.fdatasync(handle.fileno())

    def lines(self) -> Iterator[tuple[dict[str, Any] | None, int]]:
        """Records not sent, each with the offset behind it; None for a line that is none."""
        if not self.path.is_file():
            return
        with self.path.open("rb") as handle:
            handle.seek(self.sent)
            place = self.sent
            while True:
                line = handle.readline()
                if not line.endswith(b"\n"):  # the end, or a line that is being written
                    return
                place += len(line)
                yield parse(line), place

    def mark(self, sent: int) -> None:
        """The store has all before this offset."""
        self.sent = sent
        with suppress(OSError):  # a full disk: the same is sent again by the next process, which does no harm
            write_json(self.place / SENT, read_marks(self.place) | {self.store: sent})

    def reject(self, record: dict[str, Any], reason: str) -> None:
        """Set a record aside that the store will never take."""
        line = json.dumps({"reason": reason, "store": self.store, "record": record})
        with suppress(OSError), (self.place / REJECTED).open("a") as handle:
            handle.write(line + "\n")


def parse(line: bytes) -> dict[str, Any] | None:
    """The record of a line; None if it is torn."""
    try:
        record = json.loads(line)
    except ValueError:
        return None
    return record if isinstance(record, dict) and {"kind", "time"} <= record.keys() else None


def read_marks(place: Path) -> dict[str, int]:
    """Bytes sent, by store."""
    try:
        return {store: int(sent) for store, sent in json.loads((place / SENT).read_text()).items()}
    except (FileNotFoundError, ValueError, AttributeError, TypeError):
        return {}


def count_records(place: Path, start: int = 0) -> int:
    """Records of a spool behind an offset."""
    try:
        with (place / SPOOL).open("rb") as handle:
            handle.seek(start)
            return sum(part.count(b"\n") for part in iter(lambda: handle.read(CHUNK), b""))
    except FileNotFoundError:
        return 0


def read_rejected(place: Path) -> list[dict[str, Any]]:
    """What was set aside: reason, store and record of each."""
    try:
        text = (place / REJECTED).read_text()
    except FileNotFoundError:
        return []
    found = []
    for line in text.splitlines():
        with suppress(ValueError):
            found.append(json.loads(line))
    return found


def find_spools(root: Path) -> list[Path]:
    """The folders of all spools below a results' root, WORKDIR/<profile>/.mlflow/<chain>/<step>."""
    return [path.parent for path in sorted(root.glob(f"*/.mlflow/*/*/{SPOOL}"))]


def spools_of(place: Path) -> tuple[Path, Path]:
    """The folders of a run's two spools: its records, and what its machine does."""
    return place, place / SYSTEM


@contextmanager
def alone(path: Path) -> Iterator[None]:
    """Wait for the lock file `path` and hold it: for what takes moments."""
    with path.open("w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
