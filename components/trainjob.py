"""A training stage as a TrainJob of Kubeflow Trainer: made, followed to its end, and cleaned up.

The launcher that calls this is a small pod without a GPU. It may be retried: a job of the same name that still runs is
followed again, and one that failed is replaced, since training goes on from its last checkpoint; unless it failed in a
way that a new start would repeat.
"""

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from decimal import Decimal
from typing import Any

from components.cluster import RUN, Cluster, JobError, condition, node_of
from components.reasons import FinalError, never_fits, why_failed, why_waiting
from opensora.kubeflow import GPU, TRAINER

MANAGED = "opensora/stage"  # label of every job made here
FINAL = ("Complete", "Failed")


@dataclass(frozen=True)
class TrainJob:
    """What to run: `image` with `args`, on `nodes` × `gpus_per_node` GPUs, waiting in `queue`."""

    name: str
    namespace: str
    stage: str
    image: str
    args: tuple[str, ...]
    nodes: int
    gpus_per_node: int
    env: Mapping[str, str] = field(default_factory=dict)
    queue: str = "opensora"
    priority: str = "opensora-training"
    runtime: str = "opensora"
    run_id: str = ""  # of the pipeline's run: with it the job is found where its launcher is gone
    deadline_s: int | None = None  # of the time from one start of its pods by the queue
    owner: Mapping[str, str] | None = None  # name and uid of the launcher's pod: with it goes the job

    def document(self) -> dict[str, Any]:
        """The TrainJob to create."""
        labels = {
            MANAGED: self.stage,
            "kueue.x-k8s.io/queue-name": self.queue,
            "kueue.x-k8s.io/priority-class": self.priority,
        }
        if self.run_id:
            labels[RUN] = self.run_id
        metadata: dict[str, Any] = {"name": self.name, "namespace": self.namespace, "labels": labels}
        if self.owner:
            metadata["ownerReferences"] = self.owners()
        spec: dict[str, Any] = {
            "runtimeRef": {"apiGroup": TRAINER[0], "kind": "ClusterTrainingRuntime", "name": self.runtime},
            "trainer": {
                "image": self.image,
                "args": list(self.args),
                "env": [{"name": name, "value": value} for name, value in self.env.items()],
                "numNodes": self.nodes,
                "numProcPerNode": self.gpus_per_node,
            },
        }
        if self.deadline_s:
            spec["activeDeadlineSeconds"] = self.deadline_s
        return {"apiVersion": "/".join(TRAINER), "kind": "TrainJob", "metadata": metadata, "spec": spec}

    def owners(self) -> list[dict[str, Any]]:
        """The launcher's pod, as an object names its owners."""
        return [{"apiVersion": "v1", "kind": "Pod", **self.owner}] if self.owner else []


def run(job: TrainJob, cluster: Cluster, poll_s: float = 10, stuck_s: float = 600, going_s: float = 900) -> None:
    """Run the job to its end; its log is relayed line by line.

    Args:
        stuck_s: how long pods may wait for what does not come, as a secret or a place, before the job is given up.
            There is no limit to waiting for others in the queue.
        going_s: how long a failed job of that name may take to go; its pods may still write a checkpoint.

    Raises:
        JobError: it failed, does not fit the queue or was deleted. The message ends with the reason.
        FinalError: it failed in a way that a new start would repeat.
        KeyboardInterrupt, SystemExit: as raised by a signal's handler; the job is deleted before that goes on.
    """
    try:
        check_quota(job, cluster)
        attach(job, cluster, going_s)
        _follow(job, cluster, poll_s, stuck_s)
    except (KeyboardInterrupt, SystemExit):
        cluster.delete(job.name)  # before a word is said: this process may be given no second
        cluster.say(f"stopped: TrainJob {job.name} is deleted; its last checkpoint stays")
        raise


def check_quota(job: TrainJob, cluster: Cluster) -> None:
    """Raise JobError if the job is larger than the whole queue: it would wait for ever."""
    whole = cluster.cluster_queue(job.queue)
    if whole is None:
        return
    a_pod = cluster.requests(job.runtime) or {GPU: Decimal(job.gpus_per_node)}
    lack = never_fits({name: quantity * job.nodes for name, quantity in a_pod.items()}, whole)
    if lack:
        raise JobError(
            f"TrainJob {job.name} never fits queue {job.queue}: {job.nodes} nodes ask for {lack}; "
            "lower the stage's processes, or raise the quota in k8s/overlays/*/kustomization.yaml"
        )


