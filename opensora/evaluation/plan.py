"""All that decides what a checkpoint is measured by: prompts, seeds, settings, extractors, real clips."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from opensora.config import EvaluateConfig
from opensora.data.reuse import hash_folder
from opensora.evaluation import METRICS_VERSION
from opensora.evaluation.hashes import hash_code, hash_models
from opensora.evaluation.prompts import evaluation_prompts, read_benchmark
from opensora.evaluation.reference import Reference, Shape, real_reference, rendered_reference
from opensora.evaluation.sampling import Pair, Weights
from opensora.metrics.features import EXTRACTOR
from opensora.metrics.vbench import Prompt
from opensora.metrics.vbench_runner import find_version
from opensora.step import fingerprint
from opensora.training.checkpoint import Checkpoint
from opensora.weights import hash_file

CLIPS = "evaluate"  # in the cache
EXTRACTORS = ("videomae", "i3d", "inception", "clip")
# Of the configuration. Prompts and seeds count as they are read, extractors by their weights wherever these lie; how
# work is shared changes no clip.
NOT_SETTINGS = {"processes", "batch_size", "prompts", "prompts_file", "seed", *EXTRACTORS, "vbench"}


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
    vbench: str  # version of the package; empty: it cannot be run
    benchmark: tuple[Prompt, ...]  # VBench's prompts, of which `prompts` are; empty: they are others
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
        """Hash of prompts, seeds, settings, extractors and real clips: numbers of one hash compare.

        Not of the code: METRICS_VERSION says where that makes numbers which do not compare.
        """
        settings = self.config.model_dump(exclude=NOT_SETTINGS)
        shape = asdict(reference.shape)
        measured = [self.extractors, self.vbench, reference.key]
        return fingerprint(METRICS_VERSION, settings, self.prompts, self.seeds, measured, shape)

    @property
    def pairs(self) -> list[Pair]:
        """Prompts with their seeds."""
        return list(zip(self.prompts, self.seeds, strict=True))

    def clips(self, checkpoint: Checkpoint) -> Path:
        """Where a checkpoint's clips and their rows are kept: a folder for all that decides them, the prompt aside.

        Raises:
            CheckpointError: its VAE or its text encoder is missing.
        """
        settings = self.config.model_dump(exclude={*NOT_SETTINGS, "reference_clips"})
        models = hash_models(checkpoint.info, checkpoint.folder, self.cache)
        key = fingerprint(METRICS_VERSION, settings, self.extractors, models, hash_code())
        return self.cache / CLIPS / f"{checkpoint.sha256[:16]}-{key[:16]}"


def make_plan(config: EvaluateConfig, data: Data | None, weights: Weights, cache: Path) -> Plan:
    """Read the prompts, and hash what decides; raises ConfigError for a prompts file that is wrong."""
    pairs, benchmark = evaluation_prompts(config), read_benchmark(config)
    extractors: dict[str, Any] = {EXTRACTOR: METRICS_VERSION}
    for name, path in weights.items():
        if path is not None:
            extractors[name] = hash_folder(path, cache) if path.is_dir() else hash_file(path)
    prompts, seeds = [text for text, _ in pairs], [seed for _, seed in pairs]
    return Plan(config, prompts, seeds, weights, extractors, find_version(config.vbench), benchmark, data, cache)
