"""The step `split`: find the shots of every video and write them as normalised clips into tar shards."""

import json
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from hashlib import sha256
from pathlib import Path

from opensora.config import ExecutorConfig, SplitConfig
from opensora.data.cut import Cut, Written, cut_clips
from opensora.data.detectors import check_transnetv2
from opensora.data.executor import run_shards
from opensora.data.shards import ShardWriter
from opensora.data.shots import Scan, find_clips, intact_runs, scan_video
from opensora.data.video import TruncatedError, VideoError
from opensora.data.workers import Outcome, advance, call_isolated, run_tasks
from opensora.manifest import (
    GIVEN,
    WHOLE_VIDEO_S,
    Clip,
    Span,
    Tally,
    count_rows,
    list_parts,
    manifest_hash,
    part_index,
    read_part,
    write_part,
)
from opensora.step import UNWRITABLE, Report, StepError, StepFolder, fingerprint, read_report, write_json
from opensora.weights import hash_file

ROWS = "rows.json"
MIN_OVERLAP = 0.5  # share of a clip that a given caption's span must cover


@dataclass(frozen=True)
class Task:
    """One shard of videos."""

    config: SplitConfig
    inputs: Path  # part of the download step's manifest
    base: Path  # folder of all steps
    transnetv2: Path | None
    part: Path
    processes: int = 1  # that decode: more where there are more workers than shards


@dataclass(frozen=True)
class Job:
    """One video to split, and the folder for its clips."""

    video: Clip
    path: Path
    folder: Path
    config: SplitConfig
    transnetv2: Path | None = None


def run(
    config: SplitConfig, inputs: Path, output: Path, executor: ExecutorConfig, *, transnetv2: Path | None = None
) -> Report:
    """Split the kept videos of the download step in `inputs`; see the step contract in the module `step`.

    Args:
        transnetv2: ONNX file, for the detector of that name.

    Raises:
        StepError: nothing is left, or more than `max_bad_share` of the videos is bad.
        WeightsError: the file is no TransNetV2.
    """
    settings = config.model_dump(exclude={"workers", "video_timeout_s", "max_bad_share"})
    model = hash_file(transnetv2) if transnetv2 else ""
    folder = StepFolder(output, fingerprint(settings, manifest_hash(inputs), model))
    if folder.is_done():
        return read_report(output)
    if transnetv2:
        check_transnetv2(transnetv2)
    work = folder.open()
    found = list_parts(inputs)
    spare = config.workers // len(found) if executor.kind == "pool" else 1
    tasks = [Task(config, part, output.parent, transnetv2, work / part.name, max(1, spare)) for part in found]
    run_shards(split_shard, tasks, executor, config.workers, "splitting videos", count_rows(inputs))
    tally, seconds = Tally(), 0.0
    videos = good = 0
    for path in list_parts(work):
        clips = read_part(path)
        tally.add(clips)
        seconds += sum(clip.frames / clip.fps for clip in clips if clip.kept)
        videos += len({clip.source for clip in clips})
        good += len({clip.source for clip in clips if clip.kept})
    _check(tally, videos, videos - good, config.max_bad_share)
    shutil.rmtree(work / "videos", ignore_errors=True)
    metrics = {"videos": float(videos), "clip_seconds": seconds}
    return folder.finish(Report("split", tally.total, tally.kept, dict(tally.dropped), metrics))


def _check(tally: Tally, videos: int, bad: int, max_bad_share: float) -> None:
    if not tally.kept:
        raise StepError(f"no clip is left after splitting {videos} videos ({tally.reasons}); look at the videos")
    if bad > max_bad_share * videos:
        raise StepError(f"{bad} of {videos} videos are bad ({tally.reasons}); raise split.max_bad_share to go on")


