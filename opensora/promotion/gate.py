"""The gate's decision: what is known of a candidate and of the champion goes in, every check with its reason comes out.

Nothing here reads a file or asks the registry (`evidence` does): the same evidence gives the same decision.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from opensora.config import Gate, Primary, PromoteConfig
from opensora.evaluation import COMPARABLE, METRICS_VERSION
from opensora.promotion.paired import paired_interval

BASIS = (*COMPARABLE, "prompts", "seeds")  # two evaluations are compared only where all of these are known and equal
SHAPE = "shape"  # entry of metrics.json: frames, size and frame interval of the clips, which no evaluation makes equal
CODE = ("git_commit", "image_digest")  # one of them says which code trained the candidate
DATA = ("dvc_lock_md5", "data_revision", "data_fingerprint")  # by `dvc repro`, on a cluster, by plain commands
REQUIRED = ("checkpoint.sha256", "fd_extractor", "samples_per_stage", "profile")
SIGNATURE = "signature"  # tag of a version: what it takes and gives when it is served
UNKNOWN = ("", "unknown", "None")


@dataclass(frozen=True)
class Check:
    """One condition and what became of it."""

    kind: str  # as in docs/promotion.md
    passed: bool
    reason: str
    metric: str = ""
    value: float | None = None
    limit: float | None = None  # the floor, the tolerance or the margin
    champion: float | None = None
    interval: tuple[float | None, float | None] | None = None  # None where a bound is infinite, which JSON cannot say


@dataclass(frozen=True)
class Evaluation:
    """What was measured of a model; None where its evaluation did not record it."""

    metrics: Mapping[str, object]
    prompts: Sequence[str] | None = None
    seeds: Sequence[int] | None = None
    scores: Sequence[Mapping[str, object]] | None = None  # of the last stage, a mapping a prompt

    def basis(self, name: str) -> object:
        """The value of one of BASIS."""
        match name:
            case "prompts":
                return None if self.prompts is None else list(self.prompts)
            case "seeds":
                return None if self.seeds is None else list(self.seeds)
        return self.metrics.get(name)


@dataclass(frozen=True)
class Candidate:
    """A checkpoint that wants to be the champion."""

    sha256: str
    tags: Mapping[str, str]  # lineage, as its version would carry it
    evaluation: Evaluation
    artifact_problem: str = ""  # why its files are not those of `sha256`
    models_sha256: Mapping[str, str] = field(default_factory=dict)  # of VAE and text encoder, as they are now
    registered_models: Mapping[str, str] = field(default_factory=dict)  # of its version, if it has one already
    sample_problem: str = ""  # why no clip of it can be looked at
    evaluated_sha256: str = ""  # of the checkpoint that the evaluation is of; empty: not recorded
    rolled_back: str = ""  # that somebody took it back, and why


@dataclass(frozen=True)
class Champion:
    """The version that users get now."""

    version: str
    sha256: str
    tags: Mapping[str, str] = field(default_factory=dict)
    evaluation: Evaluation | None = None
    source: str = ""  # where its evaluation comes from
    lost: str = ""  # why it cannot be loaded any more
    has_alias: bool = True  # False: it was the champion, and no version is now


def judge(config: PromoteConfig, candidate: Candidate, champion: Champion | None) -> list[Check]:
    """All checks in their order; the candidate passes if all of them do. None is left out after a failure."""
    checks = [
        _lineage(candidate),
        _artifact(candidate),
        _signature(candidate, champion),
        _sample(candidate),
        _evaluation(candidate),
        _not_rolled_back(candidate),
    ]
    check, against = _opponent(config, candidate, champion)
    checks.append(check)
    alone = against is None and check.passed and not _is_champion(candidate, champion)  # nothing else decides
    checks += _floors(config, candidate.evaluation, alone)
    if against is not None or not check.passed:  # where the champion cannot be compared with, each check says so
        checks += [_guard(gate, candidate.evaluation, against) for gate in config.gates if gate.tolerance is not None]
        if config.primary is not None:
            checks.append(_improvement(config.primary, candidate.evaluation, against))
    return checks


def _lineage(candidate: Candidate) -> Check:
    known = {name: value for name, value in candidate.tags.items() if str(value) not in UNKNOWN}
    missing = [name for name in REQUIRED if name not in known]
    untold = [" or ".join(names) for names in (CODE, DATA) if not any(name in known for name in names)]
    advice = ["run `opensora evaluate` again"] if missing else []
    if untold:
        stage = known.get("stage", "the last stage")
        advice.append(
            "checkpoint.json does not say what it was trained with: remove the folder of "
            f"{stage} and train it anew, in a git checkout or in an image that is named by its digest"
        )
    if missing or untold:
        return Check("lineage", False, f"not known: {', '.join([*missing, *untold])}; {'; '.join(advice)}")
    named = {name: f"{name} {_short(known[name])}" for name in (*CODE, *DATA) if name in known}
    if known.get("git_dirty") == "true" and CODE[0] in named:
        named[CODE[0]] += " with uncommitted changes"
    return Check("lineage", True, ", ".join(named.values()))


def _artifact(candidate: Candidate) -> Check:
    if candidate.artifact_problem:
        return Check("artifact", False, candidate.artifact_problem)
    again = "run `opensora evaluate` again"
    then, now = candidate.evaluation.metrics.get("models_sha256"), candidate.models_sha256
    if not isinstance(then, Mapping) or not then:
        return Check("artifact", False, f"metrics.json does not say which VAE and text encoder made its clips; {again}")
    if changes := _changes(then, now):
        return Check("artifact", False, f"{changes} when it was evaluated: put its files back, or {again}")
    if candidate.registered_models and (changes := _changes(candidate.registered_models, now)):
        advice = "put its files back and evaluate again, or train a checkpoint with the new ones"
        return Check("artifact", False, f"{changes} when this checkpoint was registered: {advice}")
    whole = f"every file was read and hashed: sha256 {_short(candidate.sha256)}"
    return Check("artifact", True, f"{whole}; with the {' and '.join(sorted(then))} of its evaluation")


def _changes(then: Mapping[str, str], now: Mapping[str, str]) -> str:
    """Which of VAE and text encoder are others than they were."""
    names = [name for name in sorted({*then, *now}) if now.get(name) != then.get(name)]
    return "; ".join(f"{name} has sha256 {_short(now.get(name))} and had {_short(then.get(name))}" for name in names)


def _signature(candidate: Candidate, champion: Champion | None) -> Check:
    if champion is None:
        return Check("signature", True, "no champion yet, which somebody might call")
    new, old = candidate.tags.get(SIGNATURE), champion.tags.get(SIGNATURE)
    if old is None and champion.lost:
        return Check("signature", True, f"not compared: version {champion.version} is lost, and with it its signature")
    if new is None or old is None:
        who = "the candidate" if new is None else f"version {champion.version}, the champion,"
        advice = "go back to a version that has one by `opensora rollback --to VERSION`"
        return Check("signature", False, f"{who} has none, and both must be called alike; {advice}")
    if new != old:
        reason = f"whoever calls the champion cannot call the candidate: {new}, not {old}"
        return Check("signature", False, f"{reason}; promote it by a program that serves what the champion does")
    return Check("signature", True, "the champion's")


def _sample(candidate: Candidate) -> Check:
    if candidate.sample_problem:
        return Check("sample", False, candidate.sample_problem)
    return Check("sample", True, "a clip that it generated decodes")


def _evaluation(candidate: Candidate) -> Check:
    version, again = candidate.evaluation.metrics.get("metrics_version"), "run `opensora evaluate` again"
    if version != METRICS_VERSION:
        said = "no version" if version is None else f"version {version}"
        reason = f"metrics.json is of {said}, this program judges version {METRICS_VERSION}; {again}"
        return Check("evaluation", False, reason)
    if candidate.evaluated_sha256 != candidate.sha256:
        other, own = _short(candidate.evaluated_sha256), _short(candidate.sha256)
        said = f"is of checkpoint {other}" if other else "does not say of which checkpoint it is"
        return Check("evaluation", False, f"metrics.json {said}, the candidate is {own}; {again}")
    return Check("evaluation", True, f"of this checkpoint, metrics version {version}")


def _not_rolled_back(candidate: Candidate) -> Check:
    if candidate.rolled_back:
        return Check("roll-back", False, candidate.rolled_back)
    return Check("roll-back", True, "nobody took this checkpoint back")


def _opponent(
    config: PromoteConfig, candidate: Candidate, champion: Champion | None
) -> tuple[Check, Evaluation | None]:
    """Whether there is a champion to compare with, and its evaluation if it was made as the candidate's was."""
    kind = "champion"
    if champion is None:
        return Check(kind, True, "no champion yet: the floors alone decide"), None
    name = f"version {champion.version}"
    if _is_champion(candidate, champion):
        return Check(kind, True, f"the candidate is {name}, the champion already: not compared with itself"), None
    if champion.lost:
        lost = f"{name} is lost: {champion.lost}"
        if config.replace_lost_champion:
            return Check(kind, True, f"{lost}; by promote.replace_lost_champion the floors alone decide"), None
        advice = (
            "go back to a version that is whole by `opensora rollback --to VERSION`, or let the floors alone decide"
        )
        return Check(kind, False, f"{lost}; {advice} by --replace-lost-champion"), None
    if champion.evaluation is None:
        return Check(kind, False, f"{name} has no evaluation to compare with; run `opensora evaluate` again"), None
    ours, theirs = (one.basis(SHAPE) for one in (candidate.evaluation, champion.evaluation))
    if ours and theirs and ours != theirs:
        shapes = f"the candidate's clips are {ours}, those of {name}, {champion.source}, are {theirs}"
        if config.accept_other_shape:
            return Check(kind, True, f"{shapes}; by promote.accept_other_shape the floors alone decide"), None
        advice = "train a candidate of the champion's shape, or let the floors alone decide by --accept-other-shape"
        return Check(kind, False, f"{shapes}, and numbers of two shapes do not compare: {advice}"), None
    bases = {what: (candidate.evaluation.basis(what), champion.evaluation.basis(what)) for what in BASIS}
    if differences := [
        _differ(what, here, there) for what, (here, there) in bases.items() if here is None or here != there
    ]:
        reason = f"{'; '.join(differences)}: not comparable with {name}, {champion.source}; run `opensora evaluate`"
        return Check(kind, False, f"{reason} again, which measures the champion beside the candidate"), None
    of = candidate.evaluation
    basis = f"the same prompts and seeds, N {of.basis('samples_per_stage')}, extractor {of.basis('fd_extractor')}"
    return Check(kind, True, f"{name}, {champion.source}: {basis}"), champion.evaluation


