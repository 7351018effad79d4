"""Run one step inside a component: small manifests in, the step of `opensora`, a small manifest out.

Bulk data stays in `workdir`, a folder that all components see. What travels between them is where it lies, under which
data revision, and the fingerprint of what made it.
"""

import json
import math
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

if TYPE_CHECKING:
    from opensora.config import Config
    from opensora.step import Report

PARAMS = "OPENSORA_PARAMS"  # environment: where params.yaml lies; images hold it beside the code


def load(profile: str, overrides: Sequence[str]) -> "Config":
    """The resolved profile of the params.yaml that belongs to this code."""
    from opensora.config import load_config

    path = Path(os.environ.get(PARAMS) or Path(__file__).resolve().parents[1] / "params.yaml")
    return load_config(path, profile, tuple(overrides))


def run(
    step: str,
    inputs: Sequence[Any],
    manifest: Any,
    *,
    profile: str,
    overrides: Sequence[str],
    workdir: str,
    revision: str,
) -> "Report":
    """Run the step and describe its result in the artifact `manifest`; a user's error ends the process with its reason.

    Args:
        inputs: artifacts of the steps before; each is checked against what lies in `workdir`.
        revision: of the data, as DVC or the pipeline's caller names it; it travels on.
    """
    from opensora.chain import chain_steps, run_step
    from opensora.config import UserError
    from opensora.step import Report

    try:
        for artifact in inputs:
            check(artifact)
        config = load(profile, overrides)
        if step not in chain_steps(config):  # the embedded world's steps, for videos of one's own
            print(f"{step} is not part of profile {profile}: nothing to do")
            return describe(manifest, step, None, revision, Report(step))
        report = run_step(step, config, Path(workdir))
    except UserError as error:
        fail(str(error), error.exit_code)
    print(f"{step}: {report.kept} of {report.total} kept in {report.seconds:.1f} s")
    return describe(manifest, step, Path(workdir) / config.profile / step, revision, report)


def run_share(
    step: str, inputs: Sequence[Any], share: str, *, profile: str, overrides: Sequence[str], workdir: str
) -> None:
    """Work on every n-th shard of a step alone, as in share "3/8"; the step itself finds them done and finishes."""
    from opensora.chain import run_step
    from opensora.config import UserError
    from opensora.step import ShareDone

    try:
        for artifact in inputs:
            check(artifact)
        run_step(step, load(profile, [*overrides, f"executor.share={share}"]), Path(workdir))
    except ShareDone as done:
        print(f"{step}: {done}")
    except UserError as error:
        fail(str(error), error.exit_code)


def version_step(artifact: Any, remote: str) -> str:
    """Push what an artifact names to a DVC remote; returns its revision, or its fingerprint without a remote."""
    from components.versions import push
    from opensora.config import UserError

    try:
        value = check(artifact)
        return push(Path(value["uri"]), remote) if remote else value["fingerprint"]
    except UserError as error:
        fail(str(error), error.exit_code)


def restore_step(step: str, manifest: Any, *, revision: str, remote: str, profile: str, workdir: str) -> None:
    """Fetch a finished step by its DVC revision and describe it in the artifact `manifest`."""
    from components.versions import pull
    from opensora.config import UserError
    from opensora.step import read_report

    folder = Path(workdir) / profile / step
    try:
        pull(folder, revision, remote)
        describe(manifest, step, folder, revision, read_report(folder))
    except UserError as error:
        fail(str(error), error.exit_code)


def describe(artifact: Any, step: str, folder: Path | None, revision: str, report: "Report") -> "Report":
    """Write what an artifact says of a finished step, or of one that left nothing."""
    from opensora.step import FINGERPRINT

    value = {
        "step": step,
        "uri": str(folder or ""),
        "revision": revision,
        "fingerprint": json.loads((folder / FINGERPRINT).read_text()) if folder else "",
        "report": asdict(report),
    }
    path = Path(artifact.path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, indent=2, sort_keys=True))
    artifact.metadata.update({"kept": report.kept, "total": report.total, "revision": revision, "folder": value["uri"]})
    return report


def check(artifact: Any) -> dict[str, Any]:
    """What an artifact says, if that is still what lies there.

    Raises:
        StepError: the folder is gone, or another run has replaced it.
    """
    from opensora.step import FINGERPRINT, StepError

    value = json.loads(Path(artifact.path).read_text())
    if not value["uri"]:
        return value
    mark = Path(value["uri"]) / FINGERPRINT
    if not mark.is_file():
        raise StepError(f"{value['uri']}, which step {value['step']} left, is gone; run the pipeline without its cache")
    if json.loads(mark.read_text()) != value["fingerprint"]:
        raise StepError(
            f"{value['uri']} was replaced by another run since step {value['step']} of this one; "
            "give each run a workdir of its own, or run again"
        )
    return value


def fail(message: str, code: int = 1) -> NoReturn:
    """End the component; the reason is the last line of its log."""
    sys.stdout.flush()
    print(f"error: {message}", file=sys.stderr, flush=True)
    sys.exit(code)


def log_metrics(artifact: Any, values: Mapping[str, float]) -> None:
    """Final numbers into a Metrics artifact, which takes neither NaN nor infinity."""
    finite = {name: value for name, value in values.items() if math.isfinite(value)}
    for name, value in finite.items():
        artifact.log_metric(name, value)
    # A task with such an output is cached only if there is a file.
    path = Path(artifact.path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(finite))


def track(uri: str, revision: str) -> None:
    """Let the steps of this process log to that MLflow server, and tag what they log with the data's revision.

    Args:
        uri: empty keeps the store below the workdir.
    """
    os.environ["OPENSORA_DATA_REVISION"] = revision
    if uri:
        os.environ["MLFLOW_TRACKING_URI"] = uri
