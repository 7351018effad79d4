"""The step `download`: bring videos from a folder or a URL manifest, and check that each one decodes."""

import csv
import ipaddress
import json
import os
import shutil
import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from hashlib import sha256
from pathlib import Path
from urllib.parse import urljoin, urlparse

from opensora.config import DownloadConfig, ExecutorConfig
from opensora.data.executor import run_shards
from opensora.data.video import probe
from opensora.data.workers import advance, call_isolated
from opensora.manifest import Clip, Span, Tally, list_parts, part_name, read_part, write_part
from opensora.step import Report, StepError, StepFolder, fingerprint, read_report, write_json

SUFFIXES = {".mp4", ".mov", ".mkv", ".webm", ".avi", ".m4v"}
LISTS = {".csv", ".jsonl", ".parquet"}
CAPTIONS = ".captions.json"
FOREVER_S = 1e9  # end of a caption of the whole video, whose length is not known yet
BLOCK = 1 << 17  # bytes read at once
PROBE_TIMEOUT_S = 60.0
BACK_OFF_S = 0.5  # before the second try; doubles


@dataclass(frozen=True)
class Item:
    """One video to bring: where from, and what its list says of it."""

    url: str  # URL or path
    name: str  # file name below videos/
    sha256: str = ""
    licence: str = "unknown"
    captions: str = ""  # URL or path of a side-car file
    caption: str = ""  # of the whole video


class DownloadError(RuntimeError):
    """One file could not be brought; the message is the recorded reason."""


@dataclass(frozen=True)
class Task:
    """The videos of one shard."""

    config: DownloadConfig
    items: list[Item]
    base: Path  # folder of all steps
    part: Path


def run(config: DownloadConfig, source: str, output: Path, executor: ExecutorConfig) -> Report:
    """Bring every video of `source` into `videos/` beside `output`, and write their rows.

    Raises:
        StepError: the source is missing or empty, nothing decodes, or more than `max_bad_share` is bad.
    """
    key = config.model_dump() | {"source": source}
    key.pop("workers")
    if _is_url(source) and _is_loopback(source):
        key["source"] = urlparse(source).path  # a local server has another port each time
    folder = StepFolder(output, fingerprint(key, _state(source)))
    if folder.is_done():
        return read_report(output)
    work = folder.open()
    items = list_items(source, config)
    size = config.shard_videos
    tasks = [
        Task(config, items[start : start + size], output.parent, work / part_name(index))
        for index, start in enumerate(range(0, len(items), size))
    ]
    run_shards(download_shard, tasks, executor, config.workers, "downloading", len(items))
    _drop_copies(work)
    tally = Tally()
    for path in list_parts(work):
        tally.add(read_part(path))
    if not tally.kept:
        raise StepError(f"none of the {tally.total} files of {source} is a usable video ({tally.reasons})")
    bad = tally.total - tally.kept
    if bad > config.max_bad_share * tally.total:
        raise StepError(
            f"{bad} of {tally.total} videos are bad ({tally.reasons}); raise download.max_bad_share to go on"
        )
    shutil.rmtree(work / "rows", ignore_errors=True)
    return folder.finish(Report("download", total=tally.total, kept=tally.kept, dropped=dict(tally.dropped)))


def download_shard(task: Task) -> None:
    """Bring the videos of one shard and write their rows."""
    videos, rows = task.base / "videos", task.part.parent / "rows"
    videos.mkdir(exist_ok=True)
    rows.mkdir(exist_ok=True)
    with ThreadPoolExecutor(task.config.connections) as pool:
        clips = list(pool.map(lambda item: _fetch_item(item, videos, rows, task.config), task.items))
    write_part(task.part, [_probed(clip, task.base) for clip in clips])


def _drop_copies(work: Path) -> None:
    seen: set[str] = set()
    for path in list_parts(work):
        clips = []
        for clip in read_part(path):
            if clip.kept and clip.source_sha256 in seen:
                clip = replace(clip, kept=False, reason="duplicate: the same file came before")
            seen.add(clip.source_sha256)
            clips.append(clip)
        write_part(path, clips)


