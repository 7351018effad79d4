"""Where videos come from: what a source's URI names, as items to bring."""

import shutil
import stat
import tarfile
import zipfile
from collections.abc import Iterator
from dataclasses import replace
from hashlib import sha256
from pathlib import Path, PurePosixPath
from typing import IO
from urllib.parse import unquote, urljoin, urlsplit

from opensora.config import DownloadConfig
from opensora.data.sources.fetch import MIB, DownloadError, fetch
from opensora.data.sources.lists import SUFFIXES as LISTS
from opensora.data.sources.lists import YOUTUBE, Item, read_list
from opensora.manifest import WHOLE_VIDEO_S, Span
from opensora.step import StepError

VIDEOS = {".mp4", ".mov", ".mkv", ".webm", ".avi", ".m4v", ".mpg", ".mpeg", ".ts", ".wmv", ".flv"}
ARCHIVES = (".zip", ".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz")
CAPTIONS = ".captions.json"
MAX_FILES = 1_000_000  # of an archive
POSSIBLE = (
    "a folder of videos; a list (csv, tsv, jsonl, json, parquet, txt) or an archive (zip, tar), here or at a URL; "
    "a bucket as in s3://bucket/folder; or hf://datasets/owner/name"
)


def list_items(source: str, config: DownloadConfig, store: Path) -> list[Item]:
    """The videos of a source, each once, in a stable order; their URLs are absolute.

    Args:
        store: folder for what must be brought to know them: lists, archives, data sets.

    Raises:
        StepError: there is no such source, or nothing in it.
    """
    kind = scheme(source)
    path = Path(source)
    if kind == "hf":
        items = _folder(_hugging_face(source, store))
    elif kind == "file" and path.is_dir():
        items = _folder(path)
    elif source.lower().endswith(ARCHIVES):
        items = _archive(_local_copy(source, config, store), store, config)
    elif PurePosixPath(urlsplit(source).path).suffix.lower() in LISTS:
        base = config.videos or source
        items = [resolve(item, base, config.videos) for item in _list(source, config, store)]
    elif kind == "file":
        what = "is none of the sources that there are" if path.exists() else "does not exist"
        raise StepError(f"the source {source} {what}: {POSSIBLE}")
    elif kind in ("http", "https"):
        raise StepError(f"the source {source} is neither a list nor an archive by its name: {POSSIBLE}")
    else:
        items = _bucket(source)
    if not items:
        raise StepError(f"{source} holds no video ({', '.join(sorted(VIDEOS))}); give a source that does")
    return items


def scheme(source: str) -> str:
    """ "file", "http", "https", "s3", …; a Windows drive or a colon in a file's name is no scheme."""
    head, mark, _ = source.partition("://")
    return head.lower() if mark and head.isalnum() else "file"


def _list(source: str, config: DownloadConfig, store: Path) -> list[Item]:
    return read_list(_local_copy(source, config, store), config.list_format)


def resolve(item: Item, base: str, videos: str) -> Item:
    """An item whose relative paths are taken from `base`: the list itself, or the folder of its videos.

    Args:
        videos: `download.videos`.
    """
    if item.reason:
        return item
    if videos and item.cut_file:
        caption = item.spans[0].caption if item.spans else ""
        return replace(item, url=_join(base, item.cut_file, True), spans=(Span(0.0, WHOLE_VIDEO_S, caption),))
    url = item.url
    if "/" not in url and "." not in url and len(url) == 11:  # an id of YouTube's
        url = YOUTUBE + url
    return replace(
        item, url=_join(base, url, bool(videos)), captions=_join(base, item.captions, False) if item.captions else ""
    )


def _join(base: str, name: str, is_folder: bool) -> str:
    if scheme(name) != "file" or Path(name).is_absolute():
        return name
    if scheme(base) == "file":
        return str((Path(base) if is_folder else Path(base).parent) / name)
    if scheme(base) in ("http", "https"):
        return urljoin(base.rstrip("/") + "/" if is_folder else base, name)
    return f"{base.rstrip('/') if is_folder else base.rpartition('/')[0]}/{name}"


def _folder(folder: Path) -> list[Item]:
    files = sorted(path for path in folder.rglob("*") if path.suffix.lower() in VIDEOS and path.is_file())
    return [Item(str(file.absolute()), captions=_side_car(file)) for file in files]


def _side_car(file: Path) -> str:
    side = file.with_suffix(CAPTIONS)
    return str(side.absolute()) if side.is_file() else ""


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


def stable_url(url: str) -> str:
    """`url`, with that of a server on this machine freed of its port, which is another in every run."""
    parts = urlsplit(url)
    if parts.hostname in ("127.0.0.1", "localhost"):
        return parts._replace(netloc="localhost").geturl()
    return url


def bring(url: str, target: Path, config: DownloadConfig) -> None:
    """Bring one file from the web or a bucket to `target`, whole or not at all.

    Raises:
        DownloadError: the recorded reason.
        OSError: the disk is full.
    """
    if scheme(url) in ("http", "https"):
        fetch(url, target, config)
        return
    import fsspec

    part = target.with_name(target.name + ".part")
    try:
        system, path = fsspec.core.url_to_fs(url)
        size = system.info(path).get("size") or 0
        if size > config.max_mib * MIB:
            raise DownloadError(f"too large: {size >> 20} MiB, the limit is {config.max_mib}")
        system.get_file(path, str(part))
    except FileNotFoundError:
        raise DownloadError(f"dead link: nothing at {url}") from None
    except ImportError as error:
        raise DownloadError(f"download failed: {error}; for buckets: pip install 'opensora-workflow[s3]'") from None
    except ValueError as error:  # fsspec: an unknown protocol
        raise DownloadError(f"download failed: {error}") from None
    except OSError as error:
        if error.errno == 28:
            raise
        raise DownloadError(f"download failed: {error}") from None
    part.replace(target)


