"""Submit, look at and cancel runs on a Kubeflow Pipelines server."""

import os
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pipelines.compile import PipelineError

SERVICE_ACCOUNT = "pipeline-runner"


def client(host: str, namespace: str) -> Any:
    """KFP's client, with the token of KFP_TOKEN or of the file that KFP_TOKEN_FILE names.

    Raises:
        PipelineError: the server cannot be reached or refuses the token.
    """
    import kfp

    token = os.environ.get("KFP_TOKEN", "")
    if not token and (name := os.environ.get("KFP_TOKEN_FILE")):
        try:
            token = Path(name).read_text().strip()
        except OSError as error:
            raise PipelineError(f"KFP_TOKEN_FILE names {name}, which cannot be read: {error.strerror}") from None
    try:
        made = kfp.Client(host=host, namespace=namespace, existing_token=token or None)
        made.get_kfp_healthz()
        return made
    except Exception as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise PipelineError(
            f"no Kubeflow Pipelines API at {host}: {reason}; give --host or KFP_HOST, as "
            "http://localhost:8888 behind `kubectl port-forward -n kubeflow svc/ml-pipeline 8888`, and KFP_TOKEN"
        ) from error


def revision(allow_dirty: bool) -> str:
    """The commit of this checkout.

    Raises:
        PipelineError: files differ from it, and nobody allowed that: the run could not be repeated.
    """
    root = Path(__file__).resolve().parents[1]

    def git(*arguments: str) -> str:
        done = subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, text=True, check=False)
        if done.returncode:
            raise PipelineError(f"git {arguments[0]} failed in {root}: {done.stderr.strip()}")
        return done.stdout.strip()

    commit, changed = git("rev-parse", "HEAD"), git("status", "--porcelain")
    if changed and not allow_dirty:
        names = ", ".join(line[3:] for line in changed.splitlines()[:3])
        raise PipelineError(
            f"the working tree differs from commit {commit[:9]} ({names}); commit, or give --allow-dirty"
        )
    return commit + ("-dirty" if changed else "")


def submit(kfp_client: Any, compiled: Path, parameters: Mapping[str, Any], experiment: str, namespace: str) -> str:
    """Start a run; returns its id."""
    run = kfp_client.create_run_from_pipeline_package(
        str(compiled),
        arguments=dict(parameters),
        experiment_name=experiment,
        namespace=namespace,
        service_account=SERVICE_ACCOUNT,
    )
    return run.run_id


def url(host: str, run_id: str) -> str:
    """Where the run is shown."""
    return f"{host.rstrip('/')}/#/runs/details/{run_id}"


def status(kfp_client: Any, run_id: str) -> str:
    """State of a run and of its tasks, a line each."""
    run = kfp_client.get_run(run_id)
    lines = [f"{run.display_name}: {run.state}"]
    for task in (run.run_details.task_details if run.run_details else None) or []:
        if task.display_name and task.state:
            error = f"  {task.error.message}" if task.error else ""
            lines.append(f"  {task.display_name}: {task.state}{error}")
    return "\n".join(lines)


def cancel(kfp_client: Any, run_id: str) -> None:
    """End a run; its launchers delete their TrainJobs, and a job left over goes with its launcher's pod."""
    kfp_client.terminate_run(run_id)