def _state(source: str) -> object:
    """What tells whether a local source changed: names, sizes and times of its files."""
    path = Path(source)
    if _is_url(source) or not path.exists():
        return source
    files = sorted(path.rglob("*")) if path.is_dir() else [path]
    return [(str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in files if file.is_file()]


def _is_url(text: str) -> bool:
    return urlparse(text).scheme in ("http", "https")


def _is_loopback(url: str) -> bool:
    return urlparse(url).hostname in ("127.0.0.1", "localhost")


def list_items(source: str, config: DownloadConfig) -> list[Item]:
    """The videos of a source, in a stable order.

    Raises:
        StepError: no such folder or list, or nothing in it.
    """
    path = Path(source)
    if not _is_url(source) and not path.exists():
        raise StepError(f"no such folder or list: {source}; give a folder of videos or a csv, jsonl or parquet list")
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if file.suffix.lower() in SUFFIXES and file.is_file())
        items = [
            Item(str(file), _safe_name(index, file.name), captions=_side_car(file)) for index, file in enumerate(files)
        ]
        if not items:
            raise StepError(f"{source} holds no video ({', '.join(sorted(SUFFIXES))}); give a folder that does")
        return items
    rows = list(_read_list(source, config))
    if not rows:
        raise StepError(f"the list {source} has no rows")
    if not {"url", "path"} & set(rows[0]):
        raise StepError(f"the list {source} lacks the column 'url' or 'path'; it has {', '.join(map(str, rows[0]))}")
    return [_item(index, row, source) for index, row in enumerate(rows)]


def _side_car(file: Path) -> str:
    side = file.with_suffix(CAPTIONS)
    return str(side) if side.is_file() else ""


def _item(index: int, row: dict, source: str) -> Item:
    """One row; `path` and `caption` are the columns of Open-Sora's own lists."""

    def absolute(value: object) -> str:
        text = str(value or "")
        if not text or _is_url(text):
            return text
        return urljoin(source, text) if _is_url(source) else str(Path(source).parent / text)

    url = absolute(row.get("url") or row.get("path"))
    name = _safe_name(index, Path(urlparse(url).path).name)
    captions = absolute(row.get("captions") or row.get("caption_path"))
    licence, caption = str(row.get("licence") or "unknown"), str(row.get("caption") or "")
    return Item(url, name, str(row.get("sha256") or ""), licence, captions, caption)


def _safe_name(index: int, name: str) -> str:
    """A unique file name of plain characters that ends in a video's suffix."""
    stem = "".join(letter if letter.isalnum() or letter in "-_" else "_" for letter in Path(name).stem)[:80]
    suffix = Path(name).suffix.lower()
    return f"{index:06d}-{stem}{suffix if suffix in SUFFIXES else '.mp4'}"


def _read_list(source: str, config: DownloadConfig) -> Iterator[dict]:
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        path = Path(source)
        suffix = Path(urlparse(source).path).suffix
        if _is_url(source):
            path = Path(folder) / f"list{suffix}"
            try:
                fetch(source, path, config)
            except DownloadError as error:
                raise StepError(f"the list {source} could not be fetched: {error}") from None
        if suffix not in LISTS:
            raise StepError(f"{source} is neither a folder nor a list ({', '.join(sorted(LISTS))})")
        if suffix == ".csv":
            with path.open(newline="") as handle:
                yield from csv.DictReader(handle)
        elif suffix == ".jsonl":
            yield from (json.loads(line) for line in path.read_text().splitlines() if line.strip())
        else:
            import pyarrow.parquet as pq

            yield from pq.read_table(path).to_pylist()


def _fetch_item(item: Item, videos: Path, rows: Path, config: DownloadConfig) -> Clip:
    mark = rows / f"{item.name}.json"
    target = videos / item.name
    if mark.is_file():
        row = json.loads(mark.read_text())
        return Clip(**row | {"spans": tuple(Span(**span) for span in row["spans"])})
    clip = Clip(clip_id="", source=item.url, licence=item.licence, path=f"videos/{item.name}")
    try:
        _bring(item.url, target, config)
        spans: tuple[Span, ...] = ()
        if item.captions:
            side = target.with_suffix(CAPTIONS)
            _bring(item.captions, side, config)
            spans = tuple(Span(**span) for span in json.loads(side.read_text()))
        elif item.caption:
            spans = (Span(0.0, FOREVER_S, item.caption),)
        digest = _sha256(target)
        if item.sha256 and digest != item.sha256:
            raise DownloadError(f"wrong content: sha256 is {digest[:12]}…, the list says {item.sha256[:12]}…")
        clip = replace(clip, clip_id=digest[:16], source_sha256=digest, size=target.stat().st_size, spans=spans)
    except DownloadError as error:
        target.unlink(missing_ok=True)
        identity = sha256(item.url.encode()).hexdigest()[:16]
        clip = replace(clip, clip_id=identity, path="", kept=False, reason=str(error))
    write_json(mark, asdict(clip))
    return clip


