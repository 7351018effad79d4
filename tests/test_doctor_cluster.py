"""The doctor of a cluster, asked over HTTP: what the manifests make, on nodes that fit, and what is missing of it."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import yaml

from opensora.doctor import Finding
from opensora.doctor_cluster import CLUSTER_RIGHTS, KINDS, RIGHTS, examine_cluster
from opensora.kubeflow import SERVICE_ACCOUNT, TASK_QUEUE
from tests.conftest import ROOT
from tests.json_server import Request, serve

BASE = ROOT / "k8s" / "base"
USER = f"system:serviceaccount:opensora:{SERVICE_ACCOUNT}"
CORE, KUEUE = "/api/v1/namespaces", "/apis/kueue.x-k8s.io/v1beta2"
REVIEW, SELF_REVIEW = (f"/apis/authorization.k8s.io/v1/{kind}subjectaccessreviews" for kind in ("", "self"))
ACTIVE = {"conditions": [{"type": "Active", "status": "True", "reason": "Ready", "message": "Can admit new workloads"}]}


def documents(name: str) -> dict[tuple[str, str], dict]:
    """The documents of a manifest by kind and name."""
    found = (document for document in yaml.safe_load_all((BASE / name).read_text()))
    return {(document["kind"], document["metadata"]["name"]): document for document in found}


def node(name: str, labels: dict[str, str], **allocatable: str) -> dict:
    size = {"cpu": "94", "memory": "1500Gi", "nvidia.com/gpu": "8"} | allocatable
    ready = {"type": "Ready", "status": "True", "reason": "KubeletReady"}
    return {
        "metadata": {"name": name, "labels": labels},
        "spec": {},
        "status": {"allocatable": size, "conditions": [ready]},
    }


def h800(number: int, **allocatable: str) -> dict:
    labels = {"opensora/pool": "h800", "nvidia.com/gpu.product": "NVIDIA-H800", "kubernetes.io/hostname": f"h{number}"}
    labels |= {"topology.kubernetes.io/block": "b0", "topology.kubernetes.io/rack": f"r{number // 4}"}
    return node(f"h{number}", labels, **allocatable)


class Cluster:
    """Answers by path, access reviews by what the account may do, and what was asked."""

    def __init__(self) -> None:
        queues, runtimes = documents("queues.yaml"), documents("training-runtime.yaml")
        self.nodes = [h800(number) for number in range(8)]
        self.nodes += [node("c0", {"opensora/pool": "captioning"}), node("p0", {"opensora/pool": "cpu"})]
        self.answers: dict[str, dict] = {
            "/apis/v2beta1/healthz": {"multi_user": True},
            "/apis/v2beta1/experiments": {},
            f"{KUEUE}/resourceflavors/h800": queues["ResourceFlavor", "h800"],
            f"{KUEUE}/topologies/datacenter": queues["Topology", "datacenter"],
            "/apis/trainer.kubeflow.org/v1alpha1/clustertrainingruntimes/opensora": runtimes[
                "ClusterTrainingRuntime", "opensora"
            ],
            f"{CORE}/opensora/serviceaccounts/{SERVICE_ACCOUNT}": {"metadata": {"name": SERVICE_ACCOUNT}},
            f"{CORE}/opensora/persistentvolumeclaims/runs": {
                "status": {"phase": "Bound", "accessModes": ["ReadWriteMany"], "capacity": {"storage": "10Ti"}}
            },
        }
        for name in ("opensora", TASK_QUEUE):
            local, whole = (queues[kind, name] | {"status": ACTIVE} for kind in ("LocalQueue", "ClusterQueue"))
            self.answers[f"{KUEUE}/namespaces/opensora/localqueues/{name}"] = local
            self.answers[f"{KUEUE}/clusterqueues/{name}"] = whole
        for name in ("object-store", "mlflow", "mlpipeline-minio-artifact"):
            self.answers[f"{CORE}/opensora/secrets/{name}"] = {"metadata": {"name": name}}
        for name in ("object-store", "mlflow"):
            self.answers[f"{CORE}/opensora-mlflow/secrets/{name}"] = {"metadata": {"name": name}}
        for group, plural, version in KINDS:
            self.answers[f"/apis/apiextensions.k8s.io/v1/customresourcedefinitions/{plural}.{group}"] = {
                "spec": {
                    "group": group,
                    "names": {"kind": plural, "plural": plural},
                    "scope": "Namespaced",
                    "versions": [{"name": version, "served": True, "storage": True}],
                }
            }
        self.forbidden: set[str] = set()
        self.refused: Callable[[dict], bool] = lambda attributes: False
        self.asked: list[Request] = []
        self.users: set[str] = set()
        self.kfp: tuple[int, dict | str] | None = None

    def answer(self, request: Request) -> tuple[int, dict | str]:
        self.asked.append(request)
        if request.path in self.forbidden:
            return 403, {"message": "forbidden"}
        if request.path in (REVIEW, SELF_REVIEW):
            spec = request.body["spec"]
            self.users.add(spec.get("user", "whoever asks"))
            return 201, {"spec": spec, "status": {"allowed": not self.refused(spec["resourceAttributes"])}}
        if request.path == "/api/v1/nodes":
            return 200, {"items": self.nodes}
        if self.kfp and request.path.startswith("/apis/v2beta1/"):
            return self.kfp
        return (200, self.answers[request.path]) if request.path in self.answers else (404, {})

    def edit(self, path: str) -> dict[str, Any]:
        """A document to change."""
        self.answers[path] = copy.deepcopy(self.answers[path])
        return self.answers[path]

    def look(self) -> dict[str, Finding]:
        client = pytest.importorskip("kubernetes.client", reason="the extra `kubeflow` is not installed")
        with serve(self.answer) as url:
            api = client.ApiClient(client.Configuration(host=url))
            return {finding.name: finding for finding in examine_cluster("opensora", "opensora", url, api)}

    def only_red(self, name: str) -> Finding:
        """The finding of that name, the one that is not well."""
        findings = self.look()
        assert [key for key, finding in findings.items() if finding.state != "ok"] == [name]
        assert findings[name].advice
        return findings[name]


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Cluster:
    monkeypatch.setenv("KFP_TOKEN", "secret")
    monkeypatch.delenv("KFP_TOKEN_FILE", raising=False)
    return Cluster()


def test_a_cluster_as_the_manifests_make_it_is_well(cluster: Cluster) -> None:
    findings = cluster.look()
    assert {finding.state for finding in findings.values()} == {"ok"}
    assert findings["queue opensora"].seen == "active; GPUs: h800 64"
    assert findings["queue opensora-data"].seen == "active; GPUs: captioning 16"
    assert findings["nodes h800"].seen == "8 with 64 GPUs"
    assert cluster.users == {USER}  # not those of whoever sits at the desk
    for request in cluster.asked:
        if request.path.startswith("/apis/v2beta1/"):
            assert request.headers["Authorization"] == "Bearer secret"
        if "/secrets/" in request.path:  # that it is there, not what it holds
            assert "as=PartialObjectMetadata" in request.headers["Accept"]


def test_nodes_without_the_labels_that_kueue_looks_for(cluster: Cluster) -> None:
    del cluster.nodes[3]["metadata"]["labels"]["topology.kubernetes.io/rack"]
    found = cluster.only_red("nodes h800")
    assert found.seen == "h3 has no label topology.kubernetes.io/rack"
    assert "kubectl label node h3 topology.kubernetes.io/rack=NAME" in found.advice
    cluster.nodes[3] = h800(3)
    cluster.nodes[5]["metadata"]["labels"]["nvidia.com/gpu.product"] = "NVIDIA-H800-80GB"
    found = cluster.only_red("nodes h800")
    assert found.seen == "h5 has nvidia.com/gpu.product=NVIDIA-H800-80GB"
    assert "expected NVIDIA-H800: set GPU_PRODUCT" in found.advice
    cluster.nodes = [item for item in cluster.nodes if item["metadata"]["name"] != "p0"]
    cluster.nodes[5] = h800(5)
    assert cluster.only_red("nodes cpu").advice == "kubectl label node NODE opensora/pool=cpu"


def test_nodes_that_are_too_few_or_too_small(cluster: Cluster) -> None:
    cluster.nodes[0]["spec"]["unschedulable"] = True
    assert cluster.only_red("nodes h800").seen == "7 with 56 GPUs, less than the quota of 64"
    cluster.nodes[0] = h800(0, cpu="80")
    assert cluster.only_red("nodes h800").seen == "h0 is too small (cpu: 80 of 88)"
    cluster.nodes[0] = h800(0)
    cluster.nodes[8] = node("c0", {"opensora/pool": "captioning"}, **{"nvidia.com/gpu": "1"})
    found = cluster.only_red("nodes captioning")
    assert found.seen == "none of 1 is large enough (nvidia.com/gpu: 1 of 8)"


def test_a_queue_that_admits_nothing(cluster: Cluster) -> None:
    queue = cluster.edit(f"{KUEUE}/clusterqueues/opensora")
    message = "Can't admit new workloads: references missing ResourceFlavor(s): h800"
    queue["status"]["conditions"][0] |= {"status": "False", "reason": "FlavorNotFound", "message": message}
    found = cluster.only_red("queue opensora")
    assert found.seen == f"not active: FlavorNotFound: {message}"
    assert found.advice.startswith("kubectl describe clusterqueue opensora; ")
    del queue["status"]
    assert "Kueue has not looked at the clusterqueue yet" in cluster.only_red("queue opensora").seen


def test_rights_are_those_of_the_account_that_steps_run_under(cluster: Cluster) -> None:
    cluster.refused = lambda attributes: attributes["verb"] in ("patch", "delete") or attributes["name"] != ""
    found = cluster.only_red(f"rights of {SERVICE_ACCOUNT}")
    for text in ("patch trainjobs, delete trainjobs", "get configmaps/kfp-launcher", "get secrets/mlpipeline-minio"):
        assert text in found.seen
    assert "create trainjobs" not in found.seen
    cluster.refused, cluster.users = lambda attributes: False, set()
    cluster.forbidden = {REVIEW}  # in a pod of that account, which may ask of itself alone
    assert cluster.look()["rights of this account"].state == "ok"
    assert cluster.users == {"whoever asks"}


def test_what_is_missing_or_unbound(cluster: Cluster) -> None:
    del cluster.answers[f"{CORE}/opensora-mlflow/secrets/mlflow"]
    found = cluster.only_red("secret mlflow in opensora-mlflow")
    assert found.advice.startswith("kubectl -n opensora-mlflow create secret generic mlflow --from-env-file ")
    cluster.forbidden = {f"{CORE}/opensora/secrets/object-store", f"{CORE}/opensora-mlflow/secrets/mlflow"}
    states = {finding.name: finding.state for finding in cluster.look().values() if finding.state != "ok"}
    assert states == dict.fromkeys(("secret object-store in opensora", "secret mlflow in opensora-mlflow"), "warning")

    cluster = Cluster()
    cluster.edit(f"{CORE}/opensora/persistentvolumeclaims/runs")["status"] = {"phase": "Pending"}
    assert cluster.only_red("claim runs").seen == "Pending, not Bound"
    cluster.edit(f"{CORE}/opensora/persistentvolumeclaims/runs")["status"] = {
        "phase": "Bound",
        "accessModes": ["ReadWriteOnce"],
    }
    assert cluster.only_red("claim runs").seen == "bound as ReadWriteOnce"

    cluster = Cluster()
    crd = cluster.edit("/apis/apiextensions.k8s.io/v1/customresourcedefinitions/clusterqueues.kueue.x-k8s.io")
    crd["spec"]["versions"][0]["name"] = "v1beta1"
    assert "serves it" in cluster.only_red("clusterqueues.kueue.x-k8s.io").advice
    del cluster.answers[f"{CORE}/opensora/serviceaccounts/{SERVICE_ACCOUNT}"]
    assert cluster.look()[f"account {SERVICE_ACCOUNT}"].state == "failure"


@pytest.mark.parametrize(
    ("answer", "seen"),
    [
        ((200, "<html>sign in</html>"), "is no Kubeflow Pipelines API (HTTP 200)"),
        ((302, "<html>sign in</html>"), "refuses the token of KFP_TOKEN or KFP_TOKEN_FILE (HTTP 302)"),
        ((303, {}), "refuses the token of KFP_TOKEN or KFP_TOKEN_FILE (HTTP 303)"),
        ((401, {}), "refuses the token of KFP_TOKEN or KFP_TOKEN_FILE (HTTP 401)"),
    ],
)
def test_a_page_that_asks_to_sign_in_is_no_pipelines_api(cluster: Cluster, answer: tuple[int, Any], seen: str) -> None:
    cluster.kfp = answer
    assert seen in cluster.only_red("Kubeflow Pipelines").seen


def test_pipelines_that_are_healthy_may_still_not_let_one_in(cluster: Cluster) -> None:
    cluster.forbidden = {"/apis/v2beta1/experiments"}
    assert "refuses the token" in cluster.only_red("Kubeflow Pipelines").seen
    cluster.kfp = (400, {"error": "Invalid", "message": "Invalid input\nerror", "code": 3})
    assert cluster.only_red("Kubeflow Pipelines").seen.endswith(" says: Invalid input error (HTTP 400)")
    cluster.kfp = (200, {"multi_user": False})
    assert "single-user mode" in cluster.only_red("Kubeflow Pipelines").seen


def test_an_unreachable_cluster_is_one_failure(cluster: Cluster) -> None:
    client = pytest.importorskip("kubernetes.client", reason="the extra `kubeflow` is not installed")
    with serve(cluster.answer) as url:
        pass
    api = client.ApiClient(client.Configuration(host=url))
    findings = list(examine_cluster("opensora", "opensora", url, api))
    assert [finding.name for finding in findings] == ["Kubeflow Pipelines", "Kubernetes"]
    assert "kubectl version" in findings[1].advice


@pytest.mark.parametrize(
    ("rights", "kind", "role"), [(RIGHTS, "RoleBinding", "Role"), (CLUSTER_RIGHTS, "ClusterRoleBinding", "ClusterRole")]
)
def test_the_manifests_grant_what_the_doctor_asks_for(rights: tuple, kind: str, role: str) -> None:
    found = documents("service-accounts.yaml")
    subject = {"kind": "ServiceAccount", "name": SERVICE_ACCOUNT, "namespace": "opensora"}
    bindings = [value for (what, _), value in found.items() if what == kind and subject in value["subjects"]]
    own = [found[role, name] for name in (value["roleRef"]["name"] for value in bindings) if (role, name) in found]
    rules = [rule for value in own for rule in value["rules"]]  # another role comes with KFP
    for group, resource, name, verbs in rights:
        for verb in verbs:
            assert any(
                group in rule["apiGroups"]
                and resource in rule["resources"]
                and verb in rule["verbs"]
                and ("resourceNames" not in rule or name in rule["resourceNames"])
                for rule in rules
            ), f"{verb} {group}/{resource} {name}"


def test_the_doctor_may_read_what_it_looks_at_in_a_pod_of_that_account() -> None:
    rules = documents("service-accounts.yaml")["ClusterRole", "opensora-reader"]["rules"]
    readable = {name for rule in rules for name in rule["resources"]}
    assert {"clusterqueues", "resourceflavors", "topologies", "nodes", "customresourcedefinitions"} <= readable
