"""The clip table: one typed row a clip (a source video before it is split), stored as one parquet file a shard.

A step's folder holds `manifest-00000.parquet`, `manifest-00001.parquet`, …: the part of a number is written from the
part of the same number of the step before, so that any part can be made without the others.
"""

import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import get_type_hints

import pyarrow as pa
import pyarrow.parquet as pq

from opensora.config import UserError

VERSION = "2"
VERSION_KEY = b"opensora.manifest_version"
WHOLE_VIDEO_S = 1e9  # end of a span of the whole video, whose length its list does not say
GIVEN = "given"  # caption_model of a caption that came with the video


class ManifestError(UserError):
    """A manifest is missing, foreign, damaged or of another version; the message names the column."""


@dataclass(frozen=True)
class Span:
    """A stretch of a video that its list names, with the caption it gives; seconds."""

    start_s: float
    end_s: float
    caption: str = ""


@dataclass(frozen=True)
class Clip:
    """One row. Before `split` a row is a whole video, and clip fields are empty."""

    clip_id: str  # hash of source content and span; of the content alone before `split`
    source: str  # URL or path the video came from
    source_sha256: str = ""
    licence: str = "unknown"
    path: str = ""  # file of a video before `split`, relative to the folder of all steps, or absolute
    spans: tuple[Span, ...] = ()  # given with the video, before `split`
    start_s: float = 0.0  # span in the source, seconds
    end_s: float = 0.0
    start_frame: int = 0  # the same span in the source's frames, by time of display; the end is not included
    end_frame: int = 0
    frames: int = 0
    fps: float = 0.0
    width: int = 0  # pixels
    height: int = 0
    shard: str = ""  # tar file, relative to the split step's folder
    offset: int = 0  # byte of the clip's data in the shard
    size: int = 0  # bytes
    scores: dict[str, float] = field(default_factory=dict)
    perceptual_hash: str = ""  # 64 bits of three frames, hexadecimal; empty for flat colour
    caption: str = ""
    caption_model: str = ""  # GIVEN, or the model's name
    caption_prompt: str = ""
    latent_shard: str = ""  # safetensors files, relative to the encode step's folder
    text_shard: str = ""
    kept: bool = True
    reason: str = ""  # why the clip was dropped


SPAN = pa.struct([("start_s", pa.float64()), ("end_s", pa.float64()), ("caption", pa.string())])
COLUMN_TYPES = {
    str: pa.string(),
    float: pa.float64(),
    int: pa.int64(),
    bool: pa.bool_(),
    tuple[Span, ...]: pa.list_(SPAN),
    dict[str, float]: pa.map_(pa.string(), pa.float64()),
}
SCHEMA = pa.schema(
    [pa.field(name, COLUMN_TYPES[kind]) for name, kind in get_type_hints(Clip).items()],
    metadata={VERSION_KEY: VERSION.encode()},
)
PART_NAME = re.compile(r"manifest-(\d{5})\.parquet")


def part_name(index: int) -> str:
    """File name of a part."""
    return f"manifest-{index:05d}.parquet"


def part_index(path: Path) -> int:
    """Number of a part.

    Raises:
        ManifestError: the file is not named as a part.
    """
    match = PART_NAME.fullmatch(path.name)
    if match is None:
        raise ManifestError(f"{path} is not named as a part of a manifest, {part_name(0)} for the first")
    return int(match[1])


def list_parts(folder: Path) -> list[Path]:
    """The parts of a step's manifest, in order.

    Raises:
        ManifestError: there is none.
    """
    parts = sorted(path for path in folder.glob("manifest-*.parquet") if PART_NAME.fullmatch(path.name))
    if not parts:
        raise ManifestError(f"no manifest in {folder}; run `opensora {folder.name}` first")
    return parts


def manifest_hash(folder: Path) -> str:
    """sha256 of the names and bytes of all parts: what the steps after this one depend on."""
    digest = sha256()
    for path in list_parts(folder):
        digest.update(path.name.encode() + sha256(path.read_bytes()).digest())
    return digest.hexdigest()


def write_part(path: Path, clips: Iterable[Clip]) -> None:
    """Write rows to the part `path`; a reader sees the whole file or none, and the same rows give the same bytes."""
    rows = [asdict(clip) | {"scores": sorted(clip.scores.items())} for clip in clips]
    write_table(path, pa.Table.from_pylist(rows, schema=SCHEMA))


def write_table(path: Path, table: pa.Table) -> None:
    """Write a table of SCHEMA to the part `path`; for work on whole columns, else see `write_part`."""
    part = path.with_name(path.name + ".part")
    pq.write_table(table, part)
    with part.open("rb") as handle:
        os.fsync(handle.fileno())
    part.replace(path)


def read_part(path: Path) -> list[Clip]:
    """All rows of one file; errors as in `read_table`."""
    return [_clip(row) for row in read_table(path).to_pylist()]


def read_table(path: Path) -> pa.Table:
    """All columns of one file, in the order of SCHEMA; twenty times faster than rows.

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
    return table.select(SCHEMA.names)


def _clip(row: dict) -> Clip:
    spans = tuple(Span(**span) for span in row["spans"] or ())
    return Clip(**(row | {"spans": spans, "scores": dict(row["scores"] or [])}))


def iterate_manifest(folder: Path) -> Iterator[Clip]:
    """The rows of all parts, in order, one part in memory at a time."""
    for path in list_parts(folder):
        yield from read_part(path)


def read_manifest(folder: Path) -> list[Clip]:
    """The rows of all parts, in order."""
    return list(iterate_manifest(folder))


def count_rows(folder: Path) -> int:
    """Rows of all parts, from the heads of the files."""
    return sum(pq.read_metadata(path).num_rows for path in list_parts(folder))


def kept_clips(clips: Iterable[Clip]) -> list[Clip]:
    """The rows that no step dropped."""
    return [clip for clip in clips if clip.kept]


@dataclass
class Tally:
    """Rows seen, kept, and dropped by reason, the part before a colon: {"unreadable": 3}."""

    total: int = 0
    kept: int = 0
    dropped: Counter[str] = field(default_factory=Counter)

    def add(self, clips: Iterable[Clip]) -> "Tally":
        """Count more rows."""
        for clip in clips:
            self.total += 1
            if clip.kept:
                self.kept += 1
            else:
                self.dropped[clip.reason.split(":")[0]] += 1
        return self

    @property
    def reasons(self) -> str:
        """The reasons in one line: "3 unreadable, 1 empty"."""
        return ", ".join(f"{count} {reason}" for reason, count in self.dropped.most_common())
