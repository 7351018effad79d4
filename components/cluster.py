"""The few calls to a Kubernetes API that a launcher makes; a lost connection is waited out."""

import json
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from datetime import UTC, datetime
from decimal import Decimal
from typing import Any

from opensora.kubeflow import KUEUE, TRAINER, load_account

RUN = "opensora/run"  # label of a TrainJob: id of the pipeline's run that made it


class JobError(RuntimeError):
    """The job failed or cannot run; the message is the reason, in one line."""

    exit_code = 1


class Cluster:
    """A namespace of a cluster.

    Args:
        api_client: of the `kubernetes` package; None takes the pod's service account, else ~/.kube/config.
        say: prints a line.
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
        from kubernetes import client

        if api_client is None:
            load_account()
        self.namespace, self.patience_s, self.sleep = namespace, patience_s, sleep
        self._say = say
        self._custom = client.CustomObjectsApi(api_client)
        self._core = client.CoreV1Api(api_client)

    @property
    def address(self) -> str:
        """URL of the API."""
        return self._core.api_client.configuration.host

    def say(self, line: str) -> None:
        """Print a line; that nobody reads it any more, as after the end of KFP's own process, stops nothing."""
        with suppress(OSError):
            self._say(line)

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
                        "try again: a job that runs goes on meanwhile"
                    ) from error
                self.sleep(wait)
                wait = min(wait * 2, 30.0)
            else:
                if since is not None:
                    self.say("the cluster's API answers again")
                return answer

    def _look(self, function: Callable[..., Any], *args: Any, **options: Any) -> Any:
        """The answer, None where the API refuses it: there is no such thing, or no right to read it."""
        from kubernetes.client import ApiException

        try:
            return self._call(function, *args, **options)
        except ApiException:
            return None

    def create(self, document: Mapping[str, Any]) -> bool:
        """Make a TrainJob; False if one of that name is there.

        Raises:
            JobError: the API refuses it, with its reason.
        """
        from kubernetes.client import ApiException

        make = self._custom.create_namespaced_custom_object
        try:
            self._call(make, *TRAINER, self.namespace, "trainjobs", document)
        except ApiException as error:
            if error.status == 409:
                return False
            raise JobError(f"the cluster refuses TrainJob {document['metadata']['name']}: {_explain(error)}") from error
        return True

    def get(self, name: str) -> dict[str, Any] | None:
        """The TrainJob, None if there is none."""
        from kubernetes.client import ApiException

        try:
            return self._call(self._custom.get_namespaced_custom_object, *TRAINER, self.namespace, "trainjobs", name)
        except ApiException as error:
            if error.status == 404:
                return None
            raise JobError(f"TrainJob {name} cannot be read: {_explain(error)}") from error

    def own(self, name: str, owners: list[dict[str, Any]]) -> None:
        """Replace the owners of a TrainJob, with the last of which it goes."""
        from kubernetes.client import ApiException

        patch = {"metadata": {"ownerReferences": owners}}
        try:
            self._call(self._custom.patch_namespaced_custom_object, *TRAINER, self.namespace, "trainjobs", name, patch)
        except ApiException as error:
            raise JobError(f"TrainJob {name} cannot be taken over: {_explain(error)}") from error

    def delete(self, name: str) -> None:
        """Delete a TrainJob and its pods; no error if it is gone."""
        from kubernetes.client import ApiException

        remove = self._custom.delete_namespaced_custom_object
        try:
            self._call(remove, *TRAINER, self.namespace, "trainjobs", name, propagation_policy="Foreground")
        except ApiException as error:
            if error.status != 404:
                raise JobError(f"TrainJob {name} cannot be deleted: {_explain(error)}") from error

    def delete_run(self, run_id: str) -> list[str]:
        """Delete the TrainJobs that a pipeline's run made, pods included; returns their names."""
        from kubernetes.client import ApiException

        read = self._custom.list_namespaced_custom_object
        try:
            found = self._call(read, *TRAINER, self.namespace, "trainjobs", label_selector=f"{RUN}={run_id}")["items"]
        except ApiException as error:
            if error.status == 404:  # a cluster without Kubeflow Trainer
                return []
            raise JobError(f"the TrainJobs of namespace {self.namespace} cannot be read: {_explain(error)}") from error
        names = [job["metadata"]["name"] for job in found]
        for name in names:
            self.delete(name)
        return names

    def pods(self, name: str) -> list[Any]:
        """The pods of a TrainJob, by the index of their node."""
        found = self._call(
            self._core.list_namespaced_pod, self.namespace, label_selector=f"jobset.sigs.k8s.io/jobset-name={name}"
        ).items
        return sorted(found, key=lambda pod: (node_of(pod), str(pod.metadata.creation_timestamp)))

    def log(self, pod: str, since: datetime | None = None, tail: int | None = None) -> list[tuple[str, str]]:
        """Time and text of a pod's lines; none where there is no log yet, or none any more."""
        options: dict[str, Any] = {"timestamps": True, "container": "node"}
        if since is not None:
            options["since_seconds"] = max(1, int((datetime.now(since.tzinfo) - since).total_seconds()) + 2)
        if tail is not None:
            options["tail_lines"] = tail
        text = self._look(self._core.read_namespaced_pod_log, pod, self.namespace, **options)
        lines = (line.partition(" ") for line in (text or "").splitlines())
        return [(stamp, words) for stamp, _, words in lines]

    def warning(self, objects: list[str], since: datetime, reason: str = "") -> str:
        """The newest warning that controllers gave of objects of these names; empty where there is none.

        Args:
            reason: the only one that counts; empty: any.
        """
        found: list[Any] = []
        for name in objects:
            chosen = f"involvedObject.name={name},type=Warning"
            events = self._look(self._core.list_namespaced_event, self.namespace, field_selector=chosen)
            found += [event for event in events.items if reason in ("", event.reason)] if events else []
        newest = max(found, key=_time_of, default=None)
        return f"{newest.reason}: {newest.message}" if newest is not None and _time_of(newest) >= since else ""

    def workload(self, uid: str) -> dict[str, Any] | None:
        """The Workload by which Kueue admits the job of that uid; None where there is none."""
        read = self._custom.list_namespaced_custom_object
        chosen = f"kueue.x-k8s.io/job-uid={uid}"
        found = self._look(read, *KUEUE, self.namespace, "workloads", label_selector=chosen)
        return found["items"][0] if found and found["items"] else None

    def cluster_queue(self, queue: str) -> dict[str, Any] | None:
        """The ClusterQueue behind a LocalQueue; None where that cannot be read.

        Raises:
            JobError: there is no such queue.
        """
        from kubernetes.client import ApiException

        try:
            local = self._call(self._custom.get_namespaced_custom_object, *KUEUE, self.namespace, "localqueues", queue)
            whole = local["spec"]["clusterQueue"]
            return self._call(self._custom.get_cluster_custom_object, *KUEUE, "clusterqueues", whole)
        except ApiException as error:
            if error.status == 404:
                raise JobError(
                    f"there is no queue {queue} in namespace {self.namespace}: apply k8s/ first, or name another queue"
                ) from error
            return None

    def requests(self, runtime: str) -> dict[str, Decimal] | None:
        """What one pod of a ClusterTrainingRuntime asks for, by resource; None where it cannot be read."""
        from kubernetes.utils import parse_quantity

        whole = self._look(self._custom.get_cluster_custom_object, *TRAINER, "clustertrainingruntimes", runtime)
        if whole is None:
            return None
        total: dict[str, Decimal] = {}
        for replicated in whole["spec"]["template"]["spec"]["replicatedJobs"]:
            for container in replicated["template"]["spec"]["template"]["spec"]["containers"]:
                resources = container.get("resources") or {}
                # A limit without a request is the request too.
                for name, quantity in ((resources.get("limits") or {}) | (resources.get("requests") or {})).items():
                    total[name] = total.get(name, Decimal(0)) + parse_quantity(quantity)
        return total


