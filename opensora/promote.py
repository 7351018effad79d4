"""The step `promote`: the gate. Thresholds and the champion decide; every reason is written."""

import fcntl
import json
import math
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from opensora.config import Gate, PromoteConfig
from opensora.step import Report, StepError, StepFolder, fingerprint, read_report, write_json
from opensora.tracking.lineage import lineage
from opensora.tracking.registry import CHAMPION, champion, register, set_champion
from opensora.tracking.tracker import Tracker
from opensora.training.checkpoint import newest_checkpoint, read_info

COMPARABLE = ("fd_extractor", "samples_per_stage")  # metrics of another extractor or N are not compared


@dataclass(frozen=True)
class Check:
    """One condition and what became of it."""

    metric: str
    passed: bool
    reason: str
    value: float | None = None
    floor: float | None = None
    champion: float | None = None
    tolerance: float | None = None


def run(config: PromoteConfig, profile: str, evaluate: Path, train: Path, root: Path, output: Path) -> Report:
    """Judge the newest checkpoint of `train` by `evaluate/metrics.json`; register and promote it if it passes.

    Leaves gate.json and gate.md in `output`. A refusal is a result, not an error.

    Raises:
        StepError: there are no metrics to judge by.
    """
    checkpoint = newest_checkpoint(train / "checkpoints")
    info = read_info(checkpoint)
    try:
        metrics = json.loads((evaluate / "metrics.json").read_text())
    except FileNotFoundError:
        raise StepError(f"no {evaluate / 'metrics.json'}; run `opensora evaluate` first") from None
    folder = StepFolder(output, fingerprint(config.model_dump(), metrics, info["sha256"]))
    if folder.is_done():
        return read_report(output)
    work = folder.open()
    model = f"opensora-{profile}"
    with _alone(root), Tracker.start(root, profile, "promote", {"promote": config.model_dump()}, {}, work) as tracker:
        verdict = _decide(config, model, metrics, checkpoint, info, root)
        write_json(work / "gate.json", verdict)
        (work / "gate.md").write_text(describe(verdict))
        tracker.log_metrics({f"gate.{check['metric']}": float(check["passed"]) for check in verdict["checks"]})
        for name in ("gate.json", "gate.md"):
            tracker.log_artifact(work / name)
    passed = sum(check["passed"] for check in verdict["checks"])
    return folder.finish(Report("promote", total=len(verdict["checks"]), kept=passed))


@contextmanager
def _alone(root: Path) -> Iterator[None]:
    """One promotion at a time: moving an alias is no compare-and-swap."""
    with (root / ".promote.lock").open("w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def _decide(config: PromoteConfig, model: str, metrics: dict, checkpoint: Path, info: dict, root: Path) -> dict:
    before = champion(root, model)
    before_metrics = json.loads(before.tags["metrics"]) if before else None
    checks = judge(config.gates, metrics, before_metrics)
    passed = all(check.passed for check in checks)
    verdict = {
        "verdict": "promoted" if passed else "rejected",
        "model": model,
        "version": None,
        "alias": None,
        "champion": before.version if before else None,
        "checkpoint": str(checkpoint),
        "sha256": info["sha256"],
        "checks": [asdict(check) for check in checks],
    }
    if not passed:
        return verdict
    if before and before.tags.get("checkpoint.sha256") == info["sha256"]:
        return verdict | {"version": before.version, "alias": CHAMPION, "note": "it is the champion already"}
    copy = _keep(root / "registry" / model / info["sha256"][:12], checkpoint, info)
    tags = lineage() | {
        "checkpoint.uri": str(copy.resolve()),
        "checkpoint.sha256": info["sha256"],
        "stage": info["stage"],
        "metrics": json.dumps({name: value for name, value in metrics.items() if not isinstance(value, dict)}),
        "previous_champion": str(before.version) if before else "none",
    }
    version = register(root, model, copy, {name: value[:4900] for name, value in tags.items()})
    set_champion(root, model, version)
    return verdict | {"version": version, "alias": CHAMPION}


def _keep(place: Path, checkpoint: Path, info: dict) -> Path:
    """Copy what the version needs out of the chain's folders, which the next run replaces."""
    target = place / checkpoint.name
    if target.is_dir():
        return target
    part = place.with_name(place.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    shutil.copytree(checkpoint, part / checkpoint.name)
    for name in ("vae", "text_encoder"):
        if not Path(info[name]).is_absolute():
            source = next(
                parent / info[name] for parent in checkpoint.resolve().parents if (parent / info[name]).is_dir()
            )
            shutil.copytree(source, part / info[name], dirs_exist_ok=True)
    part.rename(place)
    return target


def judge(gates: Sequence[Gate], metrics: dict, before: dict | None) -> list[Check]:
    """One check a gate, against its floor and, within its tolerance, against the champion's metrics."""
    checks = [_judge_one(gate, metrics.get(gate.metric), before) for gate in gates]
    for name in COMPARABLE if before is not None else ():
        old = (before or {}).get(name)
        if metrics.get(name) != old:
            reason = f"{name} is {metrics.get(name)}, the champion's is {old}: not comparable"
            checks.append(Check(name, False, reason))
    if not gates:
        checks.append(Check("gates", False, "promote.gates is empty: nothing says what is good enough"))
    return checks


def _judge_one(gate: Gate, value: object, before: dict | None) -> Check:
    if not isinstance(value, int | float) or not math.isfinite(value):
        what = "missing" if value is None else f"{value}"
        return Check(gate.metric, False, f"{gate.metric} is {what}, a number was expected", floor=gate.floor)
    sign = 1 if gate.direction == "higher" else -1
    reasons, passed = [], True
    if gate.floor is not None:
        good = sign * (value - gate.floor) >= 0
        passed &= good
        order = ("≥" if sign > 0 else "≤") if good else ("<" if sign > 0 else ">")
        reasons.append(f"{gate.metric} {value:.4g} {order} {gate.floor:g}")
    old = before.get(gate.metric) if before else None
    if gate.tolerance is None:
        reasons.append("not compared with a champion")
    elif before is None:
        reasons.append("no champion yet: the floor alone decides")
    elif not isinstance(old, int | float):
        passed = False
        reasons.append(f"the champion has no {gate.metric}")
    else:
        good = sign * (value - old) >= -gate.tolerance
        passed &= good
        verb = "is within" if good else "is worse by more than"
        reasons.append(f"{value:.4g} {verb} {gate.tolerance:g} of the champion's {old:.4g}")
    number = float(old) if isinstance(old, int | float) else None
    return Check(gate.metric, passed, "; ".join(reasons), float(value), gate.floor, number, gate.tolerance)


def describe(verdict: dict) -> str:
    """The verdict as Markdown."""
    lines = [f"# {verdict['model']}: {verdict['verdict']}", ""]
    if verdict["version"]:
        lines += [f"Version {verdict['version']} carries the alias `{verdict['alias']}`.", ""]
    lines += ["| check | | reason |", "|---|---|---|"]
    lines += [f"| {c['metric']} | {'passed' if c['passed'] else 'failed'} | {c['reason']} |" for c in verdict["checks"]]
    return "\n".join([*lines, "", f"Checkpoint `{verdict['checkpoint']}`, sha256 `{verdict['sha256']}`.", ""])
