"""What every step of the chain shares: a folder that appears whole or not at all, and a report."""

import errno
import fcntl
import json
import os
import shutil
import threading
import time
import weakref
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import IO
from uuid import uuid4

from opensora.config import UserError

REPORT = "report.json"
FINGERPRINT = "fingerprint.json"
PARTIAL = ".partial"
# Errors after which nothing can be written any more, whatever the item.
UNWRITABLE = {
    errno.ENOSPC: "the disk is full; free some space",
    errno.EDQUOT: "the disk quota is used up; free some space",
    errno.EROFS: "the disk is read-only; make it writable",
}
# Beside the folders of the steps, and not versioned:
STORE = "videos"  # what `download` brought
CACHE = ".cache"  # what a step made and need not make again


class StepError(UserError):
    """A step cannot go on; the message says what was wrong, what was expected and what to do."""


class ShareDone(Exception):
    """This process's share of a step's shards is done; whoever finishes the step finds them done."""


@dataclass(frozen=True)
class Report:
    """What a step did."""

    step: str
    total: int = 0  # items seen
    kept: int = 0
    dropped: dict[str, int] = field(default_factory=dict)  # by reason
    metrics: dict[str, float] = field(default_factory=dict)
    seconds: float = 0.0  # wall time
    peak_memory_mib: float = 0.0  # of this process and all its children together, sampled


def write_json(path: Path, value: object) -> None:
    """Write `value` so that a reader sees the whole file or none."""
    part = path.with_name(f"{path.name}.{uuid4().hex[:8]}.part")  # others may write it at the same time
    try:
        with part.open("w") as handle:
            json.dump(value, handle, indent=2, sort_keys=True)
            handle.flush()
            os.fsync(handle.fileno())
        part.replace(path)
    except BaseException:
        with suppress(OSError):
            part.unlink()
        raise


def sync(path: Path) -> None:
    """See that a file, or the names in a folder, are on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def read_report(folder: Path) -> Report:
    """The report of a finished step.

    Raises:
        StepError: the step has not finished in that folder.
    """
    try:
        return Report(**json.loads((folder / REPORT).read_text()))
    except FileNotFoundError as error:
        raise StepError(f"{folder} holds no finished step (no {REPORT}); run `opensora {folder.name}` first") from error


def fingerprint(*values: object) -> str:
    """sha256 of values that decide a step's output (configurations, input hashes)."""
    return sha256(json.dumps(values, sort_keys=True, default=str).encode()).hexdigest()


def lock_file(path: Path, shared: bool = False) -> IO[str] | None:
    """`path` opened and locked until it is closed or this process ends; None if somebody else holds it.

    Args:
        shared: others may hold it in the same way.
    """
    handle = path.open("w+")  # NFS shares a lock only with those who may read the file
    try:
        fcntl.flock(handle, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except BlockingIOError:
        handle.close()
        return None
    return handle


def final_place(path: Path) -> Path:
    """Where a file of a step at work will lie when the step is done."""
    return Path(*(part for part in path.parts if part != PARTIAL))


class PeakMemory:
    """The most memory that this process and its children held at once; pages they share count once a process."""

    EVERY_S = 0.5

    def __init__(self) -> None:
        self._peak = 0
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True, name="peak memory")

    def start(self) -> None:
        """Look twice a second until `stop`."""
        self._thread.start()

    def stop(self) -> None:
        """Look no more."""
        self._stopped.set()

    def read_mib(self) -> float:
        """The peak so far, in MiB."""
        self._look()
        return self._peak / 2**20

    def _watch(self) -> None:
        self._look()
        while not self._stopped.wait(self.EVERY_S):
            self._look()

    def _look(self) -> None:
        import psutil

        own = psutil.Process()
        total = 0
        for process in [own, *own.children(recursive=True)]:
            with suppress(psutil.NoSuchProcess):
                total += process.memory_info().rss
        self._peak = max(self._peak, total)


class StepFolder:
    """A step's output while it is being written: `path` holds the work, `finish` puts it under its final name."""

    def __init__(self, output: Path, key: str) -> None:
        self.output = output
        self.path = output.parent / PARTIAL / output.name
        self.key = key
        self.started = time.monotonic()
        self._memory = PeakMemory()
        weakref.finalize(self, self._memory.stop)  # also where the step fails

    def is_done(self) -> bool:
        """Whether the final folder already holds a finished step with the same fingerprint."""
        try:
            return json.loads((self.output / FINGERPRINT).read_text()) == self.key and (self.output / REPORT).is_file()
        except (FileNotFoundError, json.JSONDecodeError):
            return False

    def open(self, shared: bool = False) -> Path:
        """The work folder; what a stopped run of the same fingerprint left there is kept, anything else removed.

        Args:
            shared: others work there too, on other shards, and nobody finishes the step meanwhile.

        Raises:
            StepError: another process works there.
        """
        self._lock(shared)
        with (self.path.with_name(f"{self.path.name}.setup.lock")).open("w") as handle:
            fcntl.flock(handle, fcntl.LOCK_EX)  # those who share the folder do not remove each other's beginnings
            self._prepare()
        self._memory.start()
        return self.path

    def _prepare(self) -> None:
        mark = self.path / FINGERPRINT
        try:
            same = json.loads(mark.read_text()) == self.key
        except (FileNotFoundError, json.JSONDecodeError):
            same = False
        if not same:
            shutil.rmtree(self.path, ignore_errors=True)
        self.path.mkdir(parents=True, exist_ok=True)
        write_json(mark, self.key)

    def _lock(self, shared: bool) -> None:
        """Held until this process ends, however it ends."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._held = lock_file(self.path.with_name(f"{self.path.name}.lock"), shared)
        if self._held is None:
            raise StepError(f"another process is working on {self.output}; wait for it or stop it")

    def finish(self, report: Report) -> Report:
        """Write the report and rename the work folder to its final name."""
        values = asdict(report) | {
            "seconds": time.monotonic() - self.started,
            "peak_memory_mib": self._memory.read_mib(),
        }
        self._memory.stop()
        write_json(self.path / REPORT, values)
        before = self.path.with_name(f"{self.path.name}.before")
        shutil.rmtree(before, ignore_errors=True)
        if self.output.exists():
            self.output.rename(before)  # removed under its name it would be half there after a kill, and look whole
        self.path.rename(self.output)
        shutil.rmtree(before, ignore_errors=True)
        return Report(**values)
