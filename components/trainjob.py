"""A training stage as a TrainJob of Kubeflow Trainer: made, followed to its end, and cleaned up.

The launcher that calls this is a small pod without a GPU. It may be retried: a job of the same name that still runs is
followed again, and one that failed is replaced, since training goes on from its last checkpoint.
"""

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

GROUP, VERSION, PLURAL = "trainer.kubeflow.org", "v1alpha1", "trainjobs"
KUEUE, KUEUE_VERSION = "kueue.x-k8s.io", "v1beta2"
GPU = "nvidia.com/gpu"
MANAGED = "opensora/stage"  # label of every job made here
FINAL = ("Complete", "Failed")
# A container that waits for one of these will not start by itself.
STUCK = ("CreateContainerConfigError", "CreateContainerError", "ErrImagePull", "ImagePullBackOff", "InvalidImageName")
DO_NOT_RETRY = 42  # exit code of a worker that would fail again
TAIL_LINES = 200


class JobError(RuntimeError):
    """The job failed or cannot run; the message is the reason, in one line."""


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
    deadline_s: int | None = None  # of the time that the job is not suspended
    owner: Mapping[str, str] | None = None  # name and uid of the launcher's pod: with it goes the job

    def document(self) -> dict[str, Any]:
        """The TrainJob to create."""
        metadata: dict[str, Any] = {
            "name": self.name,
            "namespace": self.namespace,
            "labels": {
                MANAGED: self.stage,
                "kueue.x-k8s.io/queue-name": self.queue,
                "kueue.x-k8s.io/priority-class": self.priority,
            },
        }
        if self.owner:
            metadata["ownerReferences"] = [{"apiVersion": "v1", "kind": "Pod", **self.owner}]
        spec: dict[str, Any] = {
            "runtimeRef": {"apiGroup": GROUP, "kind": "ClusterTrainingRuntime", "name": self.runtime},
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
        return {"apiVersion": f"{GROUP}/{VERSION}", "kind": "TrainJob", "metadata": metadata, "spec": spec}


class Cluster:
    """The few calls to a Kubernetes API that a launcher makes; a lost connection is waited out.

    Args:
        api_client: of the `kubernetes` package; None takes the pod's service account, else ~/.kube/config.
        patience_s: how long the API may be unreachable before the launcher gives up; the job goes on meanwhile.
    """

    def __init__(
        self,
        namespace: str,
        api_client: Any = None,
        say: Callable[[str], None] = print,
        patience_s: float = 900,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        from kubernetes import client, config

        if api_client is None:
            try:
                config.load_incluster_config()
            except config.ConfigException:
                config.load_kube_config()
        self.namespace, self.say, self.patience_s, self.sleep = namespace, say, patience_s, sleep
        self._custom = client.CustomObjectsApi(api_client)
        self._core = client.CoreV1Api(api_client)

    def _call(self, function: Callable[..., Any], *args: Any, **options: Any) -> Any:
        """The answer, after as many tries as it takes until the API has been away for `patience_s`."""
        from kubernetes.client import ApiException
        from urllib3.exceptions import HTTPError

        since, wait = None, 1.0
        while True:
            try:
                answer = function(*args, **options, _request_timeout=30)
            except (ApiException, HTTPError, OSError) as error:
                status = getattr(error, "status", 0)
                if status and status < 500 and status != 429:
                    raise
                now = time.monotonic()
                if since is None:
                    since = now
                    self.say(f"the cluster's API does not answer ({_short(error)}); trying again, the job goes on")
                if now - since > self.patience_s:
                    raise JobError(
                        f"the cluster's API did not answer for {self.patience_s:.0f} s ({_short(error)}); "
                        "start the step again: it follows the same job"
                    ) from error
                self.sleep(wait)
                wait = min(wait * 2, 30.0)
            else:
                if since is not None:
                    self.say("the cluster's API answers again")
                return answer

    def create(self, job: TrainJob) -> bool:
        """Make the job; False if one of that name is there.

        Raises:
            JobError: the API refuses it, with its reason.
        """
        from kubernetes.client import ApiException

        try:
            self._call(
                self._custom.create_namespaced_custom_object, GROUP, VERSION, self.namespace, PLURAL, job.document()
            )
        except ApiException as error:
            if error.status == 409:
                return False
            raise JobError(f"the cluster refuses TrainJob {job.name}: {_explain(error)}") from error
        return True

    def get(self, name: str) -> dict[str, Any] | None:
        """The job, None if there is none."""
        from kubernetes.client import ApiException

        try:
            return self._call(self._custom.get_namespaced_custom_object, GROUP, VERSION, self.namespace, PLURAL, name)
        except ApiException as error:
            if error.status == 404:
                return None
            raise JobError(f"TrainJob {name} cannot be read: {_explain(error)}") from error

    def delete(self, name: str) -> None:
        """Delete the job and its pods; no error if it is gone."""
        from kubernetes.client import ApiException

        try:
            self._call(
                self._custom.delete_namespaced_custom_object,
                GROUP,
                VERSION,
                self.namespace,
                PLURAL,
                name,
                propagation_policy="Foreground",
            )
        except ApiException as error:
            if error.status != 404:
                raise JobError(f"TrainJob {name} cannot be deleted: {_explain(error)}") from error

    def pods(self, name: str) -> list[Any]:
        """The job's pods, by the index of their node."""
        found = self._call(
            self._core.list_namespaced_pod, self.namespace, label_selector=f"jobset.sigs.k8s.io/jobset-name={name}"
        ).items
        return sorted(found, key=lambda pod: (node_of(pod), str(pod.metadata.creation_timestamp)))

    def log(self, pod: str, since: datetime | None = None, tail: int | None = None) -> list[tuple[str, str]]:
        """Time and text of a pod's lines; none where there is no log yet."""
        from kubernetes.client import ApiException

        options: dict[str, Any] = {"timestamps": True, "container": "node"}
        if since is not None:
            options["since_seconds"] = max(1, int((datetime.now(since.tzinfo) - since).total_seconds()) + 2)
        if tail is not None:
            options["tail_lines"] = tail
        try:
            text = self._call(self._core.read_namespaced_pod_log, pod, self.namespace, **options)
        except ApiException:  # not started yet, or gone with its node
            return []
        lines = (line.partition(" ") for line in (text or "").splitlines())
        return [(stamp, words) for stamp, _, words in lines]

    def gpu_quota(self, queue: str) -> int | None:
        """GPUs that the largest pool behind a LocalQueue has; None where that cannot be read."""
        from kubernetes.client import ApiException

        try:
            local = self._call(
                self._custom.get_namespaced_custom_object, KUEUE, KUEUE_VERSION, self.namespace, "localqueues", queue
            )
            whole = self._call(
                self._custom.get_cluster_custom_object,
                KUEUE,
                KUEUE_VERSION,
                "clusterqueues",
                local["spec"]["clusterQueue"],
            )
        except ApiException as error:
            if error.status == 404:
                raise JobError(
                    f"there is no queue {queue} in namespace {self.namespace}: apply k8s/ first, or name another queue"
                ) from error
            return None
        quotas = [
            int(resource["nominalQuota"])
            for group in whole["spec"]["resourceGroups"]
            for flavor in group["flavors"]
            for resource in flavor["resources"]
            if resource["name"] == GPU
        ]
        return max(quotas, default=0)


def run(job: TrainJob, cluster: Cluster, poll_s: float = 10, stuck_s: float = 300) -> None:
    """Run the job to its end; its log is relayed line by line.

    Args:
        stuck_s: how long a container may wait for what does not come, as a secret, before the job is given up.

    Raises:
        JobError: it failed, does not fit the queue or was deleted. The message ends with the reason.
        KeyboardInterrupt, SystemExit: as raised by a signal's handler; the job is deleted before that goes on.
    """
    wanted = job.nodes * job.gpus_per_node
    quota = cluster.gpu_quota(job.queue)
    if quota is not None and wanted > quota:
        raise JobError(
            f"TrainJob {job.name} asks for {wanted} GPUs and queue {job.queue} has {quota}: it would wait for ever; "
            "lower the stage's processes, or raise the quota in k8s/overlays/*/site.env"
        )
    attach(job, cluster)
    try:
        _follow(job, cluster, poll_s, stuck_s)
    except (KeyboardInterrupt, SystemExit):
        cluster.say(f"stopped: TrainJob {job.name} is deleted; its last checkpoint stays")
        cluster.delete(job.name)
        raise


def attach(job: TrainJob, cluster: Cluster) -> None:
    """Create the job, or take over the one that an earlier try of this step made."""
    while not cluster.create(job):
        there = cluster.get(job.name)
        if there is None or there["metadata"].get("deletionTimestamp"):
            cluster.sleep(2)  # the one before is going
        elif _condition(there, "Failed"):
            cluster.say(f"TrainJob {job.name} of an earlier try failed; a new one goes on from its checkpoint")
            cluster.delete(job.name)
        else:
            cluster.say(f"TrainJob {job.name} is there already; following it")
            return


def _follow(job: TrainJob, cluster: Cluster, poll_s: float, stuck_s: float) -> None:
    relay = _Relay(cluster)
    said = ""
    stuck_since: float | None = None
    while True:
        there = cluster.get(job.name)
        if there is None:
            raise JobError(f"TrainJob {job.name} was deleted while it ran")
        state = _state(there)
        if state != said:
            cluster.say(f"TrainJob {job.name}: {state}")
            said = state
        pods = cluster.pods(job.name)
        relay.show(pods)
        if _condition(there, "Complete"):
            return
        if failed := _condition(there, "Failed"):
            raise JobError(_reason(job.name, failed, pods, cluster))
        waiting = next(_waiting(pods), "")
        if not waiting:
            stuck_since = None
        elif stuck_since is None:
            stuck_since = time.monotonic()
            cluster.say(f"a container cannot start yet: {waiting}")
        elif time.monotonic() - stuck_since > stuck_s:
            cluster.delete(job.name)
            raise JobError(f"TrainJob {job.name} cannot start: {waiting}")
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
        if found := _condition(job, kind):
            return f"{kind.lower()} ({found.get('message') or found.get('reason', '')})"
    if found := _condition(job, "Suspended"):
        return f"waits in the queue ({found.get('message') or found.get('reason', '')})"
    return "runs" if (job.get("status") or {}).get("conditions") else "made"


def _condition(job: Mapping[str, Any], kind: str) -> dict[str, Any]:
    """The condition of that type if it is true, else an empty one."""
    for condition in (job.get("status") or {}).get("conditions") or []:
        if condition["type"] == kind and condition["status"] == "True":
            return condition
    return {}


def _waiting(pods: list[Any]) -> Iterator[str]:
    for pod in pods:
        for status in pod.status.container_statuses or []:
            waiting = status.state and status.state.waiting
            if waiting and waiting.reason in STUCK:
                yield f"{waiting.reason} in pod {pod.metadata.name}: {waiting.message or 'no message'}"


def _reason(name: str, failed: Mapping[str, Any], pods: list[Any], cluster: Cluster) -> str:
    """The failure in one line: which node and exit code, and the last error that its log holds."""
    ended = []
    for pod in pods:
        for status in pod.status.container_statuses or []:
            end = status.state and status.state.terminated
            if end and end.exit_code:
                ended.append((end.finished_at or datetime.max.replace(tzinfo=None), pod, end))
    message = failed.get("message") or failed.get("reason") or "no message"
    if not ended:
        return f"TrainJob {name} failed: {message}"
    # The first to end is the cause; the others lost their peer.
    _, pod, end = min(ended, key=lambda item: str(item[0]))
    lines = [words.strip() for _, words in cluster.log(pod.metadata.name, tail=TAIL_LINES) if words.strip()]
    errors = [words for words in lines if words.lower().startswith(("error", "rank")) or "error:" in words.lower()]
    last = (errors or lines or [end.reason or "no log"])[-1]
    memory = " (out of memory)" if end.reason == "OOMKilled" else ""
    again = "; a new start would fail again" if end.exit_code == DO_NOT_RETRY else ""
    return f"TrainJob {name} failed on node {node_of(pod)}, exit code {end.exit_code}{memory}{again}: {last}"


def node_of(pod: Any) -> int:
    """Index of the node that a pod is."""
    labels = pod.metadata.labels or {}
    return int(labels.get("batch.kubernetes.io/job-completion-index", 0))


def _time(stamp: str) -> datetime:
    """Kubernetes writes nanoseconds, which `datetime` cuts."""
    whole, _, rest = stamp.rstrip("Z").partition(".")
    return datetime.fromisoformat(f"{whole}.{(rest + '000000')[:6]}+00:00")


def _short(error: Exception) -> str:
    status = getattr(error, "status", None)
    return f"HTTP {status}" if status else type(error).__name__


def _explain(error: Any) -> str:
    """What the API says of its refusal."""
    import json

    try:
        words = json.loads(error.body)["message"]
    except (TypeError, ValueError, KeyError):
        words = error.reason
    hint = ""
    if error.status in (401, 403):
        hint = "; the service account needs the role of k8s/base/service-accounts.yaml"
    return f"{words} (HTTP {error.status}){hint}"
