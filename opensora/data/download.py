"""The step `download`: bring the videos of a source, and check that each one decodes."""

import json
import shutil
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from hashlib import sha256
from pathlib import Path, PurePosixPath
from typing import IO
from urllib.parse import unquote, urlsplit

from opensora.config import DownloadConfig, ExecutorConfig
from opensora.data.executor import run_shards
from opensora.data.repeats import Repeats, key_number
from opensora.data.sources.bring import bring
from opensora.data.sources.item import CAPTIONS, VIDEOS, Item, read_captions
from opensora.data.sources.listing import list_items
from opensora.data.sources.partial import DownloadError
from opensora.data.sources.uri import public_url, scheme, stable_url, without_secrets
from opensora.data.sources.work_list import WorkList, items_file, read_items, write_work_list
from opensora.data.video import probe
from opensora.data.workers import advance, call_isolated
from opensora.manifest import Clip, Span, Tally, list_parts, part_name, read_part, read_table, write_part
from opensora.step import (
    PARTIAL,
    STORE,
    Report,
    StepError,
    StepFolder,
    fingerprint,
    lock_file,
    read_report,
)
from opensora.weights import hash_file

PROBE_TIMEOUT_S = 60.0
MAX_SHARDS = 100_000  # names of parts have five digits
ITEMS = "items"  # folder of the work list, a file a shard
ROWS = "rows"  # folder of the rows of shards that are not done yet, a file a shard
# What changes how videos are brought, and not which.
MANNER = {
    *("source", "workers", "connections", "connections_per_host", "retries", "timeout_s", "file_timeout_s"),
    "max_bad_share",
}


@dataclass(frozen=True)
class Task:
    """The videos of one shard."""

    config: DownloadConfig
    shard: int
    base: Path  # folder of all steps
    items: Path  # folder of the work list
    part: Path


def run(config: DownloadConfig, source: str, output: Path, executor: ExecutorConfig) -> Report:
    """Bring every video of `source` into `videos/` beside `output`, and write a row for each.

    Files of this machine stay where they are. One that was brought before is asked for anew only if it changed, so a
    list that grows costs only what is new. See `sources.listing` for what a source can be.

    Raises:
        StepError: the source is missing or empty, nothing decodes, or more than `max_bad_share` is bad.
    """
    # A share reads a list of its own: signed links, and the embedded world's port, are others in every process.
    items = f"{ITEMS}.{executor.share.replace('/', '-')}" if executor.share else ITEMS
    listed = output.parent / PARTIAL / f"{output.name}.{items}"
    with closing(_claim(listed)):
        work_list = _list(config, source, output.parent / STORE, listed)
        folder = StepFolder(output, fingerprint(config.model_dump(exclude=MANNER), work_list.digest))
        if folder.is_done():
            shutil.rmtree(listed)
            return read_report(output)
        work = folder.open(shared=bool(executor.share))
        shutil.rmtree(work / items, ignore_errors=True)
        listed.rename(work / items)
    tasks = [
        Task(config, shard, output.parent, work / items, work / part_name(shard)) for shard in range(work_list.shards)
    ]
    run_shards(download_shard, tasks, executor, config.workers, "downloading", work_list.videos)
    _drop_copies(work)
    tally, mib = Tally(), 0.0
    for path in list_parts(work):
        clips = read_part(path)
        tally.add(clips)
        mib += sum(clip.size for clip in clips if clip.kept) / 2**20
    if not tally.kept:
        raise StepError(f"none of the {tally.total} videos of {source} is usable ({tally.reasons}){_why(work)}")
    bad = tally.total - tally.kept
    if bad > config.max_bad_share * tally.total:
        raise StepError(
            f"{bad} of {tally.total} videos are bad ({tally.reasons}){_why(work)}; "
            "raise download.max_bad_share to go on"
        )
    for path in (*work.glob(f"{ITEMS}*"), work / ROWS):
        shutil.rmtree(path, ignore_errors=True)
    report = Report("download", total=tally.total, kept=tally.kept, dropped=dict(tally.dropped), metrics={"mib": mib})
    return folder.finish(report)


