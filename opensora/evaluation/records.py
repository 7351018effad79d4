"""metrics.json, scores.json and champion.json: what the gate, DVC and MLflow read of an evaluation."""

import os
from typing import Any

from opensora.evaluation import COMPARABLE, METRICS_VERSION
from opensora.evaluation.measuring import Findings
from opensora.evaluation.plan import Plan
from opensora.evaluation.prompts import describe_seeds
from opensora.evaluation.scores import headline
from opensora.metrics.features import EXTRACTOR
from opensora.step import fingerprint
from opensora.tracking.lineage import DATA_REVISION


def metrics_record(plan: Plan, found: Findings) -> dict[str, Any]:
    """Most of metrics.json: `<stage>_<metric>`, the headline, and what says whether numbers compare."""
    metrics: dict[str, Any] = {
        f"{stage}_{name}": value for stage, measured in found.stages.items() for name, value in measured.metrics.items()
    }
    metrics |= headline(metrics, next(iter(found.stages)), found.last)
    metrics |= {
        "metrics_version": METRICS_VERSION,
        "evaluation_sha256": plan.identity(found.reference),
        "shape": str(found.reference.shape),
        "prompts_sha256": fingerprint(plan.prompts),
        "seeds": describe_seeds(plan.seeds),
        "samples_per_stage": len(plan.prompts),
        "fd_extractor": EXTRACTOR,
        "extractors": ", ".join(found.extractors),
        "reference": "kept clips" if plan.data else "rendered scenes",
        "reference_sha256": found.reference.key,
        "reference_clips": found.candidate.real_clips,
        "distances": found.candidate.distances,
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
    if champion is None or champion.measured is None or champion.reference is None:
        return None
    own: dict[str, Any] = {f"{found.last}_{name}": value for name, value in champion.measured.metrics.items()}
    own |= headline(own, "", found.last)
    own |= {name: metrics[name] for name in COMPARABLE if name in metrics}
    own |= {"evaluation_sha256": champion.identity, "shape": str(champion.reference.shape)}
    scores = champion.measured.scores
    own["distances"] = champion.measured.distances
    return {"version": champion.version, "sha256": champion.sha256, "metrics": own, "scores": scores}
