"""Lists of videos: csv, tsv, jsonl, json, parquet and text files, read row by row.

A row that names no video or has a bad span becomes an item with a reason, never an error. Only a json file, which has
no rows, is held in memory as a whole.
"""

import csv
import json
from collections.abc import Iterable, Iterator
from itertools import chain
from pathlib import Path
from typing import Any

from opensora.config import nearest
from opensora.data.sources.forms import FORMS, parse_row, tell_form
from opensora.data.sources.item import Item
from opensora.step import StepError

SUFFIXES = {".csv", ".tsv", ".jsonl", ".json", ".parquet", ".txt"}
UNREADABLE = (UnicodeDecodeError, csv.Error, json.JSONDecodeError)
BATCH = 4096  # rows of a parquet file in memory at once


def read_list(path: Path, list_format: str = "") -> Iterator[Item]:
    """The videos of a list, in its order; one that has several rows comes as often.

    Args:
        list_format: a name of `FORMS`; empty: told from the columns.

    Raises:
        StepError: the file cannot be read, has no rows, or is of no known form.
    """
    if list_format and list_format not in FORMS:
        like = nearest(list_format, list(FORMS))
        raise StepError(f"unknown download.list_format {list_format!r}{like}; one of {', '.join(FORMS)}")
    try:
        rows = (row for _, row in read_rows(path))
        first = next(rows, None)
        if first is None:
            raise StepError(f"the list {path} has no rows")
        form = list_format or tell_form(first, path)
        yield from _read(form, chain([first], rows))
    except UNREADABLE as error:
        raise StepError(f"the list {path} cannot be read: {error}; UTF-8 csv, jsonl, json, txt or parquet") from None


def _read(form: str, rows: Iterable[dict]) -> Iterator[Item]:
    for number, row in enumerate(rows, 1):
        try:
            yield from parse_row(form, row)
        except ValueError as error:
            yield Item(f"row {number}", reason=f"bad row: number {number} {error}")


def read_rows(path: Path) -> Iterator[tuple[int, dict]]:
    """(line, row) of a list; in json and parquet, which have no lines, the number of the row, from 1.

    Raises:
        StepError: the file is no list by its name, or no readable parquet file.
        UNREADABLE: it is not what its name says, or not UTF-8.
    """
    match path.suffix.lower():
        case ".csv" | ".tsv":
            with path.open(newline="", encoding="utf-8-sig") as handle:
                table = csv.DictReader(handle, delimiter="\t" if path.suffix.lower() == ".tsv" else ",")
                for row in table:
                    yield table.line_num, row  # the last line of a row that has several
        case ".jsonl":
            with path.open(encoding="utf-8-sig") as handle:
                for number, line in enumerate(handle, 1):
                    if line.strip():
                        yield number, _object(json.loads(line))
        case ".json":
            yield from enumerate(_json_rows(json.loads(path.read_text(encoding="utf-8-sig"))), 1)
        case ".txt":
            with path.open(encoding="utf-8-sig") as handle:
                yield from ((number, {"line": line.strip()}) for number, line in enumerate(handle, 1) if line.strip())
        case ".parquet":
            yield from enumerate(_parquet_rows(path), 1)
        case _:
            raise StepError(f"{path} is no list; its name must end in one of {', '.join(sorted(SUFFIXES))}")


def _object(value: Any) -> dict:
    return value if isinstance(value, dict) else {"line": value}


def _parquet_rows(path: Path) -> Iterator[dict]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        for batch in pq.ParquetFile(path).iter_batches(BATCH):
            yield from batch.to_pylist()
    except pa.ArrowInvalid as error:
        raise StepError(f"the list {path} is no readable parquet file: {error}") from None


def _json_rows(document: Any) -> Iterator[dict]:
    """A list of rows; MSR-VTT's two tables, joined; or an object of videos by their ids."""
    if isinstance(document, list):
        yield from map(_object, document)
        return
    if not isinstance(document, dict):
        raise StepError(f"a list in json is an array of rows or an object of videos, and this is {document!r}")
    if "videos" in document and "sentences" in document:
        sentences: dict[str, list[str]] = {}
        for sentence in document["sentences"]:
            sentences.setdefault(sentence.get("video_id", ""), []).append(sentence.get("caption", ""))
        for video in document["videos"]:
            yield video | {"sentences": sentences.get(video.get("video_id", ""), [])}
        return
    for key, value in document.items():
        yield {"video_id": key} | value if isinstance(value, dict) else {"line": value}
