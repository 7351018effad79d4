"""Every stage and the champion generate the same prompts, and are measured against the same real clips."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from opensora.config import UserError
from opensora.data.reuse import link_file
from opensora.evaluation.by_vbench import measure_by_vbench
from opensora.evaluation.champion import NAME as CHAMPION
from opensora.evaluation.champion import Champion, kept_measures
from opensora.evaluation.kept import prune, touch
from opensora.evaluation.plan import CLIPS, Plan
from opensora.evaluation.reference import REFERENCE, Reference, keep_features, load_features, reference_tasks
from opensora.evaluation.sampling import Row, embed_prompts, load_suite, missing, read_rows, sample_tasks
from opensora.evaluation.scores import Measured, about, measure, prompt_scores
from opensora.evaluation.share import share
from opensora.metrics.suite import Suite
from opensora.training.checkpoint import Checkpoint


@dataclass(frozen=True)
class Findings:
    """What an evaluation found.

    Attributes:
        stages: in order; the last one is the candidate.
        reference: the real clips that the candidate was compared with.
        champion: None if there is none yet.
        extractors: in use, by name; VBench with its version.
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
    texts = work / "parts" / "text"
    if champion:
        champion = _meet(champion, candidate, plan, work)
        generates = not champion.measured and champion.sha256 != candidate.sha256
        if champion.checkpoint and champion.reference and generates:
            makers[CHAMPION], against[CHAMPION] = champion.checkpoint, champion.reference
    clips = {name: plan.clips(checkpoint) for name, checkpoint in makers.items()}
    places = {name: (checkpoint.folder, clips[name]) for name, checkpoint in makers.items()}
    samples = sample_tasks(places, plan.pairs, texts, plan.config, plan.weights)
    if any(task.name != CHAMPION for task in samples):
        embed_prompts(candidate.folder, plan.prompts, texts)
    real = reference_tasks(list(against.values()), plan.cache, work, plan.weights)
    failure = share([*real, *samples], plan.config.processes, may_fail=CHAMPION)
    keep_features(real, plan.cache)

    suite = load_suite(plan.weights)
    measured, absent = {}, dict(suite.absent)
    for name in makers if not failure else checkpoints:
        vbench = name in (last, CHAMPION)
        measured[name], lacking = _measure(plan, suite, name, clips[name], against[name], work, vbench)
        absent |= lacking if name == last else {}
    for folder in (plan.cache / CLIPS, plan.cache / REFERENCE):
        prune(folder)
    own = measured.pop(CHAMPION, None)
    if champion and failure:
        champion = replace(champion, unavailable=failure)
    elif champion and champion.sha256 == candidate.sha256:
        champion = replace(champion, measured=measured[last])
    elif champion and own:
        champion = replace(champion, measured=own)
    extractors = (*suite.names, *([f"vbench {plan.vbench}"] if plan.vbench else []))
    return Findings(measured, references[last], champion, extractors, absent)


def _measure(
    plan: Plan, suite: Suite, name: str, clips: Path, reference: Reference, work: Path, vbench: bool
) -> tuple[Measured, dict[str, str]]:
    """What a stage's clips, kept in `clips`, are worth; and what is not measured of them, with its reason."""
    touch(clips)
    rows = read_rows(clips, plan.pairs)
    features = load_features(reference, plan.cache)
    distances = suite.distances([row["measures"] for row in rows], features)
    absent = {metric: reference.reason or one.absent for metric, one in distances.items() if one.value is None}
    metrics = measure(suite, plan.prompts, rows, features)
    if vbench:
        more, lacking = measure_by_vbench(plan, rows, clips, work / "parts" / f"videos-{name}")
        metrics, absent = metrics | more, absent | lacking
    measured = Measured(
        files=_link(clips, rows, work, name),
        scores=prompt_scores(plan.prompts, rows),
        metrics=metrics,
        height=reference.shape.height,
        real_clips=max((len(found) for found in (features or {}).values()), default=0),
        seen=[row["seen"] for row in rows],
        distances=about(distances),
    )
    return measured, absent


def _link(clips: Path, rows: Sequence[Row], work: Path, name: str) -> list[str]:
    """Give the clips their place in `samples/<name>/`, numbered as the prompts; returns the names below `work`."""
    samples = work / "samples" / name
    samples.mkdir(parents=True, exist_ok=True)
    files = []
    for number, row in enumerate(rows):
        source = clips / row["file"]
        link_file(source, samples / f"{number:03d}{source.suffix}")
        files.append(f"samples/{name}/{number:03d}{source.suffix}")
    return files


def _meet(champion: Champion, candidate: Checkpoint, plan: Plan, work: Path) -> Champion:
    """The champion with what it was measured by before; one that cannot generate loses its checkpoint."""
    if champion.checkpoint is None:
        return champion
    checkpoint = champion.checkpoint
    reference = plan.reference(checkpoint)
    champion = replace(champion, reference=reference, identity=plan.identity(reference))
    if champion.sha256 == candidate.sha256:
        return champion
    measured = kept_measures(champion, work)
    if measured is None:
        try:
            if missing(plan.clips(checkpoint), plan.pairs):
                embed_prompts(checkpoint.folder, plan.prompts, work / "parts" / "text")
        except UserError as error:
            return replace(champion, checkpoint=None, unavailable=str(error))
    return replace(champion, measured=measured)
