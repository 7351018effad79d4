"""The step `caption`: a model describes every clip that came without a caption; captions are keyed by clip.

The model is LLaVA in this process (`llava.py`) or a server (`endpoint.py`). Whatever it says is written down at once
beside the step's folder (`answers.py`), so that a stopped run, other thresholds or more videos ask nothing twice.
"""

import json
import shutil
import threading
import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from opensora.config import CaptionConfig, ExecutorConfig
from opensora.data.answers import Answer, AnswerLog, Backend, clean_text, find_fault
from opensora.data.endpoint import ServerError
from opensora.data.executor import run_shards
from opensora.data.reuse import hash_folder
from opensora.data.shards import read_clip
from opensora.data.video import VideoError, pick_frames
from opensora.data.workers import advance
from opensora.manifest import (
    Clip,
    Tally,
    count_rows,
    list_parts,
    manifest_hash,
    part_index,
    read_part,
    write_part,
)
from opensora.step import CACHE, Report, StepError, StepFolder, fingerprint, read_report, write_json

if TYPE_CHECKING:
    import numpy as np

    from opensora.data.answers import Question

STOPPED = "stopped.txt"  # in the work folder: why no shard needs to try
MATCHED_AT_ONCE = 16  # clips that CLIP sees together
FOR_THE_FOLDER = {"max_new_tokens", "caption_retries", "retry_temperature", "max_bad_share"}  # beside what asks


@dataclass(frozen=True)
class Task:
    """One shard of clips to caption."""

    config: CaptionConfig
    inputs: Path  # part of the score step's manifest
    shards: Path  # folder of the split step
    model: Path | None  # folder, for the backend llava
    answers: Path  # folder of the AnswerLog; its name tells what was asked of which model
    part: Path
    clip: Path | None = None  # folder of CLIP, which scores how well the captions fit
    min_text_match: float | None = None

    @property
    def numbers(self) -> Path:
        """What this shard cost, for the report."""
        return self.part.with_name(f"asked-{part_index(self.part):05d}.json")


def run(
    config: CaptionConfig,
    inputs: Path,
    shards: Path,
    model: Path | None,
    output: Path,
    executor: ExecutorConfig,
    *,
    clip: Path | None = None,
    min_text_match: float | None = None,
) -> Report:
    """Caption the kept clips of the score step in `inputs`.

    Args:
        shards: folder of the split step.
        model: folder of a LLaVA or LLaVA-NeXT model that Transformers loads; None for the backend `endpoint`.
        clip: folder of CLIP; generated captions get the score `text_match`, as given ones did in the score step.
        min_text_match: clips whose generated caption scores less are dropped.

    Raises:
        StepError: too many clips are without a caption in the end, none is left, a shard is missing, or the server
            answers none.
        WeightsError: CLIP cannot be loaded.
    """
    kept = output.parent / CACHE / "captions"
    asking = _asking(config, model, kept)
    rest = config.model_dump(include=FOR_THE_FOLDER)
    match = [min_text_match, hash_folder(clip, kept)] if clip else []
    folder = StepFolder(output, fingerprint(asking, rest, match, manifest_hash(inputs)))
    if folder.is_done():
        return read_report(output)
    work = folder.open()
    (work / STOPPED).unlink(missing_ok=True)
    answers = kept / fingerprint(asking)[:16]
    answers.mkdir(parents=True, exist_ok=True)
    write_json(answers / "about.json", asking)
    about = (shards, model, answers)
    tasks = [Task(config, part, *about, work / part.name, clip, min_text_match) for part in list_parts(inputs)]
    try:
        run_shards(caption_shard, tasks, executor, config.workers, "captioning", count_rows(inputs))
    finally:
        _backends.clear()  # frees the memory of a model in this process
    report = _report(tasks)
    for task in tasks:
        task.numbers.unlink(missing_ok=True)
    return folder.finish(report)


def _asking(config: CaptionConfig, model: Path | None, kept: Path) -> dict[str, Any]:
    """What decides the answers: with the same values earlier ones hold. Where a server is does not matter."""
    about = {"backend": config.backend, "prompt": config.prompt, "frame_positions": list(config.frame_positions)}
    if config.backend == "endpoint":
        return about | {"model": config.model, "max_side": config.max_side}
    assert model is not None
    return about | {"files": hash_folder(model, kept), "dtype": config.dtype}


