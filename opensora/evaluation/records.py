"""metrics.json, scores.json and champion.json: what the gate, DVC and MLflow read of an evaluation."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from opensora.data.reuse import hash_folder
from opensora.evaluation import COMPARABLE, METRICS_VERSION
from opensora.evaluation.measuring import Findings
from opensora.evaluation.plan import Plan
from opensora.evaluation.prompts import describe_seeds
from opensora.evaluation.scores import headline
from opensora.metrics.features import EXTRACTOR
from opensora.step import fingerprint
from opensora.tracking.lineage import DATA_REVISION
from opensora.training.checkpoint import MODELS, locate


def metrics_record(plan: Plan, found: Findings) -> dict[str, Any]:
    """metrics.json, flat but for `absent`: `<stage>_<metric>`, the headline, and whether numbers compare."""
    metrics: dict[str, Any] = {
        f"{stage}_{name}": value for stage, measured in found.stages.items() for name, value in measured.metrics.items()
    }
    metrics |= headline(metrics, next(iter(found.stages)), found.last)
    metrics |= {
        "metrics_version": METRICS_VERSION,
        "evaluation_sha256": plan.identity(found.reference),
        "prompts_sha256": fingerprint(plan.prompts),
        "seeds": describe_seeds(plan.seeds),
        "samples_per_stage": len(plan.prompts),
        "fd_extractor": EXTRACTOR,
        "extractors": ", ".join(found.extractors),
        "reference": "kept clips" if plan.data else "rendered scenes",
        "reference_sha256": found.reference.key,
        "reference_clips": found.candidate.real_clips,
        "absent": found.absent,
    }
    if revision := os.environ.get(DATA_REVISION):
        metrics["data_revision"] = revision
    if found.champion:
        metrics |= {"champion_version": found.champion.version, "champion_sha256": found.champion.sha256}
        if found.champion.unavailable:
            metrics["champion_unavailable"] = found.champion.unavailable
    return metrics


def scores_record(plan: Plan, found: Findings) -> dict[str, Any]:
    """scores.json: the scalars of every prompt, by stage."""
    stages = {stage: measured.scores for stage, measured in found.stages.items()}
    return {"metrics_version": METRICS_VERSION, "prompts": plan.prompts, "seeds": plan.seeds, "stages": stages}


def champion_record(metrics: dict[str, Any], found: Findings) -> dict[str, Any] | None:
    """champion.json; None if there is no champion, or none that could be measured.

    `metrics` has the names of metrics.json: the champion's last stage stands for the candidate's.
    """
    champion = found.champion
    if champion is None or champion.measured is None:
        return None
    own: dict[str, Any] = {f"{found.last}_{name}": value for name, value in champion.measured.metrics.items()}
    own |= headline(own, "", found.last)
    own |= {name: metrics[name] for name in COMPARABLE if name in metrics} | {"evaluation_sha256": champion.identity}
    scores = champion.measured.scores
    return {"version": champion.version, "sha256": champion.sha256, "metrics": own, "scores": scores}


def hash_models(info: Mapping[str, Any], checkpoint: Path, memory: Path) -> dict[str, str]:
    """sha256 of the VAE's and the text encoder's folder: the other half of what makes a checkpoint's clips.

    Args:
        info: what the checkpoint says of itself.
        memory: folder that remembers hashes of large files; see `hash_folder`.

    Raises:
        CheckpointError: one of them is missing.
    """
    return {name: fingerprint(hash_folder(locate(info[name], checkpoint), memory)) for name in MODELS}
