"""Judging of measured clips: thresholds on the columns of scores, then duplicates among what passed; nothing decoded.

Whole columns are worked on, a part at a time; of all parts together only the hashes (8 bytes a clip) and one flag a
clip are held.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from opensora.config import ScoreConfig
from opensora.data.duplicates import Duplicates, find_duplicates
from opensora.manifest import SCHEMA, Tally, read_table, write_table

# In the order in which they are looked at: field of the config, score, reason, on which side of the limit it is bad.
THRESHOLDS = (
    ("min_duration_s", "duration_s", "short", "<"),
    ("min_short_side", "short_side", "small", "<"),
    ("max_black", "black", "black", ">"),
    ("min_brightness", "brightness", "dark", "<"),
    ("max_brightness", "brightness", "bright", ">"),
    ("min_frame_difference", "frame_difference", "static", "<"),
    ("min_motion", "motion", "still", "<"),
    ("max_motion", "motion", "restless", ">"),
    ("min_sharpness", "sharpness", "blurred", "<"),
    ("min_aesthetic", "aesthetic", "unaesthetic", "<"),
    ("min_text_match", "text_match", "mismatched", "<"),
)
OPEN_PARTS = 32  # parts whose clip ids are held while duplicates get their reasons


@dataclass
class Verdict:
    """What became of all clips."""

    tally: Tally = field(default_factory=Tally)
    scored: list[int] = field(default_factory=list)  # clips with scores, by part
    video_s: float = 0.0  # seconds of them


def judge(config: ScoreConfig, measured: Sequence[Path], parts: Sequence[Path]) -> Verdict:
    """Write `parts`: the rows of the parts `measured` (of the same order), with what misses a threshold dropped."""
    verdict = Verdict()
    passed, hashes = [], []  # by part: flags of the rows that may be duplicates or originals, and their hashes
    for source, part in zip(measured, parts, strict=True):
        table = apply_thresholds(read_table(source), config)
        write_table(part, table)
        _count(verdict, table)
        kept = _flags(table)
        kept &= pc.not_equal(table["perceptual_hash"], "").to_numpy()  # one of flat colour is like nothing
        passed.append(kept)
        digits = "".join(table["perceptual_hash"].filter(pa.array(kept)).to_pylist())
        hashes.append(np.frombuffer(bytes.fromhex(digits), ">u8").astype(np.uint64))
    if config.max_duplicate_distance is not None:
        found = find_duplicates(np.concatenate(hashes), config.max_duplicate_distance)
        _drop_duplicates(parts, passed, found)
        verdict.tally.kept -= len(found.index)
        verdict.tally.dropped += Counter(duplicate=len(found.index))
    return verdict


def apply_thresholds(table: pa.Table, config: ScoreConfig) -> pa.Table:
    """Drop rows whose scores miss a threshold, or lack the score; the first one missed is the reason."""
    kept, reasons = _flags(table), table["reason"].to_pylist()
    for name, score, word, bad_side in THRESHOLDS:
        limit = getattr(config, name)
        if limit is None:
            continue
        values = read_score(table, score)
        good = values >= limit if bad_side == "<" else values <= limit  # not a number is not good
        if score == "text_match":
            good |= pc.equal(table["caption"], "").to_numpy()  # nothing that it could match
        for row in np.flatnonzero(kept & ~good):
            value = "is missing" if np.isnan(values[row]) else f"{values[row]:.4g} {bad_side} {limit:g}"
            reasons[row] = f"{word}: {score} {value}"
        kept &= good
    return _with_verdict(table, kept, reasons)


def read_score(table: pa.Table, name: str) -> np.ndarray:
    """A score float64 [N] of all rows of a manifest; not a number where a row has none."""
    scores = table["scores"].combine_chunks()
    values = np.full(len(table), np.nan)
    places = np.flatnonzero(pc.equal(scores.keys, name).to_numpy(zero_copy_only=False))
    rows = np.searchsorted(scores.offsets.to_numpy(), places, side="right") - 1
    values[rows] = scores.items.to_numpy(zero_copy_only=False)[places]
    return values


def _flags(table: pa.Table) -> np.ndarray:
    return np.array(table["kept"].to_numpy(), bool)


def _with_verdict(table: pa.Table, kept: np.ndarray, reasons: list[str]) -> pa.Table:
    for name, values in (("kept", pa.array(kept)), ("reason", pa.array(reasons, pa.string()))):
        table = table.set_column(SCHEMA.get_field_index(name), SCHEMA.field(name), values)
    return table


def _count(verdict: Verdict, table: pa.Table) -> None:
    kept = _flags(table)
    verdict.tally.total += len(table)
    verdict.tally.kept += int(kept.sum())
    dropped = table["reason"].filter(pa.array(~kept)).to_pylist()
    verdict.tally.dropped.update(Counter(reason.split(":")[0] for reason in dropped))
    seconds = read_score(table, "duration_s")
    verdict.scored.append(int(np.isfinite(seconds).sum()))
    verdict.video_s += float(np.nansum(seconds))


def _drop_duplicates(parts: Sequence[Path], passed: Sequence[np.ndarray], found: Duplicates) -> None:
    """Write anew the parts that hold duplicates; `found` counts the rows that passed, over all parts."""
    starts = np.cumsum([0, *(int(flags.sum()) for flags in passed)])

    @lru_cache(OPEN_PARTS)
    def read_ids(index: int) -> pa.ChunkedArray:
        return pq.read_table(parts[index], columns=["clip_id"])["clip_id"].filter(pa.array(passed[index]))

    for index, path in enumerate(parts):
        here = np.arange(*np.searchsorted(found.index, starts[index : index + 2]))
        if not len(here):
            continue
        here = here[np.argsort(found.original[here])]  # a part of originals after the other
        rows = np.flatnonzero(passed[index])[found.index[here] - starts[index]]
        table = read_table(path)
        kept, reasons = _flags(table), table["reason"].to_pylist()
        kept[rows] = False
        for row, original, bits in zip(rows, found.original[here], found.distance[here], strict=True):
            part = int(np.searchsorted(starts, original, side="right")) - 1
            name = read_ids(part)[original - starts[part]].as_py()
            reasons[row] = f"duplicate: {bits} bits from {name}"
        write_table(path, _with_verdict(table, kept, reasons))
