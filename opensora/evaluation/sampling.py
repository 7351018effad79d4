"""Clips of fixed prompts and seeds by one checkpoint, each measured where it was made."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from opensora.clip_file import write_clip
from opensora.config import EvaluateConfig
from opensora.demo.shapes import detect, parse_caption
from opensora.evaluation.share import keep_loaded
from opensora.metrics.suite import Suite
from opensora.step import write_json

Weights = Mapping[str, Path | None]  # of extractors, by their name in the configuration
Row = dict[str, Any]  # what became of one prompt; see `describe_sample`


@dataclass(frozen=True)
class SampleTask:
    """Some prompts for one checkpoint; clips and results go below `folder`."""

    name: str  # the stage
    checkpoint: Path
    prompts: tuple[tuple[str, int], ...]  # with their seeds
    first: int  # number of the first prompt
    folder: Path
    config: EvaluateConfig
    weights: Weights

    @property
    def result(self) -> Path:
        """Written last: the task is done when it is there."""
        return self.folder / "parts" / f"{self.name}-{self.first:05d}.json"

    def do(self) -> None:
        """Generate, write the clips to `samples/<name>/` and their rows to `result`."""
        from opensora.generate import Pipeline, choose_sampling

        how, texts = self.config, self.folder / "parts" / "text"
        pipeline = keep_loaded("pipeline", self.checkpoint, lambda: Pipeline.load(self.checkpoint, texts))
        suite = load_suite(self.weights)
        sampler = how.sampler or pipeline.checkpoint.train.objective
        sampling = choose_sampling(pipeline.checkpoint, sampler, how.steps, how.guidance, how.guidance_mode)
        prompts, seeds = zip(*self.prompts, strict=True)
        videos = pipeline.sample(pipeline.embed(prompts), seeds, sampling)
        samples = self.folder / "samples" / self.name
        samples.mkdir(parents=True, exist_ok=True)
        rows = []
        for place, (prompt, frames) in enumerate(zip(prompts, videos, strict=True)):
            path = write_clip(samples / f"{self.first + place:03d}", frames, how.fps, note=prompt)
            rows.append(describe_sample(suite, prompt, frames) | {"file": str(path.relative_to(self.folder))})
        write_json(self.result, rows)


def load_suite(weights: Weights) -> Suite:
    """The measures that these weights allow, loaded once in a process."""
    names = ("videomae", "i3d", "inception", "clip")
    videomae, i3d, inception, clip = (weights.get(name) for name in names)
    return keep_loaded("suite", str(weights), lambda: Suite.load(videomae, i3d, inception, clip))


def sample_tasks(
    checkpoints: Mapping[str, Path],
    prompts: Sequence[tuple[str, int]],
    folder: Path,
    config: EvaluateConfig,
    weights: Weights,
) -> list[SampleTask]:
    """Tasks of `config.batch_size` prompts, checkpoint by checkpoint."""
    return [
        SampleTask(name, path, tuple(prompts[first : first + config.batch_size]), first, folder, config, weights)
        for name, path in checkpoints.items()
        for first in range(0, len(prompts), config.batch_size)
    ]


def embed_prompts(checkpoint: Path, prompts: Sequence[str], folder: Path) -> None:
    """Leave the embeddings for the tasks: the text encoder can be larger than all else, and is loaded once."""
    from opensora.generate import Pipeline

    Pipeline.load(checkpoint, folder / "parts" / "text").embed(prompts)


def read_rows(tasks: Sequence[SampleTask]) -> list[Row]:
    """Rows of finished tasks, in the prompts' order."""
    return [row for task in tasks for row in json.loads(task.result.read_text())]


def describe_sample(suite: Suite, prompt: str, frames: np.ndarray) -> Row:
    """A generated clip uint8 [T, H, W, 3]: its shape, what the detector sees, its measures with features."""
    return {
        "shape": list(frames.shape[:3]),
        "seen": asdict(detect(frames)) if parse_caption(prompt) else None,
        "measures": suite.clip(frames, prompt),
    }
