"""All that decides what a checkpoint is measured by: prompts, seeds, settings, extractors, real clips."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from opensora.config import EvaluateConfig
from opensora.data.reuse import hash_folder
from opensora.evaluation import METRICS_VERSION
from opensora.evaluation.prompts import evaluation_prompts
from opensora.evaluation.reference import Reference, Shape, real_reference, rendered_reference
from opensora.evaluation.sampling import Weights
from opensora.metrics.features import EXTRACTOR
from opensora.step import fingerprint
from opensora.training.checkpoint import Checkpoint
from opensora.weights import hash_file

# Of the configuration; prompts and seeds count as they are read, and how work is shared changes no clip.
NOT_SETTINGS = {"processes", "batch_size", "prompts", "prompts_file", "seed"}


@dataclass(frozen=True)
class Data:
    """Where real clips come from: folders of the caption and the split step."""

    manifest: Path
    shards: Path


@dataclass(frozen=True)
class Plan:
    """What one evaluation is made of, the checkpoints aside."""

    config: EvaluateConfig
    prompts: list[str]
    seeds: list[int]
    weights: Weights
    extractors: dict[str, Any]  # hashes of the weights
    data: Data | None  # None: the embedded world
    cache: Path

    def reference(self, checkpoint: Checkpoint) -> Reference:
        """The real clips that a checkpoint's are compared with."""
        shape = Shape.of(checkpoint.train)
        if self.data is None:
            return rendered_reference(self.prompts, shape, self.extractors)
        count = self.config.reference_clips
        return real_reference(self.data.manifest, self.data.shards, count, shape, self.extractors)

    def identity(self, reference: Reference) -> str:
        """Hash of prompts, seeds, settings, extractors and real clips: numbers of one hash compare."""
        settings = self.config.model_dump(exclude=NOT_SETTINGS)
        shape = asdict(reference.shape)
        return fingerprint(METRICS_VERSION, settings, self.prompts, self.seeds, self.extractors, reference.key, shape)


def make_plan(config: EvaluateConfig, data: Data | None, weights: Weights, cache: Path) -> Plan:
    """Read the prompts, and hash what decides; raises ConfigError for a prompts file that is wrong."""
    pairs = evaluation_prompts(config)
    extractors: dict[str, Any] = {EXTRACTOR: METRICS_VERSION}
    for name, path in weights.items():
        if path is not None:
            extractors[name] = hash_folder(path, cache) if path.is_dir() else hash_file(path)
    return Plan(config, [text for text, _ in pairs], [seed for _, seed in pairs], weights, extractors, data, cache)
