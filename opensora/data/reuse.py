"""What the encode step made before and need not make again: its files under other names, and which key is in which.

A step's folder is deleted before it is made anew, so the files live on as hard links in a folder of a name that says
what made them: `.cache/latents-<key>/`, beside an index.
"""

import json
import os
import shutil
import sqlite3
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from types import TracebackType

from opensora.step import write_json
from opensora.weights import hash_file

INDEX = "index.sqlite"
HASHES = "hashes.json"
UNFINISHED = ".unfinished"  # ends the name of the folder for files of a run that has not ended


def hash_folder(folder: Path, memory: Path) -> dict[str, str]:
    """sha256 of every file of a model's folder that a model could read, by name: all but notes (`.md`).

    Files of tens of GB are read once: `memory` remembers the hash of a file by its path, size and time of change.
    """
    try:
        known = json.loads((memory / HASHES).read_text())
    except (OSError, json.JSONDecodeError):
        known = {}
    hashes, before = {}, dict(known)
    for path in sorted(path for path in folder.iterdir() if path.is_file() and path.suffix != ".md"):
        about = path.stat()
        state = [about.st_size, about.st_mtime_ns]
        entry = known.get(str(path.resolve()))
        if not entry or entry[:2] != state:
            entry = known[str(path.resolve())] = [*state, hash_file(path)]
        hashes[path.name] = entry[2]
    if known != before:
        memory.mkdir(parents=True, exist_ok=True)
        write_json(memory / HASHES, {path: entry for path, entry in known.items() if Path(path).is_file()})
    return hashes


class Kept:
    """Where a key of one part is to be found: in the last run's files, or in those that a stopped run left.

    A key of the last run is looked up in an index on disk, whatever part it was in, so that any number of keys takes no
    memory. A stopped run left no index; of its files those of the same part are looked into.
    """

    def __init__(self, folder: Path, kind: str, part: int) -> None:
        """`folder` may be absent; the files are named `<kind>-<part>-….safetensors`."""
        self.folder = folder
        self._pattern = f"{kind}-{part:05d}-*.safetensors"
        self._index: sqlite3.Connection | None = None
        self._stopped: dict[str, str] | None = None
        if (folder / INDEX).is_file():
            where = f"{(folder / INDEX).resolve().as_uri()}?mode=ro&immutable=1"
            self._index = sqlite3.connect(where, uri=True)

    def __enter__(self) -> "Kept":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._index:
            self._index.close()

    def find(self, key: str) -> str | None:
        """The file that holds `key`, relative to the folder above `folder`; None if there is none."""
        if self._stopped is None:
            self._stopped = self._look()
        if key in self._stopped:
            return self._stopped[key]
        if self._index is None:
            return None
        row = self._index.execute("SELECT file FROM places WHERE key = ?", (key,)).fetchone()
        return f"{self.folder.name}/{row[0]}" if row else None

    def add(self, path: Path) -> None:
        """Keep a finished file even if this run is stopped and the next one is another."""
        unfinished = self.folder.with_name(self.folder.name + UNFINISHED)
        unfinished.mkdir(parents=True, exist_ok=True)
        # The inode in the name: a file of the same number and other content, which is still looked into, stays.
        link_file(path, unfinished / f"{path.stem}.{path.stat().st_ino:x}{path.suffix}")

    def _look(self) -> dict[str, str]:
        found: dict[str, str] = {}
        unfinished = self.folder.with_name(self.folder.name + UNFINISHED)
        for path in unfinished.glob(self._pattern):
            found |= {name.split("/")[0]: f"{unfinished.name}/{path.name}" for name in names_in(path)}
        return found


def names_in(path: Path) -> set[str]:
    """Names of a safetensors file's tensors, from its head; none if it is missing or damaged."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as shard:
            return set(shard.keys())
    except (OSError, SafetensorError):
        return set()


class Keeper:
    """Makes the folder that a later run's `Kept` reads; in place of the old ones when the context ends well."""

    def __init__(self, folder: Path) -> None:
        """`folder` is named `<kind>-<key>`; on success the folders of other keys of the kind go."""
        self.folder = folder
        self._new = folder.with_name(f".{folder.name}.new")
        shutil.rmtree(self._new, ignore_errors=True)
        self._new.mkdir(parents=True)
        self._index = sqlite3.connect(self._new / INDEX)
        self._index.execute("PRAGMA synchronous = OFF")  # it is made anew after a crash
        self._index.execute("CREATE TABLE places (key TEXT, file TEXT)")

    def __enter__(self) -> "Keeper":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if error is None:
            self._finish()
        else:
            self._index.close()
            shutil.rmtree(self._new, ignore_errors=True)

    def add(self, source: Path, places: Iterable[tuple[str, str]]) -> None:
        """Keep what the pairs (key, name of a file in `source`) say."""
        rows = sorted(set(places))
        self._index.executemany("INSERT INTO places VALUES (?, ?)", rows)
        for name in {file for _, file in rows}:
            link_file(source / name, self._new / name)

    def _finish(self) -> None:
        """Put the new folder in the place of all others of its kind: a file that no run wrote last is not kept."""
        self._index.execute("CREATE INDEX by_key ON places (key)")
        self._index.commit()
        self._index.close()
        kind = self.folder.name.split("-")[0]
        for old in self.folder.parent.glob(f"{kind}-*"):
            shutil.rmtree(old)
        self._new.rename(self.folder)


def link_file(source: Path, target: Path) -> None:
    """A second name for a file, or a copy where the file system allows none; whole or not at all."""
    part = target.with_name(target.name + ".part")
    with suppress(FileNotFoundError):
        part.unlink()
    try:
        os.link(source, part)
    except OSError as error:
        if isinstance(error, FileNotFoundError):
            raise
        shutil.copyfile(source, part)
    part.replace(target)
    with suppress(FileNotFoundError):  # renaming one name of a file to another one of its names does nothing
        part.unlink()
