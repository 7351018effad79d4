"""Why a TrainJob does not run, can never run, or failed: in one line, for the log of its launcher."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from typing import Any

from components.cluster import Cluster, JobError, condition, node_of

# A container that waits for one of these will not start by itself.
STUCK = ("CreateContainerConfigError", "CreateContainerError", "ErrImagePull", "ImagePullBackOff", "InvalidImageName")
UNCOVERED = "unavailable in ClusterQueue"  # so Kueue says of a resource that has no quota at all
# Exit codes of a worker that would fail again: `opensora`'s own for a wrong value, and the one for anything else.
DO_NOT_RETRY = (2, 42)
# Reasons of a failure: by such a code, for which k8s/base/training-runtime.yaml has the rule, and by `deadline_s`.
RULE, DEADLINE = "FailJobSetFailurePolicyAction", "DeadlineExceeded"
TAIL_LINES = 200
RECENT_S = 900  # how old a warning may be; while its cause lasts most are repeated, at worst every five minutes


class FinalError(JobError):
    """A new start would fail again."""

    exit_code = 42


@dataclass(frozen=True)
class Waiting:
    """What a job waits for."""

    reason: str
    stuck: bool  # it does not come by itself, as free quota does


def never_fits(request: Mapping[str, Decimal], whole: Mapping[str, Any]) -> str:
    """What of a request is more than a ClusterQueue has when nothing else runs; empty if it fits, or may borrow.

    A flavor must hold all that a job asks of the flavor's group.

    Args:
        request: of all pods, by resource.
    """
    from kubernetes.utils import parse_quantity

    if whole["spec"].get("cohortName"):
        return ""
    for group in whole["spec"].get("resourceGroups") or []:
        lacks: list[list[str]] = []
        for flavor in group["flavors"]:
            quotas = {item["name"]: parse_quantity(item["nominalQuota"]) for item in flavor["resources"]}
            lacks.append(
                [
                    f"{_amount(name, request[name])} {name} of {_amount(name, quota)} in flavor {flavor['name']}"
                    for name, quota in quotas.items()
                    if request.get(name, 0) > quota
                ]
            )
        if lacks and all(lacks):
            nearest: list[str] = min(lacks, key=len)
            return ", ".join(nearest)
    return ""


def _amount(name: str, quantity: Decimal) -> str:
    return f"{quantity / 2**30:.0f} Gi" if name == "memory" else f"{quantity.normalize():f}"


def why_waiting(job: Mapping[str, Any], nodes: int, pods: list[Any], cluster: Cluster) -> Waiting | None:
    """What a TrainJob waits for: the queue, a container's needs, a place for a pod, or leave to make one."""
    metadata = job["metadata"]
    name, since = metadata["name"], datetime.now(UTC) - timedelta(seconds=RECENT_S)
    if made := metadata.get("creationTimestamp"):
        since = max(since, datetime.fromisoformat(made))
    if suspended := condition(job, "Suspended"):
        workload = cluster.workload(metadata.get("uid", "")) or {}
        refusal = condition(workload, "QuotaReserved", "False") or condition(workload, "Admitted", "False")
        reason = refusal.get("message") or cluster.warning([name], since) or suspended.get("message", "no reason given")
        return Waiting(f"it waits in the queue: {_line(reason)}", stuck=UNCOVERED in reason)
    alive = [pod for pod in pods if not pod.metadata.deletion_timestamp]
    for pod in alive:
        for status in pod.status.container_statuses or []:
            waiting = status.state and status.state.waiting
            if waiting and waiting.reason in STUCK:
                said = waiting.message or "no message"
                return Waiting(f"{waiting.reason} in pod {pod.metadata.name}: {_line(said)}", stuck=True)
    for pod in alive:
        for found in pod.status.conditions or []:
            if found.type == "PodScheduled" and found.status == "False":
                return Waiting(f"a pod finds no place: {_line(found.message or found.reason)}", stuck=True)
    # Of JobSet's Job of the pods. What else is said of it while pods are fewer is how the try before ended.
    if len(alive) < nodes and (said := cluster.warning([name, f"{name}-node-0"], since, "FailedCreate")):
        return Waiting(f"its pods cannot be made: {_line(said)}", stuck=True)
    return None


def why_failed(name: str, failed: Mapping[str, Any], pods: list[Any], cluster: Cluster) -> JobError:
    """The failure: which node and exit code, and the last error that its log holds.

    Args:
        failed: the condition of that type.
    """
    kind = failed.get("reason")
    ended = sorted(_ended(pods), key=lambda item: item[0])
    if kind == DEADLINE:
        return FinalError(f"TrainJob {name} ran for as long as its budget pays for; raise the budget for a new run")
    final = kind == RULE or any(end.exit_code in DO_NOT_RETRY for _, _, end in ended)
    error = FinalError if final else JobError
    again = "; a new start would fail again" if final else ""
    if not ended:
        return error(f"TrainJob {name} failed{again}: {failed.get('message') or kind or 'no message'}")
    # The first to end is the cause; the others lost their peer.
    _, pod, end = ended[0]
    lines = [words.strip() for _, words in cluster.log(pod.metadata.name, tail=TAIL_LINES) if words.strip()]
    errors = [words for words in lines if words.lower().startswith(("error", "rank")) or "error:" in words.lower()]
    last = (errors or lines or [end.reason or "no log"])[-1]
    memory = " (out of memory)" if end.reason == "OOMKilled" else ""
    return error(f"TrainJob {name} failed on node {node_of(pod)}, exit code {end.exit_code}{memory}{again}: {last}")


def _ended(pods: list[Any]) -> Iterator[tuple[tuple[bool, str], Any, Any]]:
    """Pods that failed with how they did, those first that say that a new start would fail again, then by time."""
    for pod in pods:
        for status in pod.status.container_statuses or []:
            end = status.state and status.state.terminated
            if end and end.exit_code:
                at = str(end.finished_at or datetime.max)
                yield (end.exit_code not in DO_NOT_RETRY, at), pod, end


def _line(words: str) -> str:
    return " ".join(words.split())
