"""Safetensors files of a part, filled key by key with what was made before or else is made now."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from opensora.data.reuse import Kept, link_file, names_in
from opensora.data.shards import TensorFiles, write_tensors
from opensora.manifest import part_index
from opensora.step import StepError

if TYPE_CHECKING:
    from torch import Tensor


class Unusable(ValueError):
    """A clip or text that cannot be encoded; the message is a reason and a colon."""


@dataclass(frozen=True)
class KeyedFiles:
    """How the tensors of a key, a clip or a text, are named and made, and how large they are in a file."""

    names: Callable[[str], list[str]]
    make: "Callable[[str], dict[str, Tensor]]"
    size: Callable[[str], float]  # bytes

    def write(
        self,
        keys: Sequence[str],
        kind: str,
        part: Path,
        limit: int,
        before: Path,
        done: Callable[[], None] = lambda: None,
    ) -> tuple[dict[str, str], dict[str, str]]:
        """Write `<kind>-<part>-<number>.safetensors`; returns the file of every key, and the reasons of the others.

        Args:
            part: of the manifest that they belong to; they lie beside it.
            limit: bytes a file.
            before: folder of what was made before.
            done: called after every key.
        """
        places: dict[str, str] = {}
        reasons: dict[str, str] = {}
        with Kept(before, kind, part_index(part)) as kept:
            for number, group in enumerate(fill(keys, self.size, limit)):
                path = part.with_name(f"{kind}-{part_index(part):05d}-{number:02d}.safetensors")
                bad = self._write_file(path, group, kept, done)
                reasons |= bad
                places |= {key: path.name for key in group if key not in bad}
        return places, reasons

    def _write_file(self, path: Path, keys: list[str], kept: Kept, done: Callable[[], None]) -> dict[str, str]:
        """Write one file, unless an old one is the same; returns the reasons of bad keys."""
        store = kept.folder.parent
        old = kept.find(keys[0])
        if old and names_in(store / old) == {name for key in keys for name in self.names(key)}:
            link_file(store / old, path)
            kept.add(path)
            for _ in keys:
                done()
            return {}
        files = TensorFiles(store)
        tensors: dict[str, Tensor] = {}
        reasons = {}
        for key in keys:
            try:
                tensors |= self._kept(key, kept, files) or self.make(key)
            except Unusable as error:
                reasons[key] = str(error)
            done()
        if tensors:
            write_tensors(path, tensors)
            kept.add(path)
        return reasons

    def _kept(self, key: str, kept: Kept, files: TensorFiles) -> "dict[str, Tensor] | None":
        file = kept.find(key)
        try:
            return {name: files.read(file, name) for name in self.names(key)} if file else None
        except StepError:  # damaged: it is made again
            return None


def fill(keys: Sequence[str], size: Callable[[str], float], limit: int) -> list[list[str]]:
    """Keys by file, in order: a file is full when the next would take it past `limit` bytes."""
    groups: list[list[str]] = []
    room = 0.0
    for key in keys:
        if room < size(key) or not groups:
            groups.append([])
            room = float(limit)
        groups[-1].append(key)
        room -= size(key)
    return groups
