"""The clip table: one typed row a clip (a source video before it is split), stored as parquet."""

import os
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import get_type_hints

import pyarrow as pa
import pyarrow.parquet as pq

from opensora.config import UserError

VERSION = "1"
VERSION_KEY = b"opensora.manifest_version"
GIVEN = "given"  # caption_model of a caption that came with the video


class ManifestError(UserError):
    """A manifest is missing, foreign, damaged or of another version; the message names the column."""


@dataclass(frozen=True)
class Clip:
    """One row. Before `split` a row is a whole video, and clip fields are empty."""

    clip_id: str  # hash of source content and span; of the content alone before `split`
    source: str  # URL or path the video came from
    source_sha256: str = ""
    licence: str = "unknown"
    path: str = ""  # file of a downloaded video, relative to the manifest's folder
    start_s: float = 0.0  # span in the source, seconds
    end_s: float = 0.0
    frames: int = 0
    fps: float = 0.0
    width: int = 0  # pixels
    height: int = 0
    shard: str = ""  # tar file, relative to the split step's folder
    offset: int = 0  # byte of the clip's data in the shard
    size: int = 0  # bytes
    scores: dict[str, float] = field(default_factory=dict)
    caption: str = ""
    caption_model: str = ""  # GIVEN, or the model's name
    caption_prompt: str = ""
    latent_shard: str = ""  # safetensors file, relative to the encode step's folder
    kept: bool = True
    reason: str = ""  # why the clip was dropped


COLUMN_TYPES = {str: pa.string(), float: pa.float64(), int: pa.int64(), bool: pa.bool_()}
SCHEMA = pa.schema(
    [
        pa.field(name, COLUMN_TYPES.get(kind, pa.map_(pa.string(), pa.float64())))
        for name, kind in get_type_hints(Clip).items()
    ],
    metadata={VERSION_KEY: VERSION.encode()},
)


def write_manifest(path: Path, clips: Iterable[Clip]) -> None:
    """Write rows to `path`; a reader sees the whole file or none."""
    rows = [asdict(clip) | {"scores": list(clip.scores.items())} for clip in clips]
    part = path.with_name(path.name + ".part")
    pq.write_table(pa.Table.from_pylist(rows, schema=SCHEMA), part)
    with part.open("rb") as handle:
        os.fsync(handle.fileno())
    part.replace(path)


def read_manifest(path: Path) -> list[Clip]:
    """All rows of `path`.

    Raises:
        ManifestError: no such file, not parquet, another version, or a column that is missing or mistyped.
    """
    if not path.is_file():
        raise ManifestError(f"no manifest at {path}; run the step before this one first")
    try:
        table = pq.read_table(path)
    except (pa.ArrowInvalid, OSError) as error:
        raise ManifestError(f"{path} is not a readable parquet file: {error}") from error
    version = (table.schema.metadata or {}).get(VERSION_KEY, b"none").decode()
    if version != VERSION:
        raise ManifestError(f"{path} has manifest version {version}, expected {VERSION}; run its step again")
    for column in SCHEMA:
        if column.name not in table.schema.names:
            raise ManifestError(f"{path} lacks the column {column.name!r}; run its step again")
        found = table.schema.field(column.name).type
        if found != column.type:
            raise ManifestError(f"{path}: column {column.name!r} is {found}, expected {column.type}")
    return [Clip(**(row | {"scores": dict(row["scores"] or [])})) for row in table.select(SCHEMA.names).to_pylist()]


def kept_clips(clips: Iterable[Clip]) -> list[Clip]:
    """The rows that no step dropped."""
    return [clip for clip in clips if clip.kept]


def drop_reasons(clips: Iterable[Clip]) -> dict[str, int]:
    """Number of dropped rows by reason, the part before a colon: {"unreadable": 3}."""
    return dict(Counter(clip.reason.split(":")[0] for clip in clips if not clip.kept))
