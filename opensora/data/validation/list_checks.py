"""Check a list of videos before anything is fetched, with the reader that the step `download` uses."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from urllib.parse import urlsplit

from opensora.config import nearest
from opensora.data.repeats import Repeats, key_number
from opensora.data.sources.addresses import is_public
from opensora.data.sources.forms import CAPTION_COLUMNS, FORMS, LICENCE_COLUMNS, URL_COLUMNS, parse_row, tell_form
from opensora.data.sources.item import Item, read_captions
from opensora.data.sources.listing import resolve
from opensora.data.sources.lists import UNREADABLE, read_rows
from opensora.data.sources.uri import WEB, scheme
from opensora.data.validation.problems import SHA256, Problem, UnreadableError
from opensora.step import StepError

ALIKE = 0.8  # of two names, 0…1: one is the other mistyped
LOCAL_NAMES = ("localhost", ".localhost", ".local", ".internal")
OPTIONAL_COLUMNS = (*CAPTION_COLUMNS, *LICENCE_COLUMNS, "sha256", "captions", "caption_path", "start_s", "end_s")


@dataclass
class _Seen:
    """What is known of a list only at its end."""

    form: str
    caption_column: bool = False
    rows: int = 0
    captions: int = 0
    repeats: Repeats = field(default_factory=Repeats)


def check_list(path: Path, list_format: str = "", videos: str = "") -> Iterator[Problem]:
    """Problems of a list, by line (by row in json and parquet); no URL is asked for, files of this machine are.

    Args:
        list_format, videos: as `download.list_format` and `download.videos`.

    Raises:
        UnreadableError: it is no list, has no rows, or is of no known form.
    """
    form = list_format or _form(path)
    if form not in FORMS:
        raise UnreadableError(f"unknown form {form!r}{nearest(form, list(FORMS))}; one of {', '.join(FORMS)}")
    seen = _Seen(form)
    line = 0
    try:
        for line, row in read_rows(path):
            if not seen.rows and form == "table":
                seen.caption_column = not {"caption", "text"}.isdisjoint(row)
                yield from _check_columns(path, row)
            seen.rows += 1
            yield from (Problem(f"{path}:{line}", what) for what in _check_row(row, path, videos, seen))
    except (*UNREADABLE, StepError) as error:
        where = f"{path}:{_bad_line(path) or line + 1}"
        yield Problem(
            where, f"cannot be read from here on: {error}; UTF-8 and the form that its name says were expected"
        )
    if seen.caption_column and not seen.captions:
        yield Problem(str(path), "has a column for captions, and all of them are empty")
    yield from _check_repeats(path, videos, seen)


def _form(path: Path) -> str:
    try:
        _, first = next(read_rows(path), (0, None))
        if first is None:
            raise UnreadableError(f"the list {path} has no rows")
        return tell_form(first, path)
    except UNREADABLE as error:
        raise UnreadableError(
            f"the list {path} cannot be read: {error}; UTF-8 csv, jsonl, json, txt or parquet"
        ) from None
    except StepError as error:
        raise UnreadableError(str(error)) from None


def _bad_line(path: Path) -> int:
    """The first line of a text file that is not UTF-8, from 1; 0 for none."""
    if path.suffix.lower() == ".parquet":
        return 0
    with path.open("rb") as handle:
        for number, line in enumerate(handle, 1):
            try:
                line.decode("utf-8")
            except UnicodeDecodeError:
                return number
    return 0


def _check_columns(path: Path, row: dict) -> Iterator[Problem]:
    """Columns that are not read, and whose names look like one that is."""
    known = [*URL_COLUMNS, *OPTIONAL_COLUMNS, "start", "end"]
    for column in row:
        if isinstance(column, str) and column not in known:
            like = get_close_matches(column.lower(), set(known) - set(row), n=1, cutoff=ALIKE)
            if like:
                yield Problem(f"{path}:1", f"the column {column!r} is not read; did you mean {like[0]!r}?")


def _check_row(row: dict, path: Path, videos: str, seen: _Seen) -> Iterator[str]:
    if None in row:
        yield f"has {len(row[None])} more fields than the header"
    elif any(value is None for value in row.values()) and path.suffix.lower() in (".csv", ".tsv"):
        yield f"has only {sum(value is not None for value in row.values())} of {len(row)} fields"
    try:
        items = parse_row(seen.form, row)
    except ValueError as error:
        yield str(error)
        return
    for item in items:
        item = resolve(item, str(path), videos)
        seen.captions += any(span.caption for span in item.spans)
        for key in _keys(item):
            seen.repeats.add(key)
        yield from [item.reason] if item.reason else _check_item(item)


def _keys(item: Item) -> list[str]:
    """What may not come twice: a video, or a span of it."""
    spans = sorted({(span.start_s, span.end_s) for span in item.spans})
    return [f"{item.url} {start} {end}" for start, end in spans] or [item.url]


def _check_item(item: Item) -> Iterator[str]:
    yield from _check_place(item.url)
    if item.sha256 and not SHA256.fullmatch(item.sha256):
        yield f"sha256 is {item.sha256!r}; 64 hexadecimal digits were expected"
    for span in item.spans:
        if not math.isfinite(span.end_s):
            yield f"a span ends at {span.end_s}; seconds were expected"
    if item.captions and scheme(item.captions) != "file":
        yield from _check_place(item.captions)
    elif item.captions:
        try:
            spans = read_captions(Path(item.captions))
        except ValueError as error:
            yield f"captions: {error}"
            return
        for span in spans:
            if not 0 <= span.start_s < span.end_s:
                yield f"captions: {Path(item.captions).name} has a bad span: {span.start_s:g} to {span.end_s:g} s"


def _check_place(url: str) -> Iterator[str]:
    """Whether a URL can be one that `download` takes, or a file is there."""
    kind = scheme(url)
    if kind == "file":
        if not Path(url).is_file():
            yield f"no file at {url}"
        return
    if kind in WEB and any(letter.isspace() or not letter.isprintable() for letter in url):
        yield f"malformed URL {url!r}: it holds a space or an unprintable letter"
        return
    try:
        parts = urlsplit(url)
        host, _ = parts.hostname or "", parts.port
    except ValueError as error:
        yield f"malformed URL {url!r}: {error}"
        return
    if not host:
        yield f"malformed URL {url!r}: it names no host"
    elif kind in WEB and _is_private(host):
        yield f"{host} is a private address, which is refused unless download.allow_private_hosts is set"


def _is_private(host: str) -> bool:
    """Told from the name alone: what a name resolves to is looked at when it is fetched."""
    try:
        return not is_public(host)
    except ValueError:
        return any(host == name or (name[0] == "." and host.endswith(name)) for name in LOCAL_NAMES)


def _check_repeats(path: Path, videos: str, seen: _Seen) -> Iterator[Problem]:
    """Videos, or spans of one, that come twice, in a second reading."""
    repeated = seen.repeats.find()
    first: dict[str, int] = {}
    try:
        for line, row in read_rows(path) if repeated else ():
            try:
                items = parse_row(seen.form, row)
            except ValueError:
                continue
            for item in items:
                item = resolve(item, str(path), videos)
                for key in _keys(item):
                    if key_number(key) not in repeated:
                        continue
                    if key in first:
                        yield Problem(f"{path}:{line}", f"the same video and span as in line {first[key]}: {item.url}")
                    first.setdefault(key, line)
    except (*UNREADABLE, StepError):  # told by the first reading
        return