def _is_champion(candidate: Candidate, champion: Champion | None) -> bool:
    return champion is not None and champion.sha256 == candidate.sha256 and not champion.lost


def _differ(what: str, here: object, there: object) -> str:
    if isinstance(here, Mapping) and isinstance(there, Mapping):
        name = next(name for name in sorted({*here, *there}) if here.get(name) != there.get(name))
        return _differ(f"{what}.{name}", here.get(name), there.get(name))
    if not isinstance(here, list) or not isinstance(there, list):
        here, there = (f"{len(one)} recorded" if isinstance(one, list) else _or_none(one) for one in (here, there))
        return f"{what} is {here} here, {there} there"
    if len(here) != len(there):
        return f"{len(here)} {what} here, {len(there)} there"
    number = next(index for index, (one, other) in enumerate(zip(here, there, strict=True)) if one != other)
    return f"{what} differ, first number {number}: {here[number]!r} here, {there[number]!r} there"


def _floors(config: PromoteConfig, evaluation: Evaluation, alone: bool) -> list[Check]:
    """One a gate, also for metrics without a floor: they must be numbers.

    Args:
        alone: nothing else decides: there is no champion, or none that is left to compare with.
    """
    checks = [_floor(gate, evaluation.metrics) for gate in config.gates]
    if not config.gates:
        checks.append(Check("floor", False, "promote.gates is empty: nothing says what is good enough; add a gate"))
    elif alone and all(gate.floor is None for gate in config.gates):
        reason = "no gate has a floor, and without a champion to compare with floors alone decide; write one to a gate"
        checks.append(Check("floor", False, reason))
    return checks


