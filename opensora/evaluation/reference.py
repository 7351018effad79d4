"""Features of real clips, which generated ones are compared with; kept by a hash of the clips and the extractors.

Shapes: `T` frames, `H`, `W` frame size, `D` features, `N` clips.
"""

import json
import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from opensora.config import TrainConfig
from opensora.data.clip_reader import ClipError, read_crop
from opensora.data.clip_table import ClipTable
from opensora.data.shards import read_bytes
from opensora.demo.shapes import all_scenes, parse_caption, render_clip
from opensora.evaluation.hashes import hash_code
from opensora.evaluation.kept import touch
from opensora.evaluation.sampling import Weights, load_suite
from opensora.step import fingerprint, write_json

REFERENCE = "reference"  # in the cache
SEED = 7
BATCH = 32  # clips a task
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Shape:
    """The frames that a stage generates."""

    frames: int
    height: int  # pixels
    width: int
    interval: int  # source frames from one to the next

    @classmethod
    def of(cls, train: TrainConfig) -> "Shape":
        """What the stage was trained at."""
        return cls(train.frames, train.height, train.width, train.frame_interval)

    def __str__(self) -> str:
        """As in `16x512x512, interval 3`."""
        return f"{self.frames}x{self.height}x{self.width}, interval {self.interval}"


@dataclass(frozen=True)
class RealClip:
    """A crop of one clip of the split step."""

    clip_id: str  # a hash of its source and span
    shard: str
    offset: int
    size: int  # bytes
    start: int  # frame

    def read(self, shards: Path | None, shape: Shape) -> np.ndarray:
        """uint8 [T, H, W, 3]; raises ClipError, and StepError if the shard is not there."""
        assert shards is not None
        data = read_bytes(shards / self.shard, self.offset, self.size, self.clip_id)
        last = self.start + (shape.frames - 1) * shape.interval
        return read_crop(data, range(self.start, last + 1, shape.interval), (shape.height, shape.width))


@dataclass(frozen=True)
class RenderedClip:
    """A clip of the embedded world."""

    scene: int  # in `all_scenes`

    def read(self, shards: Path | None, shape: Shape) -> np.ndarray:
        """uint8 [T, H, H, 3]."""
        rng = np.random.default_rng([SEED, self.scene])
        return render_clip(all_scenes()[self.scene], shape.frames, shape.height, rng)


@dataclass(frozen=True)
class Reference:
    """Which real clips one shape is compared with.

    Attributes:
        key: hash of the clips, the shape and the extractors; empty where there are too few clips.
        reason: why there is none.
        code: see `hash_code`; other measures have other features of the same clips.
    """

    shape: Shape
    clips: tuple[RealClip, ...] | tuple[RenderedClip, ...]
    shards: Path | None
    key: str = ""
    reason: str = ""
    code: str = field(default_factory=hash_code)  # once for all processes that share the work

    def file(self, cache: Path) -> Path:
        """Where the features are kept: an array [N, D] by extractor."""
        return cache / REFERENCE / f"{self.name}.npz"

    @property
    def name(self) -> str:
        """Of its files."""
        return f"{self.key[:32]}-{self.code[:16]}"


def rendered_reference(prompts: Sequence[str], shape: Shape, extractors: object) -> Reference:
    """A rendered clip for each prompt, if all describe scenes of the embedded world; otherwise one of every scene."""
    scenes = [parse_caption(prompt) for prompt in prompts]
    known = [scene for scene in scenes if scene is not None]
    chosen = known if len(known) == len(scenes) and len(known) > 1 else all_scenes()
    clips = tuple(RenderedClip(all_scenes().index(scene)) for scene in chosen)
    return Reference(shape, clips, None, fingerprint(asdict(shape), [asdict(clip) for clip in clips], extractors))


