"""The step `score`: scores as columns first, thresholds on them second, the reason of every drop recorded.

What is measured lies in `.cache/score` beside the step's folder, a file for each part of the split step's manifest and
for what decides the measures. Judging reads these files alone, so that another threshold decodes nothing, and one part
of the manifest that changes is the only one to be measured again.
"""

import time
from dataclasses import dataclass, replace
from pathlib import Path

import cv2
import numpy as np
import pyarrow.compute as pc
import pyarrow.parquet as pq

from opensora.config import ExecutorConfig, ScoreConfig
from opensora.data.clip_scores import ClipScorer, load_scorer
from opensora.data.executor import STATUS, run_shards
from opensora.data.judge import judge
from opensora.data.measure import MEASURES, measure_clip
from opensora.data.reuse import hash_folder
from opensora.data.shards import read_clip
from opensora.data.video import VideoError
from opensora.data.workers import advance
from opensora.manifest import (
    VERSION,
    Clip,
    count_rows,
    list_parts,
    manifest_hash,
    read_part,
    write_part,
)
from opensora.step import CACHE, Report, StepError, StepFolder, fingerprint, read_report
from opensora.weights import WeightsError, hash_file

UNREADABLE = "unreadable"
CLIP_BATCH = 16  # clips that CLIP sees at once


@dataclass(frozen=True)
class Task:
    """One shard of clips to measure."""

    inputs: Path  # part of the split step's manifest; its folder holds the tar files
    part: Path  # the same rows with scores
    clip: Path | None = None  # folder of CLIP
    head: Path | None = None  # file of its aesthetic head


def run(
    config: ScoreConfig,
    inputs: Path,
    output: Path,
    executor: ExecutorConfig,
    *,
    clip: Path | None = None,
    head: Path | None = None,
) -> Report:
    """Score the kept clips of the split step in `inputs`, then apply the thresholds.

    Args:
        clip: folder of CLIP, for the scores `text_match` (clips with a given caption) and, with a head, `aesthetic`.
        head: file of an aesthetic head, see `ClipScorer`.

    Raises:
        StepError: no clip passes, or a threshold has no model.
        WeightsError: CLIP or the head cannot be loaded.
    """
    _check_models(config, clip, head)
    cache = output.parent / CACHE / output.name
    models = _identify(clip, head, cache)
    settings = config.model_dump(exclude={"workers", "clip", "aesthetic_head"})
    folder = StepFolder(output, fingerprint(settings, MEASURES, models, manifest_hash(inputs)))
    if folder.is_done():
        return read_report(output)
    work = folder.open()
    cache.mkdir(parents=True, exist_ok=True)
    tasks = [Task(part, cache / _cache_name(part, models), clip, head) for part in list_parts(inputs)]
    fresh = {task.part for task in tasks if not task.part.is_file()}
    start = time.monotonic()
    run_shards(score_shard, tasks, executor, config.workers, "scoring clips", count_rows(inputs))
    seconds = time.monotonic() - start
    parts = [work / task.inputs.name for task in tasks]
    verdict = judge(config, [task.part for task in tasks], parts)
    tally = verdict.tally
    if not tally.kept:
        raise StepError(f"no clip passes the thresholds ({tally.reasons}); lower them in params.yaml under `score`")
    measured = sum(count for count, task in zip(verdict.scored, tasks, strict=True) if task.part in fresh)
    metrics = {"video_s": verdict.video_s, "measured": float(measured), "clips_per_s": measured / max(seconds, 1e-3)}
    if (cache / STATUS).is_file():
        (cache / STATUS).replace(work / STATUS)
    report = folder.finish(Report("score", tally.total, tally.kept, dict(tally.dropped), metrics))
    _clean_cache(cache, {task.part for task in tasks if not _is_damaged(task.part)})
    return report


def _check_models(config: ScoreConfig, clip: Path | None, head: Path | None) -> None:
    if clip is None and (head or config.min_text_match is not None):
        raise StepError("score.min_text_match and score.aesthetic_head need CLIP; name its folder in score.clip")
    if head is None and config.min_aesthetic is not None:
        raise StepError("score.min_aesthetic needs a head over CLIP; name its file in score.aesthetic_head")


def _identify(clip: Path | None, head: Path | None, memory: Path) -> str:
    """What decides CLIP's scores: the contents of its files and of its head."""
    if clip is None:
        return ""
    if not clip.is_dir():
        raise WeightsError(f"{clip} is no folder; score.clip wants CLIP as Transformers saves it")
    return fingerprint(hash_folder(clip, memory), hash_file(head) if head else "")


def _cache_name(part: Path, models: str) -> str:
    key = fingerprint(MEASURES, VERSION, models, hash_file(part))
    return f"{part.stem}-{key[:16]}.parquet"


def _is_damaged(part: Path) -> bool:
    """Whether a clip of a measured part could not be read; its shard may be mended by the next run."""
    table = pq.read_table(part, columns=["shard", "reason"])
    return bool(pc.any(pc.and_(pc.starts_with(table["reason"], UNREADABLE), pc.not_equal(table["shard"], ""))).as_py())


def _clean_cache(cache: Path, used: set[Path]) -> None:
    """Remove what this run did not use; nobody else does, as this run holds the lock of the step's folder."""
    for path in cache.glob("manifest-*"):
        if path not in used:
            path.unlink()


def score_shard(task: Task) -> None:
    """Measure the kept clips of one part.

    Clips are our own, so that they are decoded in this process; bytes that are not one make a dropped row.

    Raises:
        StepError: a shard is missing.
    """
    cv2.setNumThreads(1)
    scorer = load_scorer(task.clip, task.head) if task.clip else None
    rows = read_part(task.inputs)
    shown: dict[int, np.ndarray] = {}  # frames for CLIP, by row
    for index, clip in enumerate(rows):
        if clip.kept:
            try:
                measured = measure_clip(_read(task.inputs.parent, clip), clip, pictures=scorer is not None)
            except VideoError as error:
                rows[index] = replace(clip, kept=False, reason=str(error))
            else:
                rows[index] = replace(clip, scores=measured.scores, perceptual_hash=measured.perceptual_hash)
                if measured.pictures is not None:
                    shown[index] = measured.pictures
        if scorer and (len(shown) == CLIP_BATCH or index == len(rows) - 1):
            _add_clip_scores(rows, shown, scorer)
            shown.clear()
        advance()
    write_part(task.part, rows)


def _read(folder: Path, clip: Clip) -> bytes:
    try:
        return read_clip(folder, clip)
    except StepError:
        if not (folder / clip.shard).is_file():
            raise
        raise VideoError(f"{UNREADABLE}: its shard {clip.shard} ends before it does") from None


def _add_clip_scores(rows: list[Clip], shown: dict[int, np.ndarray], scorer: ClipScorer) -> None:
    found = scorer(list(shown.values()), [rows[index].caption for index in shown])
    for index, scores in zip(shown, found, strict=True):
        rows[index] = replace(rows[index], scores=rows[index].scores | scores)