def _floor(gate: Gate, metrics: Mapping[str, object]) -> Check:
    value = _number(metrics.get(gate.metric))
    if value is None:
        return Check("floor", False, _missing(gate.metric, metrics), gate.metric, limit=gate.floor)
    if gate.floor is None:
        return Check("floor", True, f"{value:.4g}, no floor", gate.metric, value)
    good, higher = _sign(gate.direction) * (value - gate.floor) >= 0, gate.direction == "higher"
    order = ("≥" if higher else "≤") if good else ("<" if higher else ">")
    return Check("floor", good, f"{value:.4g} {order} {gate.floor:g}", gate.metric, value, gate.floor)


def _guard(gate: Gate, evaluation: Evaluation, against: Evaluation | None) -> Check:
    """Not worse than the champion by more than the tolerance."""
    kind, limit = "non-inferiority", gate.tolerance or 0.0
    value = _number(evaluation.metrics.get(gate.metric))
    if against is None or value is None:
        why = "no champion to compare with" if against is None else _missing(gate.metric, evaluation.metrics)
        return Check(kind, False, why, gate.metric, value, limit)
    old = _number(against.metrics.get(gate.metric))
    if old is None:
        return Check(kind, False, f"the champion's {_missing(gate.metric, against.metrics)}", gate.metric, value, limit)
    better = _sign(gate.direction) * (value - old)
    good = better >= -limit or math.isclose(better, -limit, rel_tol=1e-9)  # 0.7 is within 0.1 of 0.8
    verb = "is within" if good else "is worse by more than"
    reason = f"{value:.4g} {verb} {limit:g} of the champion's {old:.4g}"
    return Check(kind, good, reason, gate.metric, value, limit, old)