def split_shard(task: Task) -> None:
    """Split the videos of one part into the tar files and the part of the same number."""
    scratch = task.part.parent / "videos"
    rows: list[Clip] = []
    jobs = []
    for video in read_part(task.inputs):
        if video.kept:
            folder = scratch / task.part.stem / video.clip_id
            jobs.append(Job(video, task.base / video.path, folder, task.config, task.transnetv2))
        else:
            rows.append(video)
            advance()
    left = [job for job in jobs if not (job.folder / ROWS).is_file()]  # a run before this one may have done others
    for _ in range(len(jobs) - len(left)):
        advance()
    for outcome in _outcomes(left, task.config.video_timeout_s, task.processes):
        _record(left[outcome.index], outcome)
        advance()
    index = part_index(task.part)
    for old in task.part.parent.glob(f"clips-{index:05d}-*"):
        old.unlink()
    writer = ShardWriter(task.part.parent, index, task.config.shard_mib)
    for job in jobs:
        rows += _packed(job, writer)
    writer.close()
    write_part(task.part, rows)
    shutil.rmtree(scratch / task.part.stem, ignore_errors=True)


def _outcomes(jobs: list[Job], timeout_s: float, processes: int) -> Iterator[Outcome[int]]:
    """Split videos, each in a process that a bad one may crash or hang."""
    if processes > 1:
        yield from run_tasks(split_video, jobs, processes, timeout_s)
    else:
        for index, job in enumerate(jobs):
            yield replace(call_isolated(split_video, job, timeout_s), index=index)


def _record(job: Job, outcome: Outcome[int]) -> None:
    """Leave a row for a video that failed; one that did not has left its own."""
    if outcome.error_number in UNWRITABLE:
        raise OSError(outcome.error_number, outcome.failure)
    if outcome.failure:
        shutil.rmtree(job.folder, ignore_errors=True)
        job.folder.mkdir(parents=True)
        write_json(job.folder / ROWS, [asdict(replace(job.video, spans=(), kept=False, reason=outcome.failure))])


def _packed(job: Job, writer: ShardWriter) -> list[Clip]:
    """The rows of a video, its clips put into the shard."""
    rows = []
    for row in json.loads((job.folder / ROWS).read_text()):
        clip = Clip(**row | {"spans": ()})
        if clip.kept:
            data = (job.folder / f"{clip.clip_id}.mp4").read_bytes()
            about: dict[str, object] = {"source": clip.source, "start_s": clip.start_s, "end_s": clip.end_s}
            shard, offset, size = writer.add(clip.clip_id, data, about)
            clip = replace(clip, shard=shard, offset=offset, size=size)
        rows.append(clip)
    return rows


def split_video(job: Job) -> int:
    """Cut one video into clips below `job.folder`; rows.json, written last, says that it is done.

    Raises:
        VideoError: the file is gone or another one, or nothing of it can be decoded.
        OSError: the clips cannot be written.
    """
    shutil.rmtree(job.folder, ignore_errors=True)
    job.folder.mkdir(parents=True)
    if not job.path.is_file():
        raise VideoError(f"missing: no file at {job.path}; run `opensora download` again")
    if job.video.source_sha256 and hash_file(job.path) != job.video.source_sha256:
        raise VideoError("changed: the file is not the one that was downloaded; run `opensora download` again")
    scan = scan_video(job.path, job.config, job.transnetv2)
    spans = [span for span in job.video.spans if span.end_s < WHOLE_VIDEO_S]
    if job.config.given_spans and spans:
        rows = _given(job, scan, spans)
    else:
        rows = _detected(job, scan)
    if scan.ending:
        rows.append(_missing(job, scan, scan.ending))
    write_json(job.folder / ROWS, [asdict(row) for row in rows])
    return len(rows)