def _bucket(source: str) -> list[Item]:
    """Videos below a folder of a bucket, by fsspec, with side-car captions where there are any."""
    import fsspec

    try:
        system, path = fsspec.core.url_to_fs(source)
        names = sorted(system.find(path))
    except (ImportError, ValueError) as error:
        raise StepError(f"the source {source} cannot be read: {error}; {POSSIBLE}") from None
    except OSError as error:
        raise StepError(f"the source {source} cannot be read: {error}; look at the name and the credentials") from None
    known = set(names)
    videos = [name for name in names if PurePosixPath(name).suffix.lower() in VIDEOS]
    sides = {name: str(PurePosixPath(name).with_suffix(CAPTIONS)) for name in videos}
    whole = system.unstrip_protocol
    return [Item(whole(name), captions=whole(sides[name]) if sides[name] in known else "") for name in videos]


def _hugging_face(source: str, store: Path) -> Path:
    """The videos of a data set of the Hugging Face hub, brought by its own client, which resumes; their folder.

    `hf://datasets/owner/name`, or `…@revision`. HF_TOKEN opens data sets that are not public.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError

    name, _, revision = source.removeprefix("hf://").removeprefix("datasets/").partition("@")
    folder = store / f"hf-{sha256(source.encode()).hexdigest()[:16]}"
    patterns = [f"*{suffix}" for suffix in (*VIDEOS, CAPTIONS)]
    try:
        snapshot_download(
            name, repo_type="dataset", revision=revision or None, local_dir=folder, allow_patterns=patterns
        )
    except RepositoryNotFoundError:
        raise StepError(f"no data set {name} on the hub, or not with this HF_TOKEN; hf://datasets/owner/name") from None
    except (HfHubHTTPError, OSError) as error:
        if getattr(error, "errno", None) == 28:
            raise
        raise StepError(f"the data set {name} could not be brought: {error}; start again to go on") from None
    return folder


def _archive(archive: Path, store: Path, config: DownloadConfig) -> list[Item]:
    """Unpack the videos of an archive below `store`; members that would leave it are items with a reason."""
    state = archive.stat()
    key = sha256(f"{archive.absolute()} {state.st_size} {state.st_mtime_ns}".encode()).hexdigest()[:16]
    folder = store / f"archive-{key}"
    items = []
    sides = []
    try:
        for name, size, reason, source in _members(archive):
            suffix = "".join(PurePosixPath(name).suffixes[-2:]).lower()
            if PurePosixPath(name).suffix.lower() not in VIDEOS and suffix != CAPTIONS:
                continue
            where = f"{archive.absolute()}!{name}"
            target = folder / name
            if not reason and not target.resolve().is_relative_to(folder.resolve()):
                reason = "refused: its name leads out of the archive"
            if not reason and size > config.max_mib * MIB:
                reason = f"too large: {size >> 20} MiB, the limit is {config.max_mib}"
            if reason:
                items.append(Item(where, reason=reason))
                continue
            _unpack(source, target, size)
            if suffix == CAPTIONS:
                sides.append(target)
            else:
                items.append(Item(str(target.absolute())))
            if len(items) > MAX_FILES:
                raise StepError(f"{archive} holds more than {MAX_FILES} videos; give a folder or a list")
    except (tarfile.TarError, zipfile.BadZipFile, EOFError) as error:
        raise StepError(f"the archive {archive} is damaged: {error}; bring it again") from None
    by_video = {side.name.removesuffix(CAPTIONS): side for side in sides}
    return sorted(
        (
            replace(item, captions=str(by_video[Path(item.url).stem].absolute()))
            if not item.reason and Path(item.url).stem in by_video
            else item
            for item in items
        ),
        key=lambda item: item.url,
    )


def _members(archive: Path) -> Iterator[tuple[str, int, str, IO[bytes] | None]]:
    """(name, bytes, why it is refused, its content) of every file in an archive, one open at a time."""
    if archive.name.lower().endswith(".zip"):
        with zipfile.ZipFile(archive) as bundle:
            for info in bundle.infolist():
                if info.is_dir():
                    continue
                link = stat.S_ISLNK(info.external_attr >> 16)
                reason = "refused: a link" if link else "refused: encrypted" if info.flag_bits & 1 else ""
                if reason:
                    yield info.filename, info.file_size, reason, None
                    continue
                with bundle.open(info) as content:
                    yield info.filename, info.file_size, "", content
        return
    with tarfile.open(archive) as bundle:
        for member in bundle:
            if member.isdir():
                continue
            if not member.isfile():
                yield member.name, member.size, "refused: a link or a device", None
                continue
            yield member.name, member.size, "", bundle.extractfile(member)


def _unpack(source: IO[bytes] | None, target: Path, size: int) -> None:
    """Write a member, which may not hold more than it says; one that a stopped run unpacked is there already."""
    if source is None or (target.is_file() and target.stat().st_size == size):
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.with_name(target.name + ".part")
    with part.open("wb") as handle:
        shutil.copyfileobj(source, handle)
    part.replace(target)
