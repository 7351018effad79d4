"""Run one step inside a component: small manifests in, the step of `opensora`, a small manifest out.

Bulk data stays in `workdir`, a folder that all components see. What travels between them is where it lies, under which
data revision, and the fingerprint of what made it.
"""

import json
import math
import os
import sys
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

if TYPE_CHECKING:
    from opensora.config import Config
    from opensora.step import Report

PARAMS = "OPENSORA_PARAMS"  # environment: where params.yaml lies, for commands too; images hold it beside the code


@dataclass(frozen=True)
class Job:
    """What the components of a run are all told."""

    profile: str
    overrides: list[str]  # as `--set` takes them
    workdir: str  # the folder that all of them see
    data_revision: str  # as DVC or the pipeline's caller names the data
    code_revision: str  # commit that the images were made of

    def load(self, *changes: str) -> "Config":
        """The resolved profile, with the overrides and then `changes`."""
        from opensora.config import load_config

        return load_config(params_file(), self.profile, (*self.overrides, *changes))

    def folder(self, step: str) -> Path:
        """Where a finished step lies."""
        return Path(self.workdir) / self.profile / step


def params_file() -> Path:
    """The params.yaml that belongs to this code."""
    return Path(os.environ.get(PARAMS) or Path(__file__).resolve().parents[1] / "params.yaml")


@contextmanager
def reason_last() -> Iterator[None]:
    """What ends the component is the last line of its log; behind a traceback where no user can mend it."""
    from opensora.config import UserError
    from opensora.step import UNWRITABLE

    try:
        yield
    except UserError as error:
        fail(str(error), error.exit_code)
    except OSError as error:
        if error.errno not in UNWRITABLE:
            traceback.print_exc()
        fail(UNWRITABLE.get(error.errno or 0) or f"{type(error).__name__}: {error}")
    except Exception as error:
        traceback.print_exc()
        fail(f"{type(error).__name__}: {' '.join(str(error).split())}")


def run(step: str, inputs: Sequence[Any], manifest: Any, job: Job) -> "Report":
    """Run the step and describe its result in the artifact `manifest`; a failure ends the process with its reason.

    Args:
        inputs: artifacts of the steps before; each is checked against what lies in the workdir.
    """
    from opensora.chain import chain_steps, run_step
    from opensora.step import Report

    with reason_last():
        for artifact in inputs:
            check(artifact)
        config = job.load()
        if step not in chain_steps(config):  # the embedded world's steps, for videos of one's own
            print(f"{step} is not part of profile {job.profile}: nothing to do")
            return describe(manifest, step, job, Report(step), there=False)
        report = run_step(step, config, Path(job.workdir))
        print(f"{step}: {report.kept} of {report.total} kept in {report.seconds:.1f} s")
        return describe(manifest, step, job, report)


def run_share(step: str, inputs: Sequence[Any], share: str, job: Job) -> None:
    """Work on every n-th shard of a step alone, as in share "3/8"; the step itself finds them done and finishes."""
    from opensora.chain import run_step
    from opensora.step import ShareDone

    with reason_last():
        for artifact in inputs:
            check(artifact)
        try:
            run_step(step, job.load(f"executor.share={share}"), Path(job.workdir))
        except ShareDone as done:
            print(f"{step}: {done}")


def version_step(artifact: Any, remote: str) -> str:
    """Push what an artifact names to a DVC remote; returns its revision, or its fingerprint without a remote."""
    from components.versions import push

    with reason_last():
        value = check(artifact)
        return push(Path(value["uri"]), remote) if remote else value["fingerprint"]


def restore_step(step: str, manifest: Any, job: Job, remote: str) -> str:
    """Fetch a step by the job's data revision, or find it in the workdir without a remote; returns its revision."""
    from components.versions import pull

    with reason_last():
        if remote:
            pull(job.folder(step), job.data_revision, remote)
        return find_step(step, manifest, job)


def find_step(step: str, artifact: Any, job: Job) -> str:
    """Describe a step that an earlier run finished; returns the data's revision, or the step's fingerprint."""
    from opensora.step import read_report

    with reason_last():
        describe(artifact, step, job, read_report(job.folder(step)))
        return job.data_revision or json.loads(Path(artifact.path).read_text())["fingerprint"]


def describe(artifact: Any, step: str, job: Job, report: "Report", there: bool = True) -> "Report":
    """Write what an artifact says of a finished step, or of one that left nothing."""
    from opensora.step import FINGERPRINT

    folder = job.folder(step)
    value = {
        "step": step,
        "uri": str(folder) if there else "",
        "data_revision": job.data_revision,
        "code_revision": job.code_revision,
        "fingerprint": json.loads((folder / FINGERPRINT).read_text()) if there else "",
        "report": asdict(report),
    }
    path = Path(artifact.path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, indent=2, sort_keys=True))
    names = ("uri", "data_revision", "code_revision")
    artifact.metadata.update({"kept": report.kept, "total": report.total} | {name: value[name] for name in names})
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
    with suppress(OSError):  # nobody reads the log any more
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


def track(uri: str, job: Job) -> None:
    """Let the steps of this process log to that MLflow server, and tag what they log with the two revisions.

    Args:
        uri: empty keeps the store below the workdir.
    """
    os.environ.update(tracking(uri, job))


def tracking(uri: str, job: Job) -> dict[str, str]:
    """The environment by which `opensora.tracking` knows where to log to, and of what data and code a run is."""
    values = {
        "OPENSORA_DATA_REVISION": job.data_revision,
        "OPENSORA_REVISION": job.code_revision,
        "MLFLOW_TRACKING_URI": uri,
    }
    return {name: value for name, value in values.items() if value}
