"""What an evaluation made and the next one may need, in `.cache/`: how much of it is kept."""

import os
import shutil
from contextlib import suppress
from pathlib import Path

KEEP = 8  # entries: three stages and a champion, and those of the evaluations before


def touch(path: Path) -> None:
    """Note that an entry is in use."""
    with suppress(OSError):  # of a disk that can only be read nothing is removed either
        os.utime(path)


def prune(folder: Path, keep: int = KEEP) -> None:
    """Remove all entries of `folder` but the `keep` that were used last."""
    with suppress(FileNotFoundError):
        found = sorted(folder.iterdir(), key=lambda path: path.stat().st_mtime_ns, reverse=True)
        for path in found[keep:]:
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)