def _claim(listed: Path) -> IO[str]:
    """An empty folder for the work list, and the lock on it."""
    listed.parent.mkdir(parents=True, exist_ok=True)
    lock = lock_file(listed.with_name(listed.name + ".lock"))
    if lock is None:
        raise StepError(f"another process is listing the videos for {listed.parent.parent}; wait for it or stop it")
    shutil.rmtree(listed, ignore_errors=True)
    listed.mkdir()
    return lock


def _list(config: DownloadConfig, source: str, store: Path, folder: Path) -> WorkList:
    items = list_items(source, config, store)
    work_list = write_work_list(items, folder, config.shard_videos, _identity)
    if work_list.shards > MAX_SHARDS:
        least = -(-work_list.videos // MAX_SHARDS)
        raise StepError(
            f"{work_list.videos:,} videos are too many shards; set download.shard_videos to {least} or more"
        )
    return work_list


def _identity(item: Item) -> str:
    """What of an item decides what is brought: what its list says, and the state of the files that it names."""
    stable = replace(item, url=stable_url(item.url), captions=stable_url(item.captions))
    return f"{stable.to_json()} {_state(item.url)} {_state(item.captions)}"


def _state(url: str) -> tuple[int, int] | None:
    """What tells whether a local file changed."""
    path = Path(url)
    if not url or scheme(url) != "file" or not path.is_file():
        return None
    return path.stat().st_size, path.stat().st_mtime_ns


def _why(work: Path) -> str:
    """The first reason in full."""
    for path in list_parts(work):
        for clip in read_part(path):
            if not clip.kept:
                return f"; the first: {clip.source}: {clip.reason}"
    return ""


def download_shard(task: Task) -> None:
    """Bring the videos of one shard and write their rows; one that is done leaves its row for a resumed run."""
    (task.base / STORE).mkdir(exist_ok=True)
    work = task.part.parent
    items = read_items(items_file(task.items, task.shard))
    journal = work / ROWS / f"{task.shard:05d}.jsonl"
    journal.parent.mkdir(exist_ok=True)
    rows = _read_journal(journal)
    for _ in rows:
        advance()
    hosts = {urlsplit(item.url).netloc: threading.Semaphore(task.config.connections_per_host) for item in items}
    pool, stopped = ThreadPoolExecutor(task.config.connections), threading.Event()
    try:
        left = [item for item in items if stable_url(item.url) not in rows]
        started = [pool.submit(_row, item, task, hosts, stopped) for item in left]
        with journal.open("a") as handle:
            for done in as_completed(started):
                url, clip = done.result()
                handle.write("\n" + json.dumps({"url": url, "row": asdict(clip)}))
                handle.flush()
                rows[url] = clip
                advance()
    finally:
        stopped.set()  # Ctrl-C or a full disk: nobody waits for the others
        pool.shutdown(wait=False, cancel_futures=True)
    write_part(task.part, [_probed(rows[stable_url(item.url)], task.base) for item in items])
    journal.unlink()


def _read_journal(path: Path) -> dict[str, Clip]:
    """The rows that a stopped run left, by URL; a torn line is one that was not written."""
    rows = {}
    for line in path.read_text().split("\n") if path.is_file() else ():
        try:
            entry = json.loads(line)
        except ValueError:
            continue
        spans = tuple(Span(**span) for span in entry["row"]["spans"])
        rows[entry["url"]] = Clip(**entry["row"] | {"spans": spans})
    return rows


def _row(item: Item, task: Task, hosts: dict[str, threading.Semaphore], stopped: threading.Event) -> tuple[str, Clip]:
    """(stable URL, row) of a video, brought or with the reason why not."""
    url = stable_url(item.url)
    identity = sha256(url.encode()).hexdigest()
    clip = Clip(clip_id=identity[:16], source=item.source or public_url(url), licence=item.licence)
    try:
        if item.reason:
            raise DownloadError(item.reason)
        with hosts[urlsplit(item.url).netloc]:
            clip = _brought(item, clip, task, identity, stopped)
    except DownloadError as error:
        clip = replace(clip, path="", kept=False, reason=without_secrets(str(error), item.url))
    return url, clip


def _brought(item: Item, clip: Clip, task: Task, identity: str, stopped: threading.Event) -> Clip:
    """The row of a video that is here now.

    Raises:
        DownloadError: the recorded reason.
    """
    local = scheme(item.url) == "file"
    path = Path(item.url).absolute() if local else (task.base / STORE).absolute() / _file_name(item.url, identity)
    if local and not path.is_file():
        raise DownloadError(f"missing: no file at {item.url}")
    if not local and not (item.sha256 and path.is_file() and hash_file(path) == item.sha256):
        bring(item.url, path, task.config, stopped)
    digest = hash_file(path)
    if item.sha256 and digest != item.sha256:
        raise DownloadError(f"wrong content: sha256 is {digest[:12]}…, the list says {item.sha256[:12]}…")
    ours = path.is_relative_to((task.base / STORE).absolute())
    return replace(
        clip,
        clip_id=digest[:16],
        source_sha256=digest,
        path=str(path.relative_to(task.base.absolute()) if ours else path),
        size=path.stat().st_size,
        spans=item.spans or _side_car(item, path, task.config),
    )


def _file_name(url: str, identity: str) -> str:
    """A name of plain characters that no other URL has, and the same in every run."""
    name = PurePosixPath(unquote(urlsplit(url).path)).name
    stem = "".join(letter if letter.isascii() and (letter.isalnum() or letter in "-_") else "_" for letter in name)
    suffix = PurePosixPath(name).suffix.lower()
    return f"{identity[:16]}-{stem.removesuffix(suffix.replace('.', '_'))[:60]}{suffix if suffix in VIDEOS else '.mp4'}"


def _side_car(item: Item, video: Path, config: DownloadConfig) -> tuple[Span, ...]:
    """Captions that lie beside a video: a list of {start_s, end_s, caption}.

    Raises:
        DownloadError: it cannot be brought, or is something else.
    """
    if not item.captions:
        return ()
    path = Path(item.captions)
    if scheme(item.captions) != "file":
        path = video.with_name(video.stem + CAPTIONS)
        bring(item.captions, path, config)
    try:
        return read_captions(path)
    except ValueError as error:
        raise DownloadError(f"bad captions: {error}") from None


def _probed(clip: Clip, base: Path) -> Clip:
    """Decode the head of a file in a process that may crash or hang."""
    if not clip.kept:
        return clip
    outcome = call_isolated(probe, base / clip.path, PROBE_TIMEOUT_S)
    if outcome.value is None:
        return replace(clip, kept=False, reason=outcome.failure)
    about = outcome.value
    return replace(
        clip, fps=about.fps, frames=about.frames, width=about.width, height=about.height, end_s=about.duration_s
    )


def _drop_copies(work: Path) -> None:
    """Keep the first row of each content over all parts, and say in the others which that is."""
    repeats = Repeats()
    for path in list_parts(work):
        table = read_table(path)
        for digest, kept in zip(table["source_sha256"].to_pylist(), table["kept"].to_pylist(), strict=True):
            if kept:
                repeats.add(digest)
    repeated = repeats.find()
    first: dict[str, str] = {}
    for path in list_parts(work) if repeated else ():
        before = read_part(path)
        after = list(_without_copies(before, repeated, first))
        if after != before:
            write_part(path, after)


def _without_copies(clips: list[Clip], repeated: set[int], first: dict[str, str]) -> Iterator[Clip]:
    for clip in clips:
        if clip.kept and key_number(clip.source_sha256) in repeated:
            if clip.source_sha256 in first:
                reason = f"duplicate: the same content as {first[clip.source_sha256]}"
                clip = replace(clip, kept=False, reason=reason)
            else:
                first[clip.source_sha256] = clip.source
        yield clip
