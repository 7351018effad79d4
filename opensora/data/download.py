"""The step `download`: bring the videos of a source, and check that each one decodes."""

import json
import shutil
import threading
from collections import defaultdict
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from hashlib import sha256
from pathlib import Path, PurePosixPath
from urllib.parse import unquote, urlsplit

from opensora.config import DownloadConfig, ExecutorConfig
from opensora.data.executor import run_shards
from opensora.data.sources.fetch import DownloadError, public_url, without_secrets
from opensora.data.sources.listing import CAPTIONS, VIDEOS, bring, list_items, scheme, stable_url
from opensora.data.sources.lists import Item, read_captions
from opensora.data.sources.platforms import fetch_platform, is_platform
from opensora.data.video import probe
from opensora.data.workers import advance, call_isolated
from opensora.manifest import Clip, Span, Tally, list_parts, part_name, read_part, write_part
from opensora.step import STORE, Report, StepError, StepFolder, fingerprint, read_report, write_json
from opensora.weights import hash_file

PROBE_TIMEOUT_S = 60.0
# What changes how videos are brought, and not which.
MANNER = {
    *("source", "workers", "connections", "connections_per_host", "retries", "timeout_s", "file_timeout_s"),
    "max_bad_share",
}


@dataclass(frozen=True)
class Task:
    """The videos of one shard."""

    config: DownloadConfig
    items: list[Item]
    base: Path  # folder of all steps
    part: Path


def run(config: DownloadConfig, source: str, output: Path, executor: ExecutorConfig) -> Report:
    """Bring every video of `source` into `videos/` beside `output`, and write a row for each.

    Files of this machine stay where they are. One that was brought before is asked for anew only if it changed, so a
    list that grows costs only what is new. See `sources.list_items` for what a source can be.

    Raises:
        StepError: the source is missing or empty, nothing decodes, or more than `max_bad_share` is bad.
    """
    items = list_items(source, config, output.parent / STORE)
    known = [[*asdict(item).values(), stable_url(item.url), _state(item.url)][1:] for item in items]
    folder = StepFolder(output, fingerprint(config.model_dump(exclude=MANNER), known))
    if folder.is_done():
        return read_report(output)
    work = folder.open()
    size = config.shard_videos
    tasks = [
        Task(config, items[start : start + size], output.parent, work / part_name(index))
        for index, start in enumerate(range(0, len(items), size))
    ]
    run_shards(download_shard, tasks, executor, config.workers, "downloading", len(items))
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
    shutil.rmtree(work / "rows", ignore_errors=True)
    report = Report("download", total=tally.total, kept=tally.kept, dropped=dict(tally.dropped), metrics={"mib": mib})
    return folder.finish(report)


def _why(work: Path) -> str:
    """The first reason in full."""
    for path in list_parts(work):
        for clip in read_part(path):
            if not clip.kept:
                return f"; the first: {clip.source}: {clip.reason}"
    return ""


def _state(url: str) -> object:
    """What tells whether a local file changed."""
    path = Path(url)
    if scheme(url) != "file" or not path.is_file():
        return None
    return path.stat().st_size, path.stat().st_mtime_ns


def download_shard(task: Task) -> None:
    """Bring the videos of one shard and write their rows; one that is done leaves its row for a resumed run."""
    (task.base / STORE).mkdir(exist_ok=True)
    rows = task.part.parent / "rows"
    rows.mkdir(exist_ok=True)
    hosts: dict[str, threading.Semaphore] = defaultdict(lambda: threading.Semaphore(task.config.connections_per_host))
    for item in task.items:  # made here: a defaultdict is no place for threads to meet
        hosts[urlsplit(item.url).netloc]
    pool = ThreadPoolExecutor(task.config.connections)
    clips = []
    try:
        for clip in pool.map(lambda item: _row(item, task, rows, hosts), task.items):
            clips.append(clip)
            advance()
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
    write_part(task.part, [_probed(clip, task.base) for clip in clips])


def _row(item: Item, task: Task, rows: Path, hosts: dict[str, threading.Semaphore]) -> Clip:
    identity = sha256(f"{stable_url(item.url)}".encode()).hexdigest()
    mark = rows / f"{identity}.json"
    state = json.loads(json.dumps(_state(item.url)))
    if mark.is_file():
        found = json.loads(mark.read_text())
        if found["state"] == state:
            row = found["row"]
            return Clip(**row | {"spans": tuple(Span(**span) for span in row["spans"])})
    source = public_url(stable_url(item.url))
    clip = Clip(clip_id=identity[:16], source=source, licence=item.licence)
    try:
        if item.reason:
            raise DownloadError(item.reason)
        with hosts[urlsplit(item.url).netloc]:
            clip = _brought(item, clip, task, identity)
    except DownloadError as error:
        clip = replace(clip, path="", kept=False, reason=without_secrets(str(error), item.url))
    write_json(mark, {"state": state, "row": asdict(clip)})
    return clip


def _brought(item: Item, clip: Clip, task: Task, identity: str) -> Clip:
    """The row of a video that is here now.

    Raises:
        DownloadError: the recorded reason.
    """
    local = scheme(item.url) == "file"
    path = Path(item.url) if local else task.base / STORE / _file_name(item.url, identity)
    if local and not path.is_file():
        raise DownloadError(f"missing: no file at {item.url}")
    if not local and not (item.sha256 and path.is_file() and hash_file(path) == item.sha256):
        if is_platform(item.url):
            fetch_platform(item.url, path, task.config)
        else:
            bring(item.url, path, task.config)
    digest = hash_file(path)
    if item.sha256 and digest != item.sha256:
        raise DownloadError(f"wrong content: sha256 is {digest[:12]}…, the list says {item.sha256[:12]}…")
    return replace(
        clip,
        clip_id=digest[:16],
        source_sha256=digest,
        path=str(path.absolute()) if local else str(path.relative_to(task.base)),
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
    first: dict[str, str] = {}
    for path in list_parts(work):
        before = read_part(path)
        after = list(_without_copies(before, first))
        if after != before:
            write_part(path, after)


def _without_copies(clips: list[Clip], first: dict[str, str]) -> Iterator[Clip]:
    for clip in clips:
        if clip.kept and first.setdefault(clip.source_sha256, clip.source) != clip.source:
            clip = replace(clip, kept=False, reason=f"duplicate: the same content as {first[clip.source_sha256]}")
        yield clip
