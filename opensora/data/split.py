"""The step `split`: find the shots of every video and write them as normalised clips into tar shards."""

import json
import math
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from fractions import Fraction
from hashlib import sha256
from pathlib import Path

from opensora.config import ExecutorConfig, SplitConfig
from opensora.data.executor import run_shards
from opensora.data.shards import ShardWriter
from opensora.data.video import ClipWriter, VideoError, decode, probe
from opensora.data.workers import advance, call_isolated
from opensora.manifest import (
    GIVEN,
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
from opensora.step import Report, StepError, StepFolder, fingerprint, read_report, write_json

ROWS = "rows.json"
MIN_OVERLAP = 0.5  # share of a clip that a given caption's span must cover
THRESHOLD = 27.0  # of ContentDetector
DEFAULT_FPS = 25.0  # where a container does not say


@dataclass(frozen=True)
class Task:
    """One shard of videos."""

    config: SplitConfig
    inputs: Path  # part of the download step's manifest
    base: Path  # folder of all steps
    part: Path


@dataclass(frozen=True)
class Job:
    """One video to split, and the folder for its clips."""

    video: Clip
    path: Path
    folder: Path
    config: SplitConfig


def run(config: SplitConfig, inputs: Path, output: Path, executor: ExecutorConfig) -> Report:
    """Split the kept videos of the download step in `inputs`; see the step contract in the module `step`.

    Raises:
        StepError: nothing is left, or more than `max_bad_share` of the videos is bad.
    """
    settings = config.model_dump(exclude={"workers", "video_timeout_s", "max_bad_share"})
    folder = StepFolder(output, fingerprint(settings, manifest_hash(inputs)))
    if folder.is_done():
        return read_report(output)
    work = folder.open()
    tasks = [Task(config, part, output.parent, work / part.name) for part in list_parts(inputs)]
    run_shards(split_shard, tasks, executor, config.workers, "splitting videos", count_rows(inputs))
    tally = Tally()
    videos: dict[str, bool] = {}
    for path in list_parts(work):
        clips = read_part(path)
        tally.add(clips)
        for clip in clips:
            videos[clip.source] = videos.get(clip.source, False) or clip.kept
    _check(tally, videos, config.max_bad_share)
    shutil.rmtree(work / "videos", ignore_errors=True)
    return folder.finish(Report("split", total=tally.total, kept=tally.kept, dropped=dict(tally.dropped)))


def split_shard(task: Task) -> None:
    """Split the videos of one part into the tar files and the part of the same number."""
    scratch = task.part.parent / "videos"
    rows = []
    jobs = []
    for video in read_part(task.inputs):
        if not video.kept:
            rows.append(video)
            advance()
            continue
        job = Job(video, task.base / video.path, scratch / video.clip_id, task.config)
        jobs.append(job)
        if not (job.folder / ROWS).is_file():
            outcome = call_isolated(split_video, job, task.config.video_timeout_s)
            if outcome.failure:
                shutil.rmtree(job.folder, ignore_errors=True)
                job.folder.mkdir(parents=True)
                write_json(job.folder / ROWS, [asdict(replace(video, kept=False, reason=outcome.failure))])
        advance()
    index = part_index(task.part)
    for old in task.part.parent.glob(f"clips-{index:05d}-*"):
        old.unlink()
    writer = ShardWriter(task.part.parent, index, task.config.shard_mib)
    for job in jobs:
        for row in json.loads((job.folder / ROWS).read_text()):
            clip = Clip(**row | {"spans": tuple(Span(**span) for span in row["spans"])})
            if clip.kept:
                data = (job.folder / f"{clip.clip_id}.mp4").read_bytes()
                about = {"source": clip.source, "start_s": clip.start_s, "end_s": clip.end_s}
                shard, offset, size = writer.add(clip.clip_id, data, about)
                clip = replace(clip, shard=shard, offset=offset, size=size)
            rows.append(clip)
    writer.close()
    write_part(task.part, rows)
    for job in jobs:
        shutil.rmtree(job.folder, ignore_errors=True)


def _check(tally: Tally, videos: dict[str, bool], max_bad_share: float) -> None:
    bad = sum(not good for good in videos.values())
    if not tally.kept:
        raise StepError(f"no clip is left after splitting {len(videos)} videos ({tally.reasons}); look at the videos")
    if bad > max_bad_share * len(videos):
        raise StepError(f"{bad} of {len(videos)} videos are bad ({tally.reasons}); raise split.max_bad_share to go on")


def split_video(task: Job) -> int:
    """Cut one video into clips below `task.folder`; rows.json, written last, says that it is done.

    Raises:
        VideoError: the video cannot be decoded to its end.
    """
    shutil.rmtree(task.folder, ignore_errors=True)
    task.folder.mkdir(parents=True)
    about = probe(task.path)
    spans = find_shots(task.path, task.config, about.fps or DEFAULT_FPS)
    captions = task.video.spans
    rows = []
    for clip, data in cut(task.path, task.video, spans, task.config, about.fps or DEFAULT_FPS):
        (task.folder / f"{clip.clip_id}.mp4").write_bytes(data)
        rows.append(asdict(_with_caption(clip, captions)))
    if not rows:
        raise VideoError("empty: no frame lies in any shot")
    write_json(task.folder / ROWS, rows)
    return len(rows)


def find_shots(path: Path, config: SplitConfig, fps: float) -> list[tuple[float, float]]:
    """Spans in seconds, [start, end), of shots; long ones are cut into equal parts.

    PySceneDetect's ContentDetector: the change of hue, saturation and brightness between frames.
    """
    from scenedetect import ContentDetector, SceneManager, open_video

    try:
        video = open_video(str(path), backend="pyav", suppress_output=True, threading_mode="SLICE")
        manager = SceneManager()
        manager.add_detector(
            ContentDetector(
                threshold=config.threshold or THRESHOLD, min_scene_len=max(1, round(config.min_shot_s * fps))
            )
        )
        manager.detect_scenes(video)
        shots = [(start.seconds, end.seconds) for start, end in manager.get_scene_list(start_in_scene=True)]
    except Exception as error:  # the library wraps decoders whose errors have no common base
        raise VideoError(f"unreadable: shot detection failed: {error}") from None
    spans = []
    for start, end in shots or [(0.0, math.inf)]:
        parts = 1 if math.isinf(end) else max(1, math.ceil((end - start) / config.max_clip_s - 1e-6))
        edges = [start + (end - start) * part / parts if part else start for part in range(parts)] + [end]
        spans += list(zip(edges[:-1], edges[1:], strict=True))
    # The last shot ends with the video: the container's duration may stop short of its last frame.
    return [*spans[:-1], (spans[-1][0], math.inf)]


def clip_size(width: int, height: int, max_short_side: int) -> tuple[int, int]:
    """Even width and height, scaled down to the limit of the shorter side, never up."""
    scale = min(1.0, max_short_side / min(width, height))
    even = [max(2, 2 * round(side * scale / 2)) for side in (width, height)]
    return min(even[0], width - width % 2), min(even[1], height - height % 2)


def cut(
    path: Path, video: Clip, spans: list[tuple[float, float]], config: SplitConfig, source_fps: float
) -> Iterator[tuple[Clip, bytes]]:
    """Yield (clip, mp4) for every span, decoding the video once; frames follow time at a constant rate."""
    fps = Fraction(config.fps or source_fps).limit_denominator(1001)
    near = 0.25 / float(fps)  # times closer than this are the same frame
    pending = list(spans)
    writer: ClipWriter | None = None
    last = None
    when = 0.0
    for when, pixels in decode(path):
        if writer is not None and last is not None:
            until = min(when, pending[0][1])
            while pending[0][0] + writer.frames / fps + near < until:
                writer.add(last)
            if when + near >= pending[0][1]:
                yield _clip(video, pending.pop(0), writer, fps)
                writer = None
        if writer is None and pending and when + near >= pending[0][0]:
            height, width = pixels.shape[:2]
            writer = ClipWriter(*clip_size(width, height, config.max_short_side), fps, config.crf, config.gop)
        last = pixels
    if writer is not None and last is not None:
        end = when + 1 / source_fps
        while pending[0][0] + writer.frames / fps + near < end:
            writer.add(last)
        yield _clip(video, (pending[0][0], end), writer, fps)


def _clip(video: Clip, span: tuple[float, float], writer: ClipWriter, fps: Fraction) -> tuple[Clip, bytes]:
    data = writer.finish()
    identity = sha256(f"{video.source_sha256} {span[0]:.6f} {span[1]:.6f}".encode()).hexdigest()[:16]
    clip = replace(
        video,
        clip_id=identity,
        path="",
        spans=(),
        start_s=span[0],
        end_s=span[1],
        frames=writer.frames,
        fps=float(fps),
        width=writer.stream.width,
        height=writer.stream.height,
    )
    return clip, data


def _with_caption(clip: Clip, captions: tuple[Span, ...]) -> Clip:
    """The clip with the given caption whose span covers most of it, if any covers enough."""
    best, most = "", MIN_OVERLAP * (clip.end_s - clip.start_s)
    for item in captions:
        overlap = min(clip.end_s, item.end_s) - max(clip.start_s, item.start_s)
        if overlap >= most:
            best, most = item.caption, overlap
    return replace(clip, caption=best, caption_model=GIVEN) if best else clip