def _bring(url: str, target: Path, config: DownloadConfig) -> None:
    if _is_url(url):
        fetch(url, target, config)
        return
    try:
        part = target.with_name(target.name + ".part")
        shutil.copyfile(url, part)
        part.replace(target)
    except FileNotFoundError:
        raise DownloadError(f"missing: no file at {url}") from None


def _sha256(path: Path) -> str:
    digest = sha256()
    with path.open("rb") as handle:
        while block := handle.read(BLOCK):
            digest.update(block)
    return digest.hexdigest()


def fetch(url: str, target: Path, config: DownloadConfig) -> None:
    """Download `url`; a cut connection is taken up where it broke, and `target` appears whole or not at all.

    Raises:
        DownloadError: "refused: …", "dead link: …" or "download failed: …".
    """
    if not config.allow_private_hosts:
        _refuse_private(url)
    wait = BACK_OFF_S
    for tries_left in range(config.retries, -1, -1):
        try:
            return _try_fetch(url, target, config)
        except (OSError, EOFError) as error:  # requests' own errors are OSErrors
            if isinstance(error, OSError) and error.errno == 28:
                raise
            if not tries_left:
                raise DownloadError(f"download failed: {error}") from None
            time.sleep(wait)
            wait *= 2


def _try_fetch(url: str, target: Path, config: DownloadConfig) -> None:
    import requests

    part, tag = target.with_name(target.name + ".part"), target.with_name(target.name + ".etag")
    have = part.stat().st_size if part.is_file() and tag.is_file() else 0
    headers = {"Accept-Encoding": "identity"}
    if have:
        headers |= {"Range": f"bytes={have}-", "If-Range": tag.read_text()}
    with requests.get(url, headers=headers, stream=True, timeout=config.timeout_s) as answer:
        if answer.status_code == 416:
            part.unlink(missing_ok=True)
            raise EOFError("the server refused the range; starting over")
        if 400 <= answer.status_code < 500 and answer.status_code not in (408, 429):
            raise DownloadError(f"dead link: HTTP {answer.status_code}")
        if answer.status_code >= 400:
            raise EOFError(f"HTTP {answer.status_code}")
        if answer.status_code != 206:
            have = 0
        if answer.headers.get("ETag"):
            tag.write_text(answer.headers["ETag"])
        expected = have + int(answer.headers.get("Content-Length", -1))
        limit = config.max_mib << 20
        if expected > limit:
            raise DownloadError(f"too large: {expected >> 20} MiB, the limit is {config.max_mib}")
        with part.open("ab" if have else "wb") as handle:
            for block in answer.iter_content(BLOCK):
                handle.write(block)
                if handle.tell() > limit:
                    raise DownloadError(f"too large: more than {config.max_mib} MiB")
            handle.flush()
            os.fsync(handle.fileno())
            size = handle.tell()
    if "Content-Length" in answer.headers and size != expected:
        raise EOFError(f"the connection ended after {size} of {expected} bytes")
    part.replace(target)
    tag.unlink(missing_ok=True)


def _refuse_private(url: str) -> None:
    """A list must not reach into the network that the step runs in."""
    host = urlparse(url).hostname or ""
    try:
        addresses = {info[4][0] for info in socket.getaddrinfo(host, None)}
    except socket.gaierror:
        raise DownloadError(f"dead link: the host {host} is unknown") from None
    for address in addresses:
        if not ipaddress.ip_address(address).is_global:
            raise DownloadError(f"refused: {host} is a private address; set download.allow_private_hosts to allow it")


def _probed(clip: Clip, base: Path) -> Clip:
    """Decode the head of a file in a process that may crash or hang."""
    advance()
    if not clip.kept:
        return clip
    outcome = call_isolated(probe, base / clip.path, PROBE_TIMEOUT_S)
    if outcome.value is None:
        return replace(clip, kept=False, reason=outcome.failure)
    about = outcome.value
    return replace(
        clip, fps=about.fps, frames=about.frames, width=about.width, height=about.height, end_s=about.duration_s
    )
