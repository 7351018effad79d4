"""What a source's URI names, as items to bring."""

from collections.abc import Iterator
from dataclasses import replace
from hashlib import sha256
from pathlib import Path, PurePosixPath
from urllib.parse import unquote, urlsplit

from opensora.config import DownloadConfig
from opensora.data.sources.archives import SUFFIXES as ARCHIVES
from opensora.data.sources.archives import unpack
from opensora.data.sources.bring import bring
from opensora.data.sources.folders import list_folder
from opensora.data.sources.forms import YOUTUBE
from opensora.data.sources.hub import list_data_set
from opensora.data.sources.item import VIDEOS, Item
from opensora.data.sources.lists import SUFFIXES as LISTS
from opensora.data.sources.lists import read_list
from opensora.data.sources.object_store import list_bucket
from opensora.data.sources.partial import DownloadError
from opensora.data.sources.uri import HUB, LISTED, WEB, join, public_url, scheme, stable_url
from opensora.manifest import WHOLE_VIDEO_S, Span
from opensora.step import StepError

POSSIBLE = (
    "a folder of videos; a list (csv, tsv, jsonl, json, parquet, txt) or an archive (zip, tar), here or at a URL; "
    "a bucket as in s3://bucket/folder; or hf://datasets/owner/name"
)


def list_items(source: str, config: DownloadConfig, store: Path) -> Iterator[Item]:
    """The videos of a source, in a stable order, with absolute URLs; a list may name one several times.

    Args:
        store: folder for what must be brought to know them: lists, archives.

    Raises:
        StepError: there is no such source, or nothing in it.
    """
    empty = True
    for item in _items(source, config, store):
        empty = False
        yield item
    if empty:
        raise StepError(f"{source} holds no video ({', '.join(sorted(VIDEOS))}); give a source that does")


def _items(source: str, config: DownloadConfig, store: Path) -> Iterator[Item]:
    kind = scheme(source)
    path = Path(source)
    if kind == HUB:
        yield from list_data_set(source)
    elif kind == "file" and path.is_dir():
        yield from list_folder(path)
    elif source.lower().endswith(ARCHIVES):
        name = str(path.absolute()) if kind == "file" else public_url(stable_url(source))
        yield from unpack(_local_copy(source, config, store), name, store, config)
    elif PurePosixPath(urlsplit(source).path).suffix.lower() in LISTS:
        for item in read_list(_local_copy(source, config, store), config.list_format):
            yield resolve(item, source, config.videos)
    elif kind == "file":
        what = "is none of the sources that there are" if path.exists() else "does not exist"
        raise StepError(f"the source {source} {what}: {POSSIBLE}")
    elif kind in WEB:
        raise StepError(f"the source {source} is neither a list nor an archive by its name: {POSSIBLE}")
    else:
        yield from list_bucket(source)


def resolve(item: Item, source: str, videos: str) -> Item:
    """An item whose relative paths are taken from the list `source`, or from the folder or URL `videos`.

    A list from elsewhere may not make this machine read its own files, but for those below `videos`, which the user
    named; nor may any list name a kind of place that is not known.

    Args:
        videos: `download.videos`.
    """
    if item.reason:
        return item
    base, is_folder = (videos, True) if videos else (source, False)
    if videos and item.cut_file:
        caption = item.spans[0].caption if item.spans else ""
        item = replace(item, url=item.cut_file, spans=(Span(0.0, WHOLE_VIDEO_S, caption),))
    elif "/" not in item.url and "." not in item.url and len(item.url) == 11:  # an id of YouTube's
        item = replace(item, url=YOUTUBE + item.url)
    url = join(base, item.url, is_folder)
    captions = join(base, item.captions, is_folder) if item.captions else ""
    item = replace(item, url=url, captions=captions)
    reason = _refusal(url, source, videos) or (_refusal(captions, source, videos) if captions else "")
    return replace(item, reason=reason) if reason else item


def _refusal(url: str, source: str, videos: str) -> str:
    """Why a list may not name `url`; empty if it may."""
    kind = scheme(url)
    if kind != "file":
        return "" if kind in LISTED else f"refused: {kind}:// is none of {', '.join(LISTED)}"
    if scheme(source) == "file":
        return ""
    if videos and Path(url).resolve().is_relative_to(Path(videos).resolve()):
        return ""
    return "refused: a list from elsewhere names a file of this machine"


def _local_copy(source: str, config: DownloadConfig, store: Path) -> Path:
    """`source` itself if it is a file here, else a copy in `store`."""
    if scheme(source) == "file":
        if not Path(source).is_file():
            raise StepError(f"the source {source} does not exist: {POSSIBLE}")
        return Path(source)
    name = PurePosixPath(unquote(urlsplit(source).path)).name
    target = store / f"{sha256(stable_url(source).encode()).hexdigest()[:16]}-{name}"
    store.mkdir(parents=True, exist_ok=True)
    try:
        bring(source, target, config)
    except DownloadError as error:
        raise StepError(f"the source {source} could not be fetched: {error}") from None
    return target