def _report(tasks: list[Task]) -> Report:
    """Count what the shards wrote.

    Raises:
        StepError: too many clips are without a caption; their shards go, so that the next run tries them again.
    """
    name = _name(tasks[0])
    tally, captioned, generated, failed = Tally(), 0, 0, Tally()
    for task in tasks:
        clips = read_part(task.part)
        tally.add(clips)
        ours = [clip for clip in clips if clip.caption_model == name]
        failed.add(clip for clip in ours if not clip.caption)
        captioned += sum(bool(clip.caption) for clip in ours)
        generated += sum(clip.kept for clip in ours)
    share = failed.total / max(1, failed.total + captioned)
    config = tasks[0].config
    if not failed.total and not captioned and not tally.kept:
        raise StepError(f"there is no clip to caption, all were dropped before: {tally.reasons}")
    if share > config.max_bad_share or not (captioned or tally.kept):
        shutil.rmtree(tasks[0].part.parent)
        raise StepError(
            f"{failed.total} of {failed.total + captioned} clips got no caption, more than caption.max_bad_share="
            f"{config.max_bad_share:g} ({failed.reasons}); look at the model, caption.prompt and "
            "caption.max_new_tokens; what was answered is kept"
        )
    if not tally.kept:
        raise StepError(f"no clip fits its caption ({tally.reasons}); lower score.min_text_match")
    metrics = {"given": float(tally.kept - generated), "generated": float(generated)}
    metrics |= _speed([json.loads(task.numbers.read_text()) for task in tasks], config)
    return Report("caption", total=tally.total, kept=tally.kept, dropped=dict(tally.dropped), metrics=metrics)


def _speed(numbers: list[dict[str, float]], config: CaptionConfig) -> dict[str, float]:
    """Clips asked about in this run and the time that took, models loaded, summed over the workers."""
    asked, seconds = sum(row["asked"] for row in numbers), sum(row["seconds"] for row in numbers)
    values = {"asked": asked, "retried": sum(row["retried"] for row in numbers)}
    if asked and seconds:
        workers = min(config.workers, len(numbers))
        values["clips_per_second"] = workers * asked / seconds
        if config.backend == "llava":  # a worker is a GPU; how many a server has it does not say
            values["seconds_per_clip_per_gpu"] = seconds / asked
    return values


def _name(task: Task) -> str:
    """caption_model of a caption."""
    return f"{task.config.backend}/{task.model.name if task.model else task.config.model}"


def caption_shard(task: Task) -> None:
    """Caption the clips of one part that have no caption yet."""
    stopped = task.part.with_name(STOPPED)
    if stopped.is_file():
        raise StepError(stopped.read_text())
    clips = read_part(task.inputs)
    work = _Work(task, {clip.clip_id: clip for clip in clips if clip.kept and not clip.caption})
    for _ in range(len(clips) - len(work.open(None))):
        advance()
    try:
        work.finish()
    except ServerError as error:
        stopped.write_text(str(error))  # the other shards need not find out for themselves
        raise
    rows = [work.row(clip) for clip in clips]
    if task.clip:
        _match(rows, [index for index, row in enumerate(rows) if row.clip_id in work.clips and row.kept], task)
    write_json(task.numbers, work.numbers)
    write_part(task.part, rows)


def _match(rows: list[Clip], told: list[int], task: Task) -> None:
    """Score how well the captions of the rows `told` fit, and drop those that fit too badly."""
    from opensora.data.clip_scores import load_scorer
    from opensora.data.measure import POSITIONS

    assert task.clip
    scorer = load_scorer(task.clip, None, task.config.threads)
    for first in range(0, len(told), MATCHED_AT_ONCE):
        shown: dict[int, np.ndarray] = {}
        for index in told[first : first + MATCHED_AT_ONCE]:
            try:
                shown[index] = pick_frames(read_clip(task.shards, rows[index]), POSITIONS)
            except VideoError as error:
                rows[index] = replace(rows[index], kept=False, reason=str(error))
        values = scorer.text_match(list(shown.values()), [rows[index].caption for index in shown])
        for index, value in zip(shown, values, strict=True):
            row = rows[index] = replace(rows[index], scores=rows[index].scores | {"text_match": value})
            if task.min_text_match is not None and not value >= task.min_text_match:
                reason = f"mismatched: text_match {value:.4g} < {task.min_text_match:g}"
                rows[index] = replace(row, kept=False, reason=reason)


