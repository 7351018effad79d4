"""The kept clips of a step as columns: what training needs of a manifest, at tens of bytes a clip."""

from collections.abc import Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from opensora.data.shards import text_key
from opensora.manifest import VERSION, VERSION_KEY, ManifestError, list_parts
from opensora.step import StepError

ALWAYS = ("clip_id", "frames", "height", "width")
REPEATED = {"shard", "latent_shard", "text_shard"}  # many clips share a value, which is stored once
AT_ONCE = 1 << 16  # texts that are Python's at a time
TEXT_KEY = "text_key"  # in place of the caption, which is long


class ClipTable:
    """Columns of the kept rows, in the manifest's order; a row's number names the clip from here on.

    Parts are read one at a time. In memory a clip takes about 60 bytes, and its caption where that is asked for.

    Attributes:
        frames, heights, widths: int32 [N].
        identity: hash of the clips, in their order.
    """

    def __init__(self, folder: Path, columns: Sequence[str] = ()) -> None:
        """Read `columns` of the manifest in `folder` beside those that are always there.

        Args:
            columns: names of the manifest's, or `TEXT_KEY`.

        Raises:
            ManifestError: there is no manifest, or one of another version.
            StepError: no clip was kept.
        """
        self.folder = folder
        names = list(dict.fromkeys([*ALWAYS, *columns]))
        table = pa.concat_tables(_read(path, names) for path in list_parts(folder))
        self._columns = {name: table.unify_dictionaries()[name].combine_chunks() for name in names}
        if not len(self):
            raise StepError(f"no clip is left in {folder}; look at the reasons in its manifest")
        self.frames, self.heights, self.widths = (self._numbers(name) for name in ("frames", "height", "width"))
        self.identity = _hash_lines(self._columns["clip_id"])

    def __len__(self) -> int:
        return len(self._columns["clip_id"])

    def row(self, number: int) -> dict[str, Any]:
        """All columns of a clip by name."""
        return {name: column[number].as_py() for name, column in self._columns.items()}

    def text(self, column: str, row: int) -> str:
        """A value of a column of texts."""
        return self._columns[column][row].as_py()

    def number(self, column: str, row: int) -> int:
        """A value of a column of numbers."""
        return self._columns[column][row].as_py()

    def _numbers(self, name: str) -> np.ndarray:
        return self._columns[name].to_numpy(zero_copy_only=False).astype(np.int32)


def _hash_lines(texts: pa.Array) -> str:
    """sha256 of the texts with a line break between them, a few at a time."""
    digest = sha256()
    for first in range(0, len(texts), AT_ONCE):
        lines = "\n".join(texts[first : first + AT_ONCE].to_pylist())
        digest.update((("\n" if first else "") + lines).encode())
    return digest.hexdigest()


def _read(path: Path, names: list[str]) -> pa.Table:
    try:
        version = (pq.read_schema(path).metadata or {}).get(VERSION_KEY, b"none").decode()
    except (pa.ArrowInvalid, OSError) as error:
        raise ManifestError(f"{path} is not a readable parquet file: {error}") from error
    if version != VERSION:
        raise ManifestError(f"{path} has manifest version {version}, expected {VERSION}; run its step again")
    stored = ["caption" if name == TEXT_KEY else name for name in names]
    table = pq.read_table(path, columns=list(dict.fromkeys([*stored, "kept"])))
    table = table.filter(table["kept"])
    return pa.table({name: _column(table, name) for name in names})


def _column(table: pa.Table, name: str) -> pa.ChunkedArray:
    if name == TEXT_KEY:
        keys = [text_key(caption) for caption in table["caption"].to_pylist()]
        return pa.chunked_array([pa.array(keys, pa.large_string())])
    values = table[name]
    if name in REPEATED:
        return pc.dictionary_encode(values)
    return values.cast(pa.large_string()) if pa.types.is_string(values.type) else values