def _improvement(primary: Primary, evaluation: Evaluation, against: Evaluation | None) -> Check:
    """Better than the champion, prompt by prompt, by an interval that does not reach the margin."""
    kind, name, margin = "improvement", primary.score, primary.margin
    if against is None:
        return Check(kind, False, "no champion to compare with", name, limit=margin)
    columns: list[list[float]] = []
    for who, one in (("the candidate", evaluation), ("the champion", against)):
        column = _column(name, one.scores)
        if isinstance(column, str):
            return Check(kind, False, f"{who}: {column}", name, limit=margin)
        columns.append(column)
    new, old = columns
    if len(new) != len(old):
        return Check(
            kind, False, f"{len(new)} prompts of the candidate, {len(old)} of the champion", name, limit=margin
        )
    sign = _sign(primary.direction)
    differences = [sign * (one - other) for one, other in zip(new, old, strict=True)]
    low, high = paired_interval(differences)
    good = low > margin
    wins, losses = sum(value > 0 for value in differences), sum(value < 0 for value in differences)
    counts = f"better on {wins}, worse on {losses} of {len(new)} prompts"
    reason = f"95 % of the mean improvement lie in [{low:.4g}, {high:.4g}], {'' if good else 'not '}above {margin:g}"
    means = sum(new) / len(new), sum(old) / len(old)
    bounds = tuple(bound if math.isfinite(bound) else None for bound in (low, high))
    return Check(kind, good, f"{reason}; {counts}", name, means[0], margin, means[1], (bounds[0], bounds[1]))


def _column(name: str, scores: Sequence[Mapping[str, object]] | None) -> list[float] | str:
    """A score of every prompt, or why there is not one of each."""
    if not scores:
        return "no scores by prompt (an older evaluation); run `opensora evaluate` again"
    values = [_number(row.get(name)) for row in scores]
    absent = [str(number) for number, value in enumerate(values) if value is None]
    if absent:
        few = ", ".join(absent[:5]) + (", …" if len(absent) > 5 else "")
        return f"{name} is no finite number for {len(absent)} of {len(values)} prompts (number {few})"
    return [value for value in values if value is not None]


def _missing(name: str, metrics: Mapping[str, object]) -> str:
    value, absent = metrics.get(name), metrics.get("absent")
    if value is None:
        reasons = absent.items() if isinstance(absent, Mapping) else ()  # by names without their stage
        why = next((reason for what, reason in reasons if name.endswith(what)), None)
        return f"{name} is missing" + (f" ({why})" if why else "") + ", a number was expected"
    return f"{name} is {value}, a finite number was expected"


def _number(value: object) -> float | None:
    """`value` if it is a finite number."""
    good = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    return float(value) if good else None  # type: ignore[arg-type]


def _sign(direction: str) -> int:
    return 1 if direction == "higher" else -1


def _short(value: object) -> str:
    return str(value)[:12]


def _or_none(value: object) -> str:
    return "not recorded" if value is None else str(value)