def real_reference(manifest: Path, shards: Path, count: int, shape: Shape, extractors: object) -> Reference:
    """Crops of up to `count` kept clips that are long enough, drawn by a fixed seed.

    Args:
        manifest: folder of the caption step.
        shards: folder of the split step.
        extractors: what tells one set of weights from another.
    """
    if not any(manifest.glob("manifest-*.parquet")):
        return Reference(shape, (), shards, reason=f"{manifest} holds no clips")
    table = ClipTable(manifest, ("shard", "offset", "size"))
    needed = (shape.frames - 1) * shape.interval + 1
    fitting = np.flatnonzero(table.frames >= needed)
    if min(len(fitting), count) < 2:
        reason = f"{len(fitting)} of {len(table)} clips have the {needed} frames that a reference clip takes"
        return Reference(shape, (), shards, reason=reason if count else "evaluate.reference_clips is 0")
    rng = np.random.default_rng(SEED)
    rows = np.sort(rng.choice(fitting, min(count, len(fitting)), replace=False))
    starts = rng.integers(0, table.frames[rows] - needed + 1)
    clips = tuple(
        RealClip(
            table.text("clip_id", row),
            table.text("shard", row),
            table.number("offset", row),
            table.number("size", row),
            int(start),
        )
        for row, start in zip(rows.tolist(), starts, strict=True)
    )
    # Shards are cut anew without a change of what is in them: where a clip lies says nothing of it.
    about = [(clip.clip_id, clip.size, clip.start) for clip in clips]
    return Reference(shape, clips, shards, fingerprint(asdict(shape), about, extractors))


@dataclass(frozen=True)
class ReferenceTask:
    """Features of some clips of a reference."""

    reference: Reference
    first: int
    folder: Path
    weights: Weights
    name: str = "reference clips"

    @property
    def result(self) -> Path:
        """Written last: the task is done when it is there."""
        return self.folder / "parts" / f"reference-{self.reference.name}-{self.first:05d}.json"

    def do(self) -> None:
        """Leave the features by extractor, a row for every clip that can be read."""
        suite = load_suite(self.weights)
        rows = []
        for clip in self.reference.clips[self.first : self.first + BATCH]:
            try:
                rows.append(suite.reference(clip.read(self.reference.shards, self.reference.shape)))
            except ClipError as error:
                log.warning("reference: clip %s is left out: %s", clip, error)
        write_json(self.result, rows)


def reference_tasks(
    references: Sequence[Reference], cache: Path, folder: Path, weights: Weights
) -> list[ReferenceTask]:
    """What is left to do of the references whose features are not kept."""
    wanted = {reference.key: reference for reference in references if reference.key}
    return [
        ReferenceTask(reference, first, folder, weights)
        for reference in wanted.values()
        if load_features(reference, cache) is None
        for first in range(0, len(reference.clips), BATCH)
    ]


def keep_features(tasks: Sequence[ReferenceTask], cache: Path) -> None:
    """Put the results of finished tasks together; a reader sees a whole file or none."""
    rows: dict[str, list[dict[str, list[float]]]] = {}
    for task in tasks:
        rows.setdefault(task.reference.key, []).extend(json.loads(task.result.read_text()))
    for reference in {task.reference.key: task.reference for task in tasks}.values():
        found = rows[reference.key]
        path = reference.file(cache)
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_name(path.name + ".part")
        arrays: Any = {name: np.array([row[name] for row in found]) for name in (found or [{}])[0]}
        try:
            with part.open("wb") as handle:
                np.savez(handle, **arrays)
            part.replace(path)
        finally:
            part.unlink(missing_ok=True)


def load_features(reference: Reference, cache: Path) -> dict[str, np.ndarray] | None:
    """Features [N, D] by extractor; None if they are not kept, or damaged."""
    if not reference.key:
        return None
    try:
        with np.load(reference.file(cache)) as kept:
            found = {name: kept[name] for name in kept.files}
        touch(reference.file(cache))
        return found
    except (OSError, ValueError, EOFError, KeyError):
        return None
    except Exception as error:  # zipfile raises its own for a damaged file
        log.warning("reference: %s is damaged (%s) and made again", reference.file(cache), error)
        return None
