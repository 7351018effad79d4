"""The step `promote`: the gate judges the newest checkpoint; what passes is kept, registered and made the champion."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from opensora.config import PromoteConfig
from opensora.evaluation.files import BESIDE, hash_evaluation
from opensora.evaluation.hashes import registered_models
from opensora.promotion.evidence import (
    damage_of,
    find_candidate,
    read_candidate,
    read_champion,
    why_rolled_back,
)
from opensora.promotion.gate import Candidate, Champion, judge
from opensora.promotion.keep import keep
from opensora.promotion.report import describe
from opensora.step import Report, StepError, StepFolder, fingerprint, read_report, write_json
from opensora.tracking.promotion_lock import folder_lock, registry_lock
from opensora.tracking.registry import (
    CHAMPION,
    CHECKPOINT_URI,
    EVALUATION_FILES,
    EVALUATION_URI,
    METRICS_TAG,
    PREVIOUS,
    ChampionMoved,
    RegistryError,
    adopt,
    champion,
    check_champion,
    model_name,
    move_champion,
    version_of,
)
from opensora.tracking.tracker import Tracker
from opensora.tracking.version_files import register_folder, version_place

TRIES = 3  # judgements, where somebody else moves the alias meanwhile


@dataclass(frozen=True)
class Case:
    """A candidate before the gate.

    Attributes:
        judged: hash of the evaluation that it is judged by.
    """

    config: PromoteConfig
    profile: str
    checkpoint: Path
    stage: str
    evaluate: Path
    root: Path
    candidate: Candidate
    judged: str

    @property
    def model(self) -> str:
        """Name in the registry."""
        return model_name(self.profile)


def run(config: PromoteConfig, profile: str, evaluate: Path, train: Path, root: Path, output: Path) -> Report:
    """Judge the newest checkpoint of `train` by what `evaluate` measured; register and promote it if it passes.

    Leaves gate.json and gate.md in `output`. A refusal is a result, not an error; it stands as long as every check
    ends as it did. A promotion that was cut off is finished by the next one: a version is registered once, and the
    alias moves last.

    Args:
        evaluate, train: folders of the evaluation and of the last stage.
        root: folder of all results.

    Raises:
        StepError: there is nothing to judge by, or the version's files cannot be kept.
        RegistryError: the registry does not answer.
    """
    case = open_case(config, profile, evaluate, train, root)
    folder = StepFolder(output, _key(case))
    if folder.is_done() and _still_stands(output, case):
        return read_report(output)
    work = folder.open()
    with (
        folder_lock(root) as lock,
        Tracker.start(root, profile, "promote", {"promote": config.model_dump()}, {}, work, beside=False) as tracker,
    ):
        verdict = _promote(case, lock)
        write_json(work / "gate.json", verdict)
        (work / "gate.md").write_text(describe(verdict))
        tracker.log_metrics({_name(check): float(check["passed"]) for check in verdict["checks"]})
        for name in ("gate.json", "gate.md"):
            tracker.log_artifact(work / name)
    passed = sum(check["passed"] for check in verdict["checks"])
    return folder.finish(Report("promote", total=len(verdict["checks"]), kept=passed))


def preview(config: PromoteConfig, profile: str, evaluate: Path, train: Path, root: Path) -> dict:
    """The verdict of a dry run: nothing is registered, moved or written."""
    verdict, _ = decide(open_case(config, profile, evaluate, train, root))
    return verdict | {"dry_run": True}


def open_case(config: PromoteConfig, profile: str, evaluate: Path, train: Path, root: Path) -> Case:
    """Gather what the gate judges of the candidate; raises StepError, CheckpointError or RegistryError."""
    checkpoint, info = find_candidate(train)
    judged = hash_evaluation(evaluate)  # before it is read: what is kept later must be what is read now
    candidate = read_candidate(checkpoint, info, evaluate, profile)
    return Case(config, profile, checkpoint, info["stage"], evaluate, root, candidate, judged)


def decide(case: Case) -> tuple[dict, Champion | None]:
    """The gate's verdict on the candidate, and the champion beside which it was judged."""
    known = version_of(case.root, case.model, case.candidate.sha256)
    candidate = case.candidate
    if known:
        candidate = replace(candidate, rolled_back=why_rolled_back(known), registered_models=registered_models(known))
    before = read_champion(case.root, case.model, case.evaluate, candidate.evaluation, case.stage)
    checks = judge(case.config, candidate, before)
    verdict = {
        "verdict": "promoted" if all(check.passed for check in checks) else "rejected",
        "model": case.model,
        "version": None,
        "alias": None,
        "champion": before.version if before and before.has_alias else None,
        "checkpoint": str(case.checkpoint),
        "sha256": case.candidate.sha256,
        "checks": [asdict(check) for check in checks],
        "notes": [],
    }
    return verdict, before