def attach(job: TrainJob, cluster: Cluster, going_s: float = 900) -> None:
    """Create the job, or take over the one that an earlier try of this step made.

    Raises:
        FinalError: the earlier one failed in a way that a new start would repeat.
        JobError: a failed one does not go within `going_s`.
    """
    since = None
    while not cluster.create(job.document()):
        there = cluster.get(job.name)
        if there and not there["metadata"].get("deletionTimestamp"):
            failed = condition(there, "Failed")
            if not failed:
                cluster.say(f"TrainJob {job.name} is there already; following it")
                _take_over(job, there, cluster)
                return
            error = why_failed(job.name, failed, cluster.pods(job.name), cluster)
            if isinstance(error, FinalError):
                raise error
            cluster.say(f"{error}; a new TrainJob goes on from its checkpoint")
            cluster.delete(job.name)
        elif since is None:
            since = time.monotonic()
            cluster.say(f"waiting for TrainJob {job.name} of an earlier try to be gone, with its pods")
        elif time.monotonic() - since > going_s:
            held = ", ".join((there or {"metadata": {}})["metadata"].get("finalizers") or ["nothing that it names"])
            raise JobError(
                f"TrainJob {job.name} of an earlier try is not gone after {going_s:.0f} s: {held} holds it, and "
                f"{len(cluster.pods(job.name))} of its pods are there; see `kubectl -n {job.namespace} describe "
                f"trainjob,jobset {job.name}`"
            )
        cluster.sleep(2)


def _take_over(job: TrainJob, there: Mapping[str, Any], cluster: Cluster) -> None:
    """The job is to go with this launcher's pod, not with that of the try before."""
    owners = there["metadata"].get("ownerReferences") or []
    if job.owner and job.owner["uid"] not in [owner["uid"] for owner in owners]:
        try:
            cluster.own(job.name, job.owners())
        except JobError as error:
            cluster.say(f"{error}; it still goes with the pod of the try before")


def _follow(job: TrainJob, cluster: Cluster, poll_s: float, stuck_s: float) -> None:
    relay = _Relay(cluster)
    said = reason = ""
    stuck_since: float | None = None
    while True:
        there = cluster.get(job.name)
        if there is None:
            raise JobError(f"TrainJob {job.name} was deleted while it ran")
        if (state := _state(there)) != said:
            cluster.say(f"TrainJob {job.name} {state}")
            said = state
        pods = cluster.pods(job.name)
        relay.show(pods)
        if condition(there, "Complete"):
            return
        if failed := condition(there, "Failed"):
            raise why_failed(job.name, failed, pods, cluster)
        waiting = why_waiting(there, job.nodes, pods, cluster)
        if waiting and waiting.reason != reason:
            cluster.say(f"TrainJob {job.name}: {waiting.reason}")
        reason = waiting.reason if waiting else ""
        if not waiting or not waiting.stuck:
            stuck_since = None
        elif stuck_since is None:
            stuck_since = time.monotonic()
        elif time.monotonic() - stuck_since > stuck_s:
            cluster.delete(job.name)
            raise JobError(f"TrainJob {job.name} cannot start: {waiting.reason}")
        cluster.sleep(poll_s)


class _Relay:
    """Prints the log of the first node's pod, each line once, over restarts of the pod."""

    def __init__(self, cluster: Cluster) -> None:
        self._cluster = cluster
        self._pod, self._at = "", ""
        self._there: set[str] = set()  # lines of the time `_at`

    def show(self, pods: list[Any]) -> None:
        """What is new."""
        first = [pod.metadata.name for pod in pods if node_of(pod) == 0]
        if not first:
            return
        if first[-1] != self._pod:
            self._pod, self._at, self._there = first[-1], "", set()
        since = _time(self._at) if self._at else None
        for stamp, words in self._cluster.log(self._pod, since):
            if stamp < self._at or (stamp == self._at and words in self._there):
                continue
            if stamp != self._at:
                self._at, self._there = stamp, set()
            self._there.add(words)
            self._cluster.say(words)


def _state(job: Mapping[str, Any]) -> str:
    for kind in FINAL:
        if found := condition(job, kind):
            return f"is {kind.lower()} ({found.get('message') or found.get('reason', '')})"
    if condition(job, "Suspended"):
        return "is suspended"
    return "runs" if (job.get("status") or {}).get("conditions") else "is made"


def _time(stamp: str) -> datetime:
    """Kubernetes writes nanoseconds, which `datetime` cuts."""
    whole, _, rest = stamp.rstrip("Z").partition(".")
    return datetime.fromisoformat(f"{whole}.{(rest + '000000')[:6]}+00:00")
