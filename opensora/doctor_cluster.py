"""Is a cluster ready for the pipelines and for training? What k8s/ should have made is asked of the cluster itself."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from opensora.doctor import TIMEOUT_S, Finding
from opensora.kubeflow import GPU, KUEUE, SERVICE_ACCOUNT, TASK_QUEUE, TRAINER, load_account

# Group, kind in plural and version that k8s/ is written for.
KINDS = (
    ("trainer.kubeflow.org", "trainjobs", "v1alpha1"),
    ("trainer.kubeflow.org", "clustertrainingruntimes", "v1alpha1"),
    ("jobset.x-k8s.io", "jobsets", "v1alpha2"),
    ("kueue.x-k8s.io", "clusterqueues", "v1beta2"),
)
POOL = "opensora/pool"
# What the largest task of each pool of the pipelines takes of one node.
TASKS = {
    "cpu": {"cpu": "16", "memory": "64Gi"},
    "captioning": {"cpu": "64", "memory": "512Gi", GPU: "8"},  # the evaluation
}
# What steps do under SERVICE_ACCOUNT: group, resource or resource/subresource, name ("" for all), verbs.
RIGHTS = (
    ("trainer.kubeflow.org", "trainjobs", "", ("create", "get", "list", "patch", "delete")),
    ("kueue.x-k8s.io", "localqueues", "", ("get",)),
    ("kueue.x-k8s.io", "workloads", "", ("list",)),
    ("", "pods", "", ("list",)),
    ("", "pods/log", "", ("get",)),
    ("", "events", "", ("list",)),
    ("", "configmaps", "kfp-launcher", ("get",)),
    ("", "secrets", "mlpipeline-minio-artifact", ("get",)),
    ("argoproj.io", "workflowtaskresults", "", ("create", "patch")),
    ("argoproj.io", "workflowtasksets", "", ("list", "watch")),
    ("argoproj.io", "workflowtasksets/status", "", ("patch",)),
)
CLUSTER_RIGHTS = (
    ("trainer.kubeflow.org", "clustertrainingruntimes", "", ("get",)),
    ("kueue.x-k8s.io", "clusterqueues", "", ("get",)),
)
TRACKING = "opensora-mlflow"  # namespace
FROM_FILE = "kubectl -n {} create secret generic {} --from-env-file FILE (docs/cluster.md says what it holds)"
APPLY = "kubectl apply -k k8s/overlays/YOURS"
NAMES_ALONE = "application/json;as=PartialObjectMetadata;g=meta.k8s.io;v=v1"  # of a secret, not what it holds


def examine_cluster(namespace: str, queue: str, kfp_host: str, api_client: Any = None) -> Iterator[Finding]:
    """Check Kubeflow Pipelines by the token of KFP_TOKEN, the rest by the account of this pod or of ~/.kube/config.

    Args:
        api_client: of the `kubernetes` package; None takes the account that is there.
    """
    yield _kfp(kfp_host, namespace)
    try:
        from kubernetes import client, config
    except ImportError:
        yield Finding("Kubernetes", "failure", "no client", "pip install 'opensora-workflow[kubeflow]'")
        return
    try:
        if api_client is None:
            load_account()
    except config.ConfigException as error:
        yield Finding("Kubernetes", "failure", str(error), "run in a pod, or set KUBECONFIG")
        return
    custom, core = client.CustomObjectsApi(api_client), client.CoreV1Api(api_client)
    checks: list[tuple[str, Iterator[Finding]]] = [
        ("kinds", _kinds(client.ApiextensionsV1Api(api_client))),
        (f"queue {queue}", _queue(custom, namespace, queue)),
        (f"queue {TASK_QUEUE}", _queue(custom, namespace, TASK_QUEUE)),
        ("nodes", _nodes(custom, core, namespace, queue)),
        ("rights", _rights(client.AuthorizationV1Api(api_client), namespace)),
        (f"account {SERVICE_ACCOUNT}", _account(core, namespace)),
        ("secrets", _secrets(core, namespace)),
        ("claim runs", _claim(core, namespace)),
    ]
    for name, check in checks:
        try:
            yield from check
        except client.ApiException as error:
            yield _refused(name, error.status or 0)
        except Exception as error:  # the connection, whatever the library calls it
            seen = (str(error).splitlines() or [type(error).__name__])[0]
            yield Finding("Kubernetes", "failure", seen, "check the connection: kubectl version")
            return


def _refused(name: str, status: int) -> Finding:
    if status == 403:
        return Finding(name, "warning", "this account may not look (HTTP 403)", "look by an account that may")
    return Finding(name, "failure", f"HTTP {status}", APPLY)


def _kfp(host: str, namespace: str) -> Finding:
    from opensora.kubeflow import KubeflowError, greet, read_token

    try:
        greet(host, read_token(), namespace)
    except KubeflowError as error:
        seen, _, advice = str(error).partition("; ")
        return Finding("Kubeflow Pipelines", "failure", seen, advice or "docs/cluster.md says how to make a token")
    return Finding("Kubeflow Pipelines", "ok", f"{host} lets this token see runs in {namespace}")


def _kinds(extensions: Any) -> Iterator[Finding]:
    from kubernetes.client import ApiException

    for group, plural, version in KINDS:
        name = f"{plural}.{group}"
        try:
            found = extensions.read_custom_resource_definition(name, _request_timeout=TIMEOUT_S)
        except ApiException as error:
            advice = f"install {group.split('.')[0]}, or give this account the role of k8s/base/service-accounts.yaml"
            yield Finding(name, "failure", f"HTTP {error.status}", advice)
            continue
        served = [item.name for item in found.spec.versions if item.served]
        good = version in served
        advice = f"k8s/ is written for {version}: install a release that serves it"
        yield Finding(name, "ok" if good else "failure", ", ".join(served), "" if good else advice)


def _queues(custom: Any, namespace: str, queue: str) -> tuple[dict, dict]:
    """The LocalQueue of that name, and the ClusterQueue behind it."""
    local = custom.get_namespaced_custom_object(*KUEUE, namespace, "localqueues", queue, _request_timeout=TIMEOUT_S)
    return local, _cluster_object(custom, "clusterqueues", local["spec"]["clusterQueue"])


def _cluster_object(custom: Any, plural: str, name: str, where: tuple[str, str] = KUEUE) -> dict:
    return custom.get_cluster_custom_object(*where, plural, name, _request_timeout=TIMEOUT_S)


def _queue(custom: Any, namespace: str, queue: str) -> Iterator[Finding]:
    """Quota, and whether Kueue admits anything: it does not where a flavor or topology is missing, or on a stop."""
    local, whole = _queues(custom, namespace, queue)
    pools = [f"{name} {quota}" for name, quota in _quotas(whole).items()]
    what = f"queue {queue}"
    if not pools:
        yield Finding(what, "failure", "no quota of GPUs", APPLY)
        return
    for kind, found in (("clusterqueue", whole), (f"-n {namespace} localqueue", local)):
        conditions = found.get("status", {}).get("conditions", [])
        active = next((item for item in conditions if item["type"] == "Active"), None)
        if active is None:
            yield Finding(what, "failure", f"Kueue has not looked at the {kind} yet", "is Kueue's controller running?")
            return
        if active["status"] != "True":
            seen = f"not active: {active.get('reason', '')}: {active.get('message', '')}"
            advice = f"kubectl describe {kind} {found['metadata']['name']}; for a missing object: {APPLY}"
            yield Finding(what, "failure", seen, advice)
            return
    yield Finding(what, "ok", f"active; GPUs: {', '.join(pools)}")


def _quotas(queue: Mapping[str, Any]) -> dict[str, int]:
    """Flavors of a ClusterQueue that have GPUs, and how many."""
    found = {
        flavor["name"]: int(resource["nominalQuota"])
        for group in queue["spec"].get("resourceGroups", [])
        for flavor in group["flavors"]
        for resource in flavor["resources"]
        if resource["name"] == GPU
    }
    return {name: quota for name, quota in found.items() if quota}


def _nodes(custom: Any, core: Any, namespace: str, queue: str) -> Iterator[Finding]:
    """Labels and sizes of the nodes against what flavors, topology and runtime, as the cluster has them, ask for."""
    from kubernetes.client import ApiException

    nodes = [node for node in core.list_node(_request_timeout=TIMEOUT_S).items if _usable(node)]
    for pool, needed in TASKS.items():
        yield _pool(pool, [node for node in nodes if _labels(node).get(POOL) == pool], needed)
    try:
        runtime = _cluster_object(custom, "clustertrainingruntimes", "opensora", TRAINER)
        yield Finding("training runtime", "ok", "opensora")
        needed = _requests(runtime)
    except ApiException as error:
        yield _refused("training runtime", error.status or 0)
        needed = {GPU: "1"}
    try:
        _, whole = _queues(custom, namespace, queue)
    except ApiException:
        yield Finding("nodes for training", "failure", "the queue says which, and it is missing", APPLY)
        return
    for name, quota in _quotas(whole).items():
        flavor = _cluster_object(custom, "resourceflavors", name)["spec"]
        topology = flavor.get("topologyName")
        levels = _cluster_object(custom, "topologies", topology)["spec"]["levels"] if topology else []
        keys = [level["nodeLabel"] for level in levels]
        yield _flavor(name, nodes, flavor.get("nodeLabels", {}), keys, needed, quota)


def _usable(node: Any) -> bool:
    ready = any(item.type == "Ready" and item.status == "True" for item in node.status.conditions or [])
    return ready and not node.spec.unschedulable


def _labels(node: Any) -> dict[str, str]:
    return node.metadata.labels or {}


def _lacking(node: Any, needed: Mapping[str, str]) -> list[str]:
    """What a node is too small for, as "nvidia.com/gpu: 1 of 8"."""
    from kubernetes.utils.quantity import parse_quantity

    has = node.status.allocatable or {}
    return [
        f"{name}: {has.get(name, 0)} of {amount}"
        for name, amount in needed.items()
        if parse_quantity(has.get(name, 0)) < parse_quantity(amount)
    ]


def _pool(pool: str, nodes: Sequence[Any], needed: Mapping[str, str]) -> Finding:
    """Nodes for tasks of the pipelines, of which one must be large enough for the largest task."""
    what = f"nodes {pool}"
    if not nodes:
        return Finding(what, "failure", "none is ready", f"kubectl label node NODE {POOL}={pool}")
    lacking = min((_lacking(node, needed) for node in nodes), key=len)
    if lacking:
        advice = "give the pool a larger node, or change what the pipelines ask for (pipelines/)"
        return Finding(what, "failure", f"none of {len(nodes)} is large enough ({', '.join(lacking)})", advice)
    return Finding(what, "ok", str(len(nodes)))


def _requests(runtime: Mapping[str, Any]) -> dict[str, str]:
    """What a pod of training takes of a node: its first container; a limit without a request is the request, too."""
    job = runtime["spec"]["template"]["spec"]["replicatedJobs"][0]
    resources = job["template"]["spec"]["template"]["spec"]["containers"][0].get("resources") or {}
    return (resources.get("limits") or {}) | (resources.get("requests") or {})


def _flavor(
    name: str,
    nodes: Sequence[Any],
    labels: Mapping[str, str],
    keys: Sequence[str],
    needed: Mapping[str, str],
    quota: int,
) -> Finding:
    """Nodes of a pool for training: as many as the quota promises, with all labels by which Kueue finds them."""
    what = f"nodes {name}"
    pool = [node for node in nodes if _labels(node).get(POOL) == labels.get(POOL)]
    if not pool:
        return Finding(what, "failure", "none is ready", f"kubectl label node NODE {POOL}={labels.get(POOL)}")
    for node in pool:
        own, called = _labels(node), node.metadata.name
        for key, value in labels.items():
            if own.get(key) != value:
                seen = f"{called} has {key}={own[key]}" if key in own else f"{called} has no label {key}"
                advice = f"expected {value}: set GPU_PRODUCT in the overlay to what the nodes carry, or label the node"
                return Finding(what, "failure", seen, advice)
        if missing := [key for key in keys if key not in own]:
            put = " ".join(f"{key}=NAME" for key in missing)
            advice = f"kubectl label node {called} {put}, or name the labels that the nodes carry in the overlay"
            return Finding(what, "failure", f"{called} has no label {', '.join(missing)}", f"{advice} (TOPOLOGY_…)")
        if lacking := _lacking(node, needed):
            advice = "lower what the overlay lets a training pod take (…_PER_NODE), or see why the node offers less"
            return Finding(what, "failure", f"{called} is too small ({', '.join(lacking)})", advice)
    gpus = sum(int(node.status.allocatable[GPU]) for node in pool)
    if gpus < quota:
        advice = "a job of that size would wait for ever: bring the nodes back, or lower the quota in the overlay"
        return Finding(what, "failure", f"{len(pool)} with {gpus} GPUs, less than the quota of {quota}", advice)
    return Finding(what, "ok", f"{len(pool)} with {gpus} GPUs")


def _rights(authorization: Any, namespace: str) -> Iterator[Finding]:
    """Of the account that steps run under, whoever asks; in a pod of that account, which may not ask, of its own."""
    from kubernetes.client import ApiException

    # Without its groups the account would be judged as a member of none.
    groups = ["system:serviceaccounts", f"system:serviceaccounts:{namespace}", "system:authenticated"]
    subject = {"user": f"system:serviceaccount:{namespace}:{SERVICE_ACCOUNT}", "groups": groups}
    whose, ask = SERVICE_ACCOUNT, authorization.create_subject_access_review
    missing = []
    for attributes in _attributes(namespace):
        try:
            answer = ask({"spec": {**subject, "resourceAttributes": attributes}}, _request_timeout=TIMEOUT_S)
        except ApiException as error:
            if error.status != 403 or not subject:
                raise
            whose, ask, subject = "this account", authorization.create_self_subject_access_review, {}
            answer = ask({"spec": {"resourceAttributes": attributes}}, _request_timeout=TIMEOUT_S)
        if not answer.status.allowed:
            name = "/".join(filter(None, (attributes["resource"], attributes["subresource"], attributes["name"])))
            missing.append(f"{attributes['verb']} {name}")
    what = f"rights of {whose}"
    if missing:
        yield Finding(what, "failure", f"may not {', '.join(missing)}", f"{APPLY} (k8s/base/service-accounts.yaml)")
    else:
        yield Finding(what, "ok", f"may do all that steps do in {namespace}")


def _attributes(namespace: str) -> Iterable[dict[str, str]]:
    for rights, where in ((RIGHTS, namespace), (CLUSTER_RIGHTS, "")):
        for group, resource, name, verbs in rights:
            kind, _, part = resource.partition("/")
            for verb in verbs:
                attributes = {"namespace": where, "group": group, "resource": kind, "subresource": part}
                yield attributes | {"name": name, "verb": verb}


def _account(core: Any, namespace: str) -> Iterator[Finding]:
    core.read_namespaced_service_account(SERVICE_ACCOUNT, namespace, _request_timeout=TIMEOUT_S)
    yield Finding(f"account {SERVICE_ACCOUNT}", "ok", "there")


def _secrets(core: Any, namespace: str) -> Iterator[Finding]:
    """Whether the secrets are there; what they hold is not asked for."""
    from kubernetes.client import ApiException

    made_by_kfp = f"{APPLY}: KFP makes it in a namespace with the label pipelines.kubeflow.org/enabled=true"
    wanted = (
        (namespace, "object-store", ""),
        (namespace, "mlflow", ""),
        (namespace, "mlpipeline-minio-artifact", made_by_kfp),
        (TRACKING, "object-store", ""),
        (TRACKING, "mlflow", ""),
    )
    for where, name, advice in wanted:
        what = f"secret {name} in {where}"
        try:
            core.api_client.call_api(
                f"/api/v1/namespaces/{where}/secrets/{name}",
                "GET",
                header_params={"Accept": NAMES_ALONE},
                response_type="object",
                auth_settings=["BearerToken"],
                _request_timeout=TIMEOUT_S,
            )
        except ApiException as error:
            if error.status == 404:
                yield Finding(what, "failure", "missing", advice or FROM_FILE.format(where, name))
            else:
                yield _refused(what, error.status or 0)
        else:
            yield Finding(what, "ok", "there")


def _claim(core: Any, namespace: str) -> Iterator[Finding]:
    claim = core.read_namespaced_persistent_volume_claim("runs", namespace, _request_timeout=TIMEOUT_S)
    what, phase, modes = "claim runs", claim.status.phase, claim.status.access_modes or []
    if phase != "Bound":
        advice = f"kubectl -n {namespace} describe pvc runs: does its storage class exist, and offer ReadWriteMany?"
        yield Finding(what, "failure", f"{phase}, not Bound", advice)
    elif "ReadWriteMany" not in modes:
        advice = "all nodes write to it: name a storage class that offers ReadWriteMany (STORAGE_CLASS)"
        yield Finding(what, "failure", f"bound as {', '.join(modes)}", advice)
    else:
        yield Finding(what, "ok", f"bound, {(claim.status.capacity or {}).get('storage', '')}")