def condition(document: Mapping[str, Any], kind: str, status: str = "True") -> dict[str, Any]:
    """The condition of that type if it has that status, else an empty one."""
    for found in (document.get("status") or {}).get("conditions") or []:
        if found["type"] == kind and found["status"] == status:
            return found
    return {}


def node_of(pod: Any) -> int:
    """Index of the node that a pod is."""
    labels = pod.metadata.labels or {}
    return int(labels.get("batch.kubernetes.io/job-completion-index", 0))


def _time_of(event: Any) -> datetime:
    """When it happened last: the older and the newer API of events have fields of their own."""
    times = (event.series and event.series.last_observed_time, event.last_timestamp, event.event_time)
    return max((time for time in times if time), default=event.metadata.creation_timestamp or datetime.now(UTC))


def _short(error: Exception) -> str:
    status = getattr(error, "status", None)
    return f"HTTP {status}" if status else type(error).__name__


def _explain(error: Any) -> str:
    """What the API says of its refusal."""
    try:
        words = json.loads(error.body)["message"]
    except (TypeError, ValueError, KeyError):
        words = error.reason
    hint = ""
    if error.status in (401, 403):
        hint = "; the service account needs the role of k8s/base/service-accounts.yaml"
    return f"{words} (HTTP {error.status}){hint}"