@dataclass
class _Work:
    """The clips of a part that need a caption, and the answers so far."""

    task: Task
    clips: dict[str, Clip]
    answers: dict[str, list[Answer]] = field(init=False)
    numbers: dict[str, float] = field(init=False)

    def __post_init__(self) -> None:
        self._log = AnswerLog(self.task.answers, self.task.config.max_new_tokens)
        self._lock = threading.Lock()
        self._asked: dict[str, int] = {}
        self.answers = self._log.read(self.clips.values())
        self.numbers = {"asked": 0, "retried": 0, "seconds": 0.0}

    def open(self, attempt: int | None) -> list[Clip]:
        """Clips to ask about at an attempt, 0 the first; None: at any."""
        limit = self.task.config.caption_retries if attempt is None else attempt
        return [self.clips[clip_id] for clip_id, answers in self.answers.items() if _is_open(answers, limit)]

    def finish(self) -> None:
        """Ask until every clip has a caption or no try is left."""
        if not self.open(None):
            return
        backend = _backend(self.task)
        start = time.monotonic()
        for attempt in range(1 + self.task.config.caption_retries):
            if clips := self.open(attempt):
                backend.ask(self._questions(clips, backend.ahead), attempt, self._record)
        self.numbers = {
            "asked": len(self._asked),
            "retried": sum(count > 1 for count in self._asked.values()),
            "seconds": time.monotonic() - start,
        }

    def _record(self, clip_id: str, answer: Answer) -> None:
        with self._lock:
            self._log.append(self.clips[clip_id], answer)
            self.answers[clip_id].append(answer)
            self._asked[clip_id] = self._asked.get(clip_id, 0) + 1
            if not _is_open(self.answers[clip_id], self.task.config.caption_retries):
                advance()

    def _questions(self, clips: list[Clip], ahead: int) -> "Iterator[Question]":
        """Frames of the clips in order, read by threads, at most `ahead` clips before they are wanted."""
        waiting: deque[tuple[str, Future[np.ndarray]]] = deque()
        with ThreadPoolExecutor(self.task.config.threads) as pool:
            try:
                for clip in [*clips, *[None] * ahead]:
                    if clip is not None:
                        waiting.append((clip.clip_id, pool.submit(self._read, clip)))
                    if waiting and (clip is None or len(waiting) > ahead):
                        clip_id, frames = waiting.popleft()
                        try:
                            yield clip_id, frames.result()
                        except VideoError as error:
                            self._record(clip_id, Answer(str(error), "failed"))
            finally:
                pool.shutdown(cancel_futures=True)

    def _read(self, clip: Clip) -> "np.ndarray":
        return pick_frames(read_clip(self.task.shards, clip), self.task.config.frame_positions)

    def row(self, clip: Clip) -> Clip:
        """The clip with its caption, or dropped with the last answer's fault."""
        if clip.clip_id not in self.clips or not clip.kept or clip.caption:
            return clip
        clip = replace(clip, caption_model=_name(self.task), caption_prompt=self.task.config.prompt)
        answers = self.answers[clip.clip_id]
        good = next((answer for answer in answers if not find_fault(answer)), None)
        if good is None:
            return replace(clip, kept=False, reason=find_fault(answers[-1]))
        return replace(clip, caption=clean_text(good.text))


def _is_open(answers: list[Answer], attempt: int) -> bool:
    """Whether a clip with these answers is to be asked about at an attempt."""
    settled = any(answer.finish == "failed" or not find_fault(answer) for answer in answers)
    return not settled and len(answers) <= attempt


_backends: dict[tuple[str, CaptionConfig], Backend] = {}  # a worker process keeps one: loading takes a minute


def _backend(task: Task) -> Backend:
    key = (task.answers.name, task.config)
    if key not in _backends:
        _backends.clear()
        _backends[key] = _make_backend(task)
    return _backends[key]


def _make_backend(task: Task) -> Backend:
    match task.config.backend:
        case "llava":
            from opensora.data.llava import Llava

            assert task.model is not None
            return Llava(task.model, task.config)
        case "endpoint":
            from opensora.data.endpoint import Endpoint

            return Endpoint(task.config)