def _key(case: Case) -> str:
    """Of all that decides but the registry, and not of the code: a commit alone is no reason to judge again."""
    candidate, beside = case.candidate, case.evaluate / BESIDE
    return fingerprint(
        case.config.model_dump(),
        candidate.evaluation,
        beside.read_text() if beside.is_file() else "",
        (candidate.sha256, candidate.artifact_problem, candidate.models_sha256, candidate.sample_problem),
    )


def _still_stands(output: Path, case: Case) -> bool:
    """Whether the alias is where a finished promotion left it, and the files are whole; of a refusal, whether all
    checks would end as they did."""
    try:
        verdict = json.loads((output / "gate.json").read_text())
    except (OSError, ValueError):  # lost, or damaged: judged anew
        return False
    if verdict["version"]:
        now = champion(case.root, case.model)
        return now is not None and now.version == verdict["version"] and not damage_of(case.root, case.model, now)
    again, _ = decide(case)
    names = ("verdict", "champion", "checks")
    return [json.loads(json.dumps(again[name])) for name in names] == [verdict[name] for name in names]


def _promote(case: Case, lock: str) -> dict:
    notes: list[str] = []
    for _ in range(TRIES):
        verdict, before = decide(case)
        verdict["notes"] = notes
        if verdict["verdict"] != "promoted":
            return verdict
        try:
            return verdict | {"version": _make_champion(case, before, lock), "alias": CHAMPION}
        except ChampionMoved as moved:
            notes.append(f"{moved}; judged again")
    raise StepError(f"{'; '.join(notes)}; find out who moves it, and start the same command again")


def _make_champion(case: Case, before: Champion | None, lock: str) -> str:
    """Keep the files, register the version, move the alias: each once, however often it is tried.

    The registry's lock is taken after the upload, which may take an hour and harms nobody: until then the version has
    no alias, and a later try adopts it.

    Raises:
        ChampionMoved: the candidate was not judged beside the version that carries the alias now.
    """
    root, model = case.root, case.model
    expected = before.version if before and before.has_alias else None
    if before and before.sha256 == case.candidate.sha256 and not before.lost:
        check_champion(root, model, expected)
        return before.version
    place = version_place(root, model, case.candidate.sha256)
    served, evaluation = keep(place, case.checkpoint, case.evaluate, case.judged)
    tags = _version_tags(case, served, evaluation)
    if version_of(root, model, case.candidate.sha256) is None:
        check_champion(root, model, expected)  # before hours of an upload for nothing
        register_folder(root, case.profile, model, served, tags)
    with registry_lock(root, model, lock) as check_lock:
        check_champion(root, model, expected)
        version = adopt(root, model, tags | {PREVIOUS: before.version if before else "none"})
        if version is None:
            raise RegistryError(f"somebody deleted the candidate's version of {model}; nothing was moved, start again")
        check_lock()
        move_champion(root, model, version, expected)
    return version


def _version_tags(case: Case, served: Path, evaluation: Path) -> dict[str, str]:
    from opensora.served_model import checkpoint_of

    metrics = case.candidate.evaluation.metrics
    return dict(case.candidate.tags) | {
        CHECKPOINT_URI: str(checkpoint_of(served).resolve()),
        EVALUATION_URI: str(evaluation.resolve()),
        EVALUATION_FILES: hash_evaluation(evaluation),
        METRICS_TAG: json.dumps({name: value for name, value in metrics.items() if not isinstance(value, dict | list)}),
    }


def _name(check: Mapping[str, object]) -> str:
    """Of a check among the run's metrics."""
    return ".".join(str(part) for part in ("gate", check["kind"], check["metric"]) if part)
