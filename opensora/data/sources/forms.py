"""The forms of lists: our own columns, and those in which published data sets list their videos.

A reader turns one row into `Item`s; what it raises says what is wrong with the row.
"""

import ast
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from opensora.data.sources.item import Item
from opensora.manifest import WHOLE_VIDEO_S, Span
from opensora.step import StepError

YOUTUBE = "https://www.youtube.com/watch?v="
URL_COLUMNS = ("url", "path", "video", "contentUrl", "video_url", "link")
CAPTION_COLUMNS = ("caption", "text", "name", "title", "description")
LICENCE_COLUMNS = ("licence", "license")


def parse_row(form: str, row: dict) -> list[Item]:
    """The videos of one row.

    Args:
        form: a name of `FORMS`.

    Raises:
        ValueError: it names no video, or is not of that form; the message goes on from "row 3 …".
    """
    try:
        return list(FORMS[form](row))
    except (KeyError, TypeError, ValueError, SyntaxError, AttributeError) as error:
        what = f"lacks {error}" if isinstance(error, KeyError) else str(error) or type(error).__name__
        raise ValueError(what) from None


def tell_form(row: dict, path: Path) -> str:
    """The name of `FORMS` that a list's first row looks like.

    Raises:
        StepError: it looks like none.
    """
    columns = set(row)
    if columns == {"line"}:
        return "ucf101"
    if {"timestamp", "caption"} <= columns and {"videoID", "url"} & columns:
        return "panda70m"
    if "clip" in columns and "url" in columns:
        return "hdvg130m"
    if {"video_id", "sentences"} <= columns:
        return "msrvtt"
    if columns & set(URL_COLUMNS):
        return "table"
    raise StepError(
        f"the list {path} lacks a column for the videos, one of {', '.join(URL_COLUMNS)}; it has "
        f"{', '.join(map(str, row))}. Published lists: --set download.list_format=… ({', '.join(FORMS)})"
    )


def _first(row: dict, names: Iterable[str]) -> str:
    """The first of these columns that says something."""
    return next((str(row[name]) for name in names if row.get(name) is not None and str(row[name]).strip()), "")


def _licence(row: dict) -> str:
    return _first(row, LICENCE_COLUMNS) or "unknown"


def read_table(row: dict) -> list[Item]:
    """Our own columns, Open-Sora's csv (path, text or caption), and lists of stock videos (url, title).

    `url` or `path`; optional: sha256, licence, caption, captions or caption_path (a side-car file of
    {start_s, end_s, caption}), start_s and end_s. WebVid's contentUrl and name, and Pexels-style url and title or
    description are taken too.
    """
    url = _first(row, URL_COLUMNS)
    if not url:
        raise ValueError("names no video")
    caption = _first(row, CAPTION_COLUMNS)
    start, end = _first(row, ("start_s", "start")), _first(row, ("end_s", "end"))
    spans: tuple[Span, ...] = ()
    if start or end:
        spans = (make_span(start or 0, end or WHOLE_VIDEO_S, caption),)
    elif caption:
        spans = (Span(0.0, WHOLE_VIDEO_S, caption),)
    side = _first(row, ("captions", "caption_path"))
    return [Item(url, str(row.get("sha256") or "").lower(), _licence(row), side, spans)]


def read_panda70m(row: dict) -> list[Item]:
    """Panda-70M's csv: videoID, url, timestamp [[start, end], …], caption […] (snap-research.github.io/Panda-70M)."""
    url = _first(row, ("url",)) or YOUTUBE + str(row["videoID"])
    times, captions = _literal(row["timestamp"]), _literal(row["caption"])
    if len(times) != len(captions):
        raise ValueError(f"has {len(times)} timestamps and {len(captions)} captions")
    spans = tuple(make_span(t[0], t[1], str(caption)) for t, caption in zip(times, captions, strict=True))
    return [Item(url, licence=_licence(row), spans=spans)]


def read_hdvg130m(row: dict) -> list[Item]:
    """HD-VG-130M's json: {video id: {url, clip: {name: {span: [start, end], scene_split: [{caption, scene_cut}]}}}}.

    scene_cut counts frames within the span (github.com/daooshee/HD-VG-130M). The list does not say the rate, so a
    scene's times are its share of the span, whose last scene ends with it.
    """
    spans: list[Span] = []
    clips = row["clip"]
    for clip in clips.values() if isinstance(clips, dict) else clips:
        whole = make_span(clip["span"][0], clip["span"][1], str(clip.get("caption") or ""))
        scenes = clip.get("scene_split") or []
        last = max((float(scene["scene_cut"][1]) for scene in scenes), default=0.0)
        length = whole.end_s - whole.start_s
        for scene in scenes:
            begin, end = (whole.start_s + float(frame) / last * length for frame in scene["scene_cut"])
            spans.append(make_span(begin, end, str(scene.get("caption") or "")))
        if not scenes:
            spans.append(whole)
    return [Item(str(row["url"]), licence=_licence(row), spans=tuple(spans))]


def read_msrvtt(row: dict) -> list[Item]:
    """MSR-VTT's json: videos {video_id, url, start time, end time} and sentences {video_id, caption}; the first counts.

    The files that are handed round are cut already and named after the id, so with `download.videos` the id is the
    name and the whole file the clip; without it the span of the original on YouTube is taken.
    """
    caption = row["sentences"][0] if row["sentences"] else ""
    return [
        Item(
            str(row["url"]),
            licence=_licence(row),
            spans=(make_span(row["start time"], row["end time"], caption),),
            cut_file=f"{row['video_id']}.mp4",
        )
    ]


def read_ucf101(row: dict) -> list[Item]:
    """UCF101's lists, `Class/v_Class_g01_c01.avi 1` a line (crcv.ucf.edu/data/UCF101.php).

    The class in words is the caption. A line without a class is a URL or a path alone.
    """
    name = str(row["line"]).rsplit(" ", 1)
    path = name[0] if len(name) == 2 and name[1].isdigit() else str(row["line"])
    folder, slash, file = path.partition("/")
    if slash and file.startswith(f"v_{folder}_"):
        words = "".join(f" {letter.lower()}" if letter.isupper() else letter for letter in folder).strip()
        return [Item(path, spans=(Span(0.0, WHOLE_VIDEO_S, words),))]
    return [Item(path)]


FORMS: dict[str, Callable[[dict], Iterable[Item]]] = {
    "table": read_table,
    "panda70m": read_panda70m,
    "hdvg130m": read_hdvg130m,
    "msrvtt": read_msrvtt,
    "ucf101": read_ucf101,
}


def make_span(start: object, end: object, caption: str) -> Span:
    """A span of two times, in seconds or as [hours:]minutes:seconds.

    Raises:
        ValueError: they are no times, or the end is not after the start.
    """
    first, last = seconds(start), seconds(end)
    if not 0 <= first < last:
        raise ValueError(f"has a bad span: {start} to {end}")
    return Span(first, last, " ".join(caption.split()))


def seconds(value: object) -> float:
    """`12.5`, "12.5" or "0:00:12.500" as seconds."""
    total = 0.0
    for part in str(value).split(":"):
        total = total * 60 + float(part)
    return total


def _literal(value: Any) -> list:
    """A list that a csv holds as text."""
    parsed = ast.literal_eval(value) if isinstance(value, str) else value
    if not isinstance(parsed, list):
        raise ValueError(f"has {value!r} where a list was expected")
    return parsed
