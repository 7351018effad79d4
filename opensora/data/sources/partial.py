"""A file on its way: what of it is here, of which version, and how it comes under its name when it is whole."""

import json
import os
import threading
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

from opensora.config import DownloadConfig

BLOCK = 1 << 17  # bytes read at once
MIB = 1 << 20
VERSION = ".version.json"  # beside a file: which version of it this is


class DownloadError(RuntimeError):
    """One file could not be brought; the message is the recorded reason."""


@dataclass(frozen=True)
class Version:
    """What tells versions of a file apart: its ETag and Last-Modified; empty where nothing does."""

    etag: str = ""
    modified: str = ""

    def __bool__(self) -> bool:
        return bool(self.etag or self.modified)

    @classmethod
    def read(cls, path: Path) -> "Version":
        """The version in a file; an empty one if it is missing or torn."""
        try:
            return cls(**json.loads(path.read_text()))
        except (OSError, ValueError, TypeError):
            return cls()


class Partial:
    """The file `target` while it is brought: `target.part`, with which a run goes on where a stopped one left it."""

    def __init__(self, target: Path, stopped: threading.Event | None = None) -> None:
        self.target = target
        self.stopped = stopped or threading.Event()  # set by another thread to end this one early
        self.part = target.with_name(target.name + ".part")
        self._begun = self.part.with_name(self.part.name + VERSION)
        self._done = target.with_name(target.name + VERSION)

    @property
    def size(self) -> int:
        """Bytes that are here."""
        return self.part.stat().st_size if self.part.is_file() else 0

    @property
    def version(self) -> Version:
        """Of what is here in part."""
        return Version.read(self._begun)

    @property
    def whole(self) -> Version:
        """Of the whole file that a run before brought; empty where there is none."""
        return Version.read(self._done) if self.target.is_file() else Version()

    def begin(self, version: Version) -> None:
        """Start from nothing, with bytes of this version."""
        self.drop()  # first: no byte of one version may lie beside the name of another
        self._begun.write_text(json.dumps(asdict(version)))

    def drop(self) -> None:
        """Forget what is here."""
        self.part.unlink(missing_ok=True)

    def append(self, blocks: Iterable[bytes], config: DownloadConfig, deadline: float) -> None:
        """Add bytes and sync them.

        Raises:
            DownloadError: it is larger than `download.max_mib`, `deadline` (of `time.monotonic`) has passed, or it was
            stopped.
        """
        with self.part.open("ab") as handle:
            for block in blocks:
                handle.write(block)
                if handle.tell() > config.max_mib * MIB:
                    raise DownloadError(f"too large: more than {config.max_mib} MiB")
                if self.stopped.is_set():
                    raise DownloadError("download failed: stopped")
                if time.monotonic() > deadline:
                    raise DownloadError(f"download failed: not done after {config.file_timeout_s:g} s")
            handle.flush()
            os.fsync(handle.fileno())

    def finish(self) -> None:
        """Put it under its name."""
        self.part.replace(self.target)
        self._begun.replace(self._done)


def check_size(size: int, config: DownloadConfig) -> None:
    """Raise DownloadError if a file is larger than `download.max_mib` by its own account."""
    if size > config.max_mib * MIB:
        raise DownloadError(f"too large: {size >> 20} MiB, the limit is {config.max_mib}")
