"""Every stage and the champion generate the same prompts, and are measured against the same real clips."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from opensora.config import UserError
from opensora.evaluation.champion import NAME as CHAMPION
from opensora.evaluation.champion import Champion, kept_measures
from opensora.evaluation.plan import Plan
from opensora.evaluation.reference import Reference, keep_features, load_features, reference_tasks
from opensora.evaluation.sampling import Row, embed_prompts, load_suite, read_rows, sample_tasks
from opensora.evaluation.scores import Measured, measure, prompt_scores
from opensora.evaluation.share import share
from opensora.metrics.suite import Suite
from opensora.metrics.vbench_runner import NOT_SET, run_vbench
from opensora.training.checkpoint import Checkpoint


@dataclass(frozen=True)
class Findings:
    """What an evaluation found.

    Attributes:
        stages: in order; the last one is the candidate.
        reference: the real clips that the candidate was compared with.
        champion: None if there is none yet.
        extractors: in use, by name.
        absent: what was not measured, and why.
    """

    stages: dict[str, Measured]
    reference: Reference
    champion: Champion | None
    extractors: tuple[str, ...]
    absent: dict[str, str]

    @property
    def last(self) -> str:
        """The stage of the candidate."""
        return list(self.stages)[-1]

    @property
    def candidate(self) -> Measured:
        """The last stage, which may be promoted."""
        return self.stages[self.last]


def measure_all(
    plan: Plan,
    checkpoints: Mapping[str, Checkpoint],
    references: Mapping[str, Reference],
    champion: Champion | None,
    work: Path,
) -> Findings:
    """Generate and measure; a stopped run goes on with the parts that are missing.

    Args:
        checkpoints: by stage, in order.
        references: by stage.

    Raises:
        StepError: generation of a stage failed. That of the champion is said in `Champion.unavailable`.
    """
    last = list(checkpoints)[-1]
    candidate = checkpoints[last]
    makers, against = dict(checkpoints), dict(references)
    if champion:
        champion = _meet(champion, candidate, plan, work)
        if champion.checkpoint and not champion.measured and champion.sha256 != candidate.sha256:
            makers[CHAMPION], against[CHAMPION] = champion.checkpoint, plan.reference(champion.checkpoint)
    embed_prompts(candidate.folder, plan.prompts, work)

    folders = {name: checkpoint.folder for name, checkpoint in makers.items()}
    pairs = list(zip(plan.prompts, plan.seeds, strict=True))
    samples = sample_tasks(folders, pairs, work, plan.config, plan.weights)
    real = reference_tasks(list(against.values()), plan.cache, work, plan.weights)
    failure = share([*real, *samples], plan.config.processes, may_fail=CHAMPION)
    keep_features(real, plan.cache)

    suite = load_suite(plan.weights)
    measured, absent = {}, dict(suite.absent)
    for name in makers if not failure else checkpoints:
        rows = read_rows([task for task in samples if task.name == name])
        features = load_features(against[name], plan.cache)
        metrics = measure(suite, plan.prompts, rows, features)
        if name in (last, CHAMPION):
            more, lacking = _by_vbench(plan, name, rows, work)
            metrics |= more
        if name == last:
            absent |= lacking | _missing(suite, rows, features, references[last].reason)
        measured[name] = Measured(
            files=[row["file"] for row in rows],
            scores=prompt_scores(plan.prompts, rows),
            metrics=metrics,
            height=against[name].shape.height,
            real_clips=max((len(found) for found in (features or {}).values()), default=0),
            seen=[row["seen"] for row in rows],
        )
    own = measured.pop(CHAMPION, None)
    if champion and failure:
        champion = replace(champion, unavailable=failure)
    elif champion and champion.sha256 == candidate.sha256:
        champion = replace(champion, measured=measured[last])
    elif champion and own:
        champion = replace(champion, measured=own)
    return Findings(measured, references[last], champion, suite.names, absent)


def _missing(
    suite: Suite, rows: Sequence[Row], features: Mapping[str, np.ndarray] | None, reason: str
) -> dict[str, str]:
    """Distances that the suite has an extractor for and that were not taken, and why."""
    distances = suite.distances([row["measures"] for row in rows], features)
    return {name: reason or found.absent for name, found in distances.items() if found.value is None}


def _by_vbench(plan: Plan, name: str, rows: Sequence[Row], work: Path) -> tuple[dict[str, float], dict[str, str]]:
    """VBench's scores of the clips by metric, and what it lacks; a stopped run asks for the missing ones alone."""
    if not plan.config.vbench:
        return {}, {"vbench": NOT_SET}
    if rows[0]["shape"][0] < 2:
        return {}, {"vbench": "the last stage makes pictures"}
    prompts = {Path(row["file"]).name: prompt for row, prompt in zip(rows, plan.prompts, strict=True)}
    output = work / "parts" / f"vbench-{name}"
    found = run_vbench(plan.config.vbench, work / "samples" / name, output, prompts=prompts)
    return (
        {f"vbench_{dimension}": score for dimension, score in found.scores.items()},
        {f"vbench_{dimension}": reason for dimension, reason in found.absent.items()},
    )


def _meet(champion: Champion, candidate: Checkpoint, plan: Plan, work: Path) -> Champion:
    """The champion with what it was measured by before; one that cannot generate loses its checkpoint."""
    if champion.checkpoint is None:
        return champion
    checkpoint = champion.checkpoint
    champion = replace(champion, identity=plan.identity(plan.reference(checkpoint)))
    if champion.sha256 == candidate.sha256:
        return champion
    measured = kept_measures(champion, plan, work)
    if measured is None:
        try:
            embed_prompts(checkpoint.folder, plan.prompts, work)
        except UserError as error:
            return replace(champion, checkpoint=None, unavailable=str(error))
    return replace(champion, measured=measured)
