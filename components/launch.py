"""Launch a training stage: as a TrainJob where there is a cluster, else in processes on this machine."""

import hashlib
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from components.step import (
    PARAMS,
    Job,
    check,
    describe,
    fail,
    log_metrics,
    on_cluster,
    params_file,
    reason_last,
    track,
    tracking,
)

if TYPE_CHECKING:
    from opensora.config import Config
    from opensora.step import Report

NAMESPACE_FILE = Path("/var/run/secrets/kubernetes.io/serviceaccount/namespace")
POLL_S, STUCK_S = 10.0, 600.0  # between two looks at a job; pods may wait so long for what does not come
POD = ("POD_NAME", "POD_UID")  # environment: the launcher's own, which the pipeline sets from its fields


@dataclass(frozen=True)
class Launch:
    """What the launchers of all stages are told beside the job."""

    image: str  # of the training pods; empty trains on this machine
    tracking_uri: str
    budget_dollars: float  # of the stage, as `opensora plan` counts it; 0: no limit
    run_id: str  # of the pipeline's run: by it a retry and `opensora pipeline cancel` find the TrainJob


def launch(stage: str, inputs: Sequence[Any], job: Job, how: Launch, checkpoint: Any, metrics: Any) -> None:
    """Train the stage to its end and describe it in the artifacts; a failure ends the process with its reason."""
    from opensora.step import read_report

    track(how.tracking_uri, job)
    with reason_last():
        for artifact in inputs:
            check(artifact)
        config = job.load()
        if finished_stage(config, stage, job):
            print(f"{stage} is finished with these values: nothing to train")
        else:
            paid_s = check_budget(config, stage, how.budget_dollars)
            if how.image and on_cluster():
                _on_cluster(config, stage, job, how, paid_s)
            else:
                _on_this_machine(config, stage, job)
        report = describe(checkpoint, stage, job, read_report(job.folder(stage)))
        log_metrics(metrics, report.metrics)


def finished_stage(config: "Config", stage: str, job: Job) -> "Report | None":
    """The report of the stage if an earlier run left it: nobody waits in a queue for GPUs to find that out."""
    from opensora.chain import training_source
    from opensora.training.stages import finished, stage_before

    base, before = Path(job.workdir) / config.profile, stage_before(stage)
    source = training_source(config, stage, base)
    return finished(config, stage, source, base / before if before else None, base / stage)


def check_budget(config: "Config", stage: str, dollars: float) -> int | None:
    """Seconds that the budget pays for; None without one.

    Raises:
        ConfigError: the stage is planned to cost more, or nobody can tell what it costs.
    """
    if not dollars:
        return None
    from opensora.config import ConfigError
    from opensora.gpus import known_gpu
    from opensora.plan import plan_stage

    if not config.hardware.gpu:
        raise ConfigError(
            "a budget needs hardware.gpu, the kind of GPU, to tell what a stage costs; or budget_dollars=0"
        )
    gpu = known_gpu(config.hardware.gpu)
    cost = plan_stage(config, stage, gpu).dollars
    if cost is not None and cost > dollars:
        raise ConfigError(
            f"{stage} of profile {config.profile} is planned to cost ${cost:,.0f}, more than the budget of "
            f"${dollars:,.0f}; raise the budget, or lower the stage's steps (`opensora plan` shows what costs)"
        )
    an_hour = getattr(config, stage).processes * (config.hardware.dollars_per_gpu_hour or gpu.dollars_per_hour)
    return max(1, int(dollars / an_hour * 3600))


def arguments(stage: str, job: Job) -> list[str]:
    """Of `opensora.launch`, on this machine as in a pod."""
    changes = [part for text in job.overrides for part in ("--set", text)]
    return [stage, "--profile", job.profile, "--workdir", job.workdir, *changes]


def _on_cluster(config: "Config", stage: str, job: Job, how: Launch, paid_s: int | None) -> None:
    from components.cluster import Cluster, JobError
    from components.trainjob import TrainJob, run

    train = getattr(config, stage)
    gpus = min(train.processes, config.hardware.gpus_per_node)
    key = hashlib.sha256(f"{how.run_id} {stage}".encode()).hexdigest()[:8]
    owner = {"name": os.environ[POD[0]], "uid": os.environ[POD[1]]} if all(name in os.environ for name in POD) else None
    wanted = TrainJob(
        name=f"{stage.replace('_', '-')}-{key}",
        namespace=NAMESPACE_FILE.read_text().strip() if NAMESPACE_FILE.is_file() else "opensora",
        stage=stage,
        image=how.image,
        args=tuple(arguments(stage, job)),
        nodes=train.processes // gpus,  # the configuration has whole nodes only
        gpus_per_node=gpus,
        env=tracking(how.tracking_uri, job) | {"OPENSORA_IMAGE": how.image},
        run_id=how.run_id,
        deadline_s=paid_s,
        owner=owner,
    )
    before = signal.signal(signal.SIGTERM, _stop)  # a cancelled run: the job is deleted on the way out
    try:
        run(wanted, Cluster(wanted.namespace, say=lambda line: print(line, flush=True)), POLL_S, STUCK_S)
    except JobError as error:
        fail(str(error), error.exit_code)
    finally:
        signal.signal(signal.SIGTERM, before)


def _stop(number: int, frame: object) -> NoReturn:
    signal.signal(number, signal.SIG_IGN)  # a second one must not cut off the deletion
    sys.exit(128 + number)


def _on_this_machine(config: "Config", stage: str, job: Job) -> None:
    """The same command with the variables that Kubeflow Trainer would set; its last error is ours."""
    processes = getattr(config, stage).processes
    env = os.environ | {"PET_NNODES": "1", "PET_NPROC_PER_NODE": str(processes), "PET_NODE_RANK": "0"}
    env |= {PARAMS: str(params_file())}
    command = [sys.executable, "-m", "opensora.launch", *arguments(stage, job)]
    child = subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    before = signal.signal(signal.SIGTERM, lambda number, _: child.send_signal(number))
    reason = ""
    try:
        assert child.stdout
        for line in child.stdout:
            print(line, end="", flush=True)
            if line.startswith("error: "):
                reason = line.removeprefix("error: ").strip()
        code = child.wait()
    finally:
        signal.signal(signal.SIGTERM, before)
        if child.poll() is None:
            child.terminate()  # it writes a checkpoint
            child.wait()
    if code:
        fail(reason or f"{stage} ended with exit code {code}", code if code > 0 else 128 - code)