def _detected(job: Job, scan: Scan) -> list[Clip]:
    """Cut the detected shots; a given caption goes to the clips that its span covers."""
    found, lost = find_clips(scan, job.config)
    written = _cut(job, scan, found)
    rows = [_with_caption(_clip(job.video, scan, span, written[span]), job.video.spans) for span in found]
    for span in lost:
        clip = _clip(job.video, scan, span, None)
        bad = int((~scan.intact[slice(*span)]).sum())
        rows.append(replace(clip, kept=False, reason=f"damaged: {bad} of its {span[1] - span[0]} frames do not decode"))
    return rows


def _missing(job: Job, scan: Scan, ending: TruncatedError) -> Clip:
    """The row of what a video holds no more, behind its last frame."""
    end = scan.timeline.frames
    row = _clip(job.video, scan, (end, end), None)
    return replace(row, end_s=max(row.start_s, ending.declared_s), kept=False, reason=str(ending))


def _given(job: Job, scan: Scan, spans: list[Span]) -> list[Clip]:
    """Cut the spans that a list names, and record those that cannot be had."""
    timeline = scan.timeline
    captions: dict[tuple[int, int], str] = {}
    refused = []
    for span in spans:
        frames = (timeline.frame_at(span.start_s), timeline.frame_at(span.end_s))
        length = timeline.at(timeline.frames)
        if scan.ending and span.end_s > length + timeline.period:
            reason = str(scan.ending)
        elif frames[0] >= frames[1]:
            reason = f"outside: {span.start_s:g} to {span.end_s:g} s hold no frame of {length:g} s"
        elif any(frames[0] < joint < frames[1] for joint in scan.joints):
            reason = "mixed: the size of its frames changes"
        elif intact_runs(frames, scan.intact) != [frames]:
            reason = "damaged: some of its frames do not decode"
        else:
            captions.setdefault(frames, span.caption)
            continue
        name = f"{span.start_s:.6f} {span.end_s:.6f}"
        clip = replace(job.video, clip_id=_identity(job.video, name), path="", spans=())
        refused.append(replace(clip, start_s=span.start_s, end_s=span.end_s, kept=False, reason=reason))
    written = _cut(job, scan, list(captions))
    rows = []
    for frames, caption in captions.items():
        clip = _clip(job.video, scan, frames, written[frames])
        rows.append(replace(clip, caption=caption, caption_model=GIVEN if caption else ""))
    return rows + refused


def _cut(job: Job, scan: Scan, spans: list[tuple[int, int]]) -> dict[tuple[int, int], Written]:
    cuts = {span: Cut(*span, job.folder / f"{_identity(job.video, f'{span[0]} {span[1]}')}.mp4") for span in spans}
    written = cut_clips(job.path, scan.timeline, list(cuts.values()), job.config, scan.aspect)
    return {span: written[cut] for span, cut in cuts.items()}


def _identity(video: Clip, span: str) -> str:
    return sha256(f"{video.source_sha256} {span}".encode()).hexdigest()[:16]


def _clip(video: Clip, scan: Scan, span: tuple[int, int], written: Written | None) -> Clip:
    clip = replace(
        video,
        clip_id=_identity(video, f"{span[0]} {span[1]}"),
        path="",
        spans=(),
        start_s=scan.timeline.at(span[0]),
        end_s=scan.timeline.at(span[1]),
        start_frame=span[0],
        end_frame=span[1],
        frames=0,
    )
    if written is None:
        return replace(clip, clip_id=_identity(video, f"{span[0]} {span[1]} lost"))
    return replace(clip, frames=written.frames, fps=float(written.fps), width=written.width, height=written.height)


def _with_caption(clip: Clip, captions: tuple[Span, ...]) -> Clip:
    """The clip with the given caption whose span covers most of it, if any covers enough."""
    best, most = "", MIN_OVERLAP * (clip.end_s - clip.start_s)
    for item in captions:
        overlap = min(clip.end_s, item.end_s) - max(clip.start_s, item.start_s)
        if overlap >= most:
            best, most = item.caption, overlap
    return replace(clip, caption=best, caption_model=GIVEN) if best else clip
