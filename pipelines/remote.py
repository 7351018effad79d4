"""Submit, look at and cancel runs on a Kubeflow Pipelines server."""

import io
import json
import os
import subprocess
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Any

from pipelines.compile import PipelineError

ROOT = Path(__file__).resolve().parents[1]
SERVICE_ACCOUNT = "default-editor"  # of KFP in multi-user mode; its newer releases refuse others unless told
HEALTH = "/apis/v2beta1/healthz"
WHERE = (
    "give --host or KFP_HOST, as http://localhost:8888 behind `kubectl -n kubeflow port-forward svc/ml-pipeline 8888`"
)


def client(host: str, namespace: str) -> Any:
    """KFP's client, with the token of KFP_TOKEN or of the file that KFP_TOKEN_FILE names.

    Raises:
        PipelineError: the server cannot be reached or refuses the token.
    """
    import kfp

    token = _token()
    _greet(host.rstrip("/"), token)  # KFP's own greeting tries for half a minute, with a traceback each time
    with warnings.catch_warnings(), _api(host):
        warnings.simplefilter("ignore", FutureWarning)  # that it needs a server of version 2
        return kfp.Client(host=host, namespace=namespace, existing_token=token or None)


def _token() -> str:
    token, name = os.environ.get("KFP_TOKEN", ""), os.environ.get("KFP_TOKEN_FILE", "")
    if token or not name:
        return token
    try:
        return Path(name).read_text().strip()
    except OSError as error:
        raise PipelineError(f"KFP_TOKEN_FILE names {name}, which cannot be read: {error.strerror}") from None


def _greet(host: str, token: str) -> None:
    import requests

    headers = {"Authorization": f"Bearer {token}"} if token else {}
    try:
        answer = requests.get(host + HEALTH, headers=headers, timeout=20, allow_redirects=False)
    except (requests.RequestException, ValueError) as error:
        raise PipelineError(f"no Kubeflow Pipelines API at {host} ({type(error).__name__}); {WHERE}") from error
    if answer.status_code in (301, 302, 401, 403):  # a sign-in page redirects
        what = "refuses the token of KFP_TOKEN or KFP_TOKEN_FILE" if token else "wants a token: set KFP_TOKEN"
        raise PipelineError(f"Kubeflow Pipelines at {host} {what} (HTTP {answer.status_code})")
    if answer.status_code != 200 or "json" not in answer.headers.get("Content-Type", ""):
        raise PipelineError(f"{host} is no Kubeflow Pipelines API (HTTP {answer.status_code}); {WHERE}")


@contextmanager
def _api(host: str) -> Iterator[None]:
    """A refusal of the server, or its absence, as one line; what KFP's client prints is left out."""
    from kfp_server_api import ApiException
    from urllib3.exceptions import HTTPError

    try:
        with redirect_stdout(io.StringIO()):
            yield
    except ApiException as error:
        try:
            said = json.loads(error.body)["message"]
        except (TypeError, ValueError, KeyError):
            said = error.reason
        raise PipelineError(f"Kubeflow Pipelines at {host} says: {said} (HTTP {error.status})") from error
    except HTTPError as error:
        raise PipelineError(f"the connection to {host} was lost ({type(error).__name__}); try again") from error


def revision(allow_dirty: bool) -> str:
    """The commit of this checkout.

    Raises:
        PipelineError: files differ from it, and nobody allowed that: the run could not be repeated.
    """

    def git(*arguments: str) -> str:
        done = subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, text=True, check=False)
        if done.returncode:
            raise PipelineError(f"git {arguments[0]} failed in {ROOT}: {done.stderr.strip()}")
        return done.stdout.rstrip()

    commit, changed = git("rev-parse", "HEAD"), git("status", "--porcelain")
    if changed and not allow_dirty:
        names = ", ".join(line[3:] for line in changed.splitlines()[:3])
        raise PipelineError(
            f"the working tree differs from commit {commit[:9]} ({names}); commit, or give --allow-dirty"
        )
    return commit + ("-dirty" if changed else "")


def submit(host: str, namespace: str, compiled: Path, parameters: Mapping[str, Any], experiment: str, name: str) -> str:
    """Start a run of that name; returns its id."""
    made = client(host, namespace)
    with _api(host):
        run = made.create_run_from_pipeline_package(
            str(compiled),
            arguments=dict(parameters),
            run_name=name,
            experiment_name=experiment,
            namespace=namespace,
            service_account=SERVICE_ACCOUNT,
        )
    return run.run_id


def url(page: str, run_id: str) -> str:
    """Where the run is shown."""
    return f"{page.rstrip('/')}/#/runs/details/{run_id}"


def status(host: str, namespace: str, run_id: str) -> str:
    """State of a run and of its tasks, a line each, in the order in which they began; what failed says why."""
    made = client(host, namespace)
    with _api(host):
        run = made.get_run(run_id)
    tasks = [task for task in (run.run_details and run.run_details.task_details) or [] if task.state]
    tasks.sort(key=lambda task: str(task.start_time or task.create_time or ""))
    return "\n".join([_line(run), *(f"  {_line(task)}" for task in tasks)])


def _line(run_or_task: Any) -> str:
    error = run_or_task.error.message if run_or_task.error else ""
    return f"{run_or_task.display_name}: {run_or_task.state}" + (f": {' '.join(error.split())}" if error else "")


ENDED = ("SUCCEEDED", "FAILED", "CANCELED", "SKIPPED")  # states of a run


def cancel(host: str, namespace: str, run_id: str, ending_s: float = 60) -> str:
    """End a run, then delete the TrainJobs that carry its id: not every launcher lives long enough to do that itself.

    Args:
        ending_s: how long to wait for the run's end, until which a launcher may still make a job.

    Returns:
        What became of the run and of the TrainJobs, a line each.

    Raises:
        PipelineError: the run cannot be ended, or there is a cluster which refuses that jobs are deleted.
    """
    made = client(host, namespace)
    with _api(host):
        if (state := made.get_run(run_id).state) not in ENDED:
            made.terminate_run(run_id)
    line = f"run {run_id} " + (f"has ended ({state})" if state in ENDED else "is being ended")

    def wait() -> None:
        until = time.monotonic() + ending_s
        with _api(host):
            while made.get_run(run_id).state not in ENDED and time.monotonic() < until:
                time.sleep(2)

    return f"{line}\n{_delete_jobs(line, namespace, run_id, wait)}"


def _delete_jobs(line: str, namespace: str, run_id: str, wait: Callable[[], None]) -> str:
    """Delete the TrainJobs of a run before and after `wait`, which lasts until no launcher makes any more."""
    from kubernetes.config import ConfigException

    from components.cluster import RUN, Cluster, JobError

    by_hand = f"kubectl -n {namespace} delete trainjobs -l {RUN}={run_id}"
    try:
        cluster = Cluster(namespace, patience_s=10)
    except ConfigException as error:
        return f"no cluster to delete TrainJobs in ({error}); its launchers do that, and to be sure of it: {by_hand}"
    try:
        deleted = cluster.delete_run(run_id)
        wait()
        deleted += cluster.delete_run(run_id)
    except JobError as error:
        raise PipelineError(f"{line}, but {error}; by hand: {by_hand}") from error
    names = ", ".join(dict.fromkeys(deleted)) or "none was left"
    return f"TrainJobs deleted at {cluster.address}, namespace {namespace}: {names}"
