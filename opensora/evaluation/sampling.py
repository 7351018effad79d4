"""Clips of fixed prompts and seeds by one checkpoint, each measured where it was made, and kept.

`.cache/evaluate/<checkpoint>-<settings, code>/` holds a clip and its row a prompt and seed, named by a hash of both. So
they outlive the step's folder: a candidate is not sampled again because the champion is another one, because prompts
were added, or when it has become the champion itself. The step's folder links to the clips, and what writes into one
there writes here: the row says which sha256 the clip had.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from opensora.clip_file import write_clip
from opensora.config import EvaluateConfig
from opensora.demo.shapes import detect, parse_caption
from opensora.evaluation.share import keep_loaded
from opensora.metrics.suite import Suite
from opensora.step import fingerprint, write_json
from opensora.weights import hash_file

Weights = Mapping[str, Path | None]  # of extractors, by their name in the configuration
Row = dict[str, Any]  # what became of one prompt; see `describe_sample`
Pair = tuple[str, int]  # a prompt and its seed


@dataclass(frozen=True)
class SampleTask:
    """Some prompts for one checkpoint."""

    name: str  # the stage
    checkpoint: Path
    pairs: tuple[Pair, ...]
    folder: Path  # where clips and rows are kept
    texts: Path  # embeddings of the prompts
    config: EvaluateConfig
    weights: Weights

    @property
    def result(self) -> Path:
        """Written last: the task is done when it is there."""
        return _row_file(self.folder, self.pairs[-1])

    def do(self) -> None:
        """Generate; leave each clip, and its row after it."""
        from opensora.generate import Pipeline, choose_sampling

        how = self.config
        pipeline = keep_loaded("pipeline", self.checkpoint, lambda: Pipeline.load(self.checkpoint, self.texts))
        suite = load_suite(self.weights)
        sampler = how.sampler or pipeline.checkpoint.train.objective
        sampling = choose_sampling(pipeline.checkpoint, sampler, how.steps, how.guidance, how.guidance_mode)
        prompts, seeds = zip(*self.pairs, strict=True)
        videos = pipeline.sample(pipeline.embed(prompts), seeds, sampling)
        self.folder.mkdir(parents=True, exist_ok=True)
        for pair, frames in zip(self.pairs, videos, strict=True):
            row = _row_file(self.folder, pair)
            path = write_clip(row.with_suffix(""), frames, how.fps, note=pair[0])
            write_json(row, describe_sample(suite, pair[0], frames) | {"file": path.name, "sha256": hash_file(path)})


def load_suite(weights: Weights) -> Suite:
    """The measures that these weights allow, loaded once in a process."""
    names = ("videomae", "i3d", "inception", "clip")
    videomae, i3d, inception, clip = (weights.get(name) for name in names)
    return keep_loaded("suite", str(weights), lambda: Suite.load(videomae, i3d, inception, clip))


def sample_tasks(
    makers: Mapping[str, tuple[Path, Path]],
    pairs: Sequence[Pair],
    texts: Path,
    config: EvaluateConfig,
    weights: Weights,
) -> list[SampleTask]:
    """Tasks of `config.batch_size` prompts, checkpoint by checkpoint, for the clips that are not kept.

    Rows of clips that are lost or damaged are removed, since a row says that its task is done.

    Args:
        makers: by stage the checkpoint, and the folder where its clips are kept.
        texts: folder of the prompts' embeddings.
    """
    tasks = []
    seen: set[Path] = set()
    for name, (checkpoint, folder) in makers.items():
        left = missing(folder, pairs) if folder not in seen else []
        seen.add(folder)
        for pair in left:
            _row_file(folder, pair).unlink(missing_ok=True)
        for first in range(0, len(left), config.batch_size):
            batch = tuple(left[first : first + config.batch_size])
            tasks.append(SampleTask(name, checkpoint, batch, folder, texts, config, weights))
    return tasks


def embed_prompts(checkpoint: Path, prompts: Sequence[str], texts: Path) -> None:
    """Leave the embeddings for the tasks: the text encoder can be larger than all else, and is loaded once."""
    from opensora.generate import Pipeline

    Pipeline.load(checkpoint, texts).embed(prompts)


def missing(folder: Path, pairs: Iterable[Pair]) -> list[Pair]:
    """Those whose clip or row is not kept whole, each once. Reads the clips."""
    return [pair for pair in dict.fromkeys(pairs) if _read_row(folder, pair) is None]


def read_rows(folder: Path, pairs: Iterable[Pair]) -> list[Row]:
    """Rows of kept clips, in the prompts' order; raises FileNotFoundError for one that is not kept."""
    rows = []
    for pair in pairs:
        row = _read_row(folder, pair)
        if row is None:
            raise FileNotFoundError(f"{folder} holds no clip of {pair[0]!r} with seed {pair[1]}; start again")
        rows.append(row)
    return rows


def _row_file(folder: Path, pair: Pair) -> Path:
    return folder / f"{fingerprint(*pair)[:20]}.json"


def _read_row(folder: Path, pair: Pair) -> Row | None:
    """None where the row is missing or damaged, or its clip is gone, or another file."""
    try:
        row = json.loads(_row_file(folder, pair).read_text())
        return row if hash_file(folder / row["file"]) == row["sha256"] else None
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return None


def describe_sample(suite: Suite, prompt: str, frames: np.ndarray) -> Row:
    """A generated clip uint8 [T, H, W, 3]: its shape, what the detector sees, its measures with features."""
    return {
        "shape": list(frames.shape[:3]),
        "seen": asdict(detect(frames)) if parse_caption(prompt) else None,
        "measures": suite.clip(frames, prompt),
    }
