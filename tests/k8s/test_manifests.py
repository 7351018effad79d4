"""What kustomize renders: valid against the schemas, as guarded as the pages of docs say, and a site's own values."""

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import yaml
from kubernetes.utils.quantity import parse_quantity

from opensora.doctor_cluster import TASKS
from opensora.kubeflow import SERVICE_ACCOUNT, TASK_QUEUE
from tests.conftest import ROOT
from tests.shared import shared

K8S = ROOT / "k8s"
# With the overlay `site`, where somebody has made one; and the published cluster on RoCE.
OVERLAYS = [*sorted(path.parent.name for path in K8S.glob("overlays/*/kustomization.yaml")), "h800 by roce"]

pytestmark = pytest.mark.skipif(not shutil.which("kubectl"), reason="kubectl is not installed: it renders the overlays")


def kustomize(folder: Path) -> str:
    done = subprocess.run(
        ["kubectl", "kustomize", str(folder)], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def copied(edit: Callable[[str], str]) -> str:
    """The render of an edited copy of h800: what a site does."""
    text = edit((K8S / "overlays" / "h800" / "kustomization.yaml").read_text())
    with TemporaryDirectory() as name:
        folder = Path(name).resolve()
        (folder / "kustomization.yaml").write_text(text.replace("../../", f"{os.path.relpath(K8S, folder)}/"))
        return kustomize(folder)


def on_roce(text: str) -> str:
    return text.replace("components/rdma-infiniband", "components/rdma-roce").replace(
        "# - NCCL_IB_GID", "- NCCL_IB_GID"
    )


@cache
def render(overlay: str) -> str:
    return copied(on_roce) if overlay == "h800 by roce" else kustomize(K8S / "overlays" / overlay)


def documents(overlay: str, kind: str = "") -> list[dict]:
    return [document for document in yaml.safe_load_all(render(overlay)) if kind in ("", document["kind"])]


def named(overlay: str, kind: str, name: str) -> dict:
    (found,) = (document for document in documents(overlay, kind) if document["metadata"]["name"] == name)
    return found


def pods(overlay: str) -> Iterator[tuple[str, dict]]:
    """Every pod template, wherever it stands."""

    def walk(node: object, path: str) -> Iterator[tuple[str, dict]]:
        if isinstance(node, dict):
            if "containers" in node:
                yield path, node
            for name, value in node.items():
                yield from walk(value, f"{path}.{name}")
        elif isinstance(node, list):
            for value in node:
                yield from walk(value, path)

    for document in documents(overlay):
        yield from walk(document, f"{document['kind']}/{document['metadata']['name']}")


def training_pod(overlay: str) -> dict:
    """Template of a node's pod."""
    runtime = named(overlay, "ClusterTrainingRuntime", "opensora")
    (job,) = runtime["spec"]["template"]["spec"]["replicatedJobs"]
    return job["template"]["spec"]["template"]


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_documents_are_valid(overlay: str) -> None:
    tool = shared("tools/check_manifests.py")
    done = subprocess.run(
        [sys.executable, str(tool), "-"],
        input=render(overlay),
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_every_container_is_unprivileged_and_limited(overlay: str) -> None:
    found = dict(pods(overlay))
    assert found
    as_root = {name for name, pod in found.items() if pod["securityContext"].get("runAsUser") == 0}
    assert as_root == {"Job/own-runs.spec.template.spec"}
    accounts = {account["metadata"]["name"]: account for account in documents(overlay, "ServiceAccount")}
    for name, pod in found.items():
        context = pod["securityContext"]
        assert context.get("runAsNonRoot") or name in as_root, name
        assert context["seccompProfile"]["type"] == "RuntimeDefault", name
        assert pod["automountServiceAccountToken"] is False, name
        account = accounts.get(pod.get("serviceAccountName", ""), {})
        assert {"name": "registry"} in pod.get("imagePullSecrets", account.get("imagePullSecrets", [])), name
        for container in pod["containers"]:
            own = container["securityContext"]
            assert own["allowPrivilegeEscalation"] is False, name
            assert own["readOnlyRootFilesystem"] is True, name
            assert own["capabilities"]["drop"] == ["ALL"], name
            assert name not in as_root or own["capabilities"]["add"] == ["CHOWN"]
            assert {"cpu", "memory"} <= set(container["resources"]["limits"]), name
            assert not container["image"].endswith(":latest"), container["image"]
            assert ":" in container["image"], container["image"]


@pytest.mark.skipif(os.getuid() != 0, reason="only root gives a folder away")
def test_the_shared_folder_becomes_that_of_the_user_of_all_images(tmp_path: Path) -> None:
    (container,) = named("local", "Job", "own-runs")["spec"]["template"]["spec"]["containers"]
    (mount,) = container["volumeMounts"]
    command = [str(tmp_path) if word == mount["mountPath"] else word for word in container["command"]]
    assert str(tmp_path) in command
    subprocess.run(command, check=True, timeout=60)
    context = training_pod("local")["spec"]["securityContext"]
    assert (tmp_path.stat().st_uid, tmp_path.stat().st_gid) == (context["runAsUser"], context["runAsGroup"])
    assert f"USER {context['runAsUser']}:" in (ROOT / "components" / "images" / "Containerfile").read_text()


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_servers_are_probed(overlay: str) -> None:
    for kind in ("Deployment", "StatefulSet"):
        for document in documents(overlay, kind):
            for container in document["spec"]["template"]["spec"]["containers"]:
                assert {"startupProbe", "readinessProbe", "livenessProbe"} <= set(container)


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_every_namespace_denies_first_and_enforces_a_pod_standard(overlay: str) -> None:
    denied = {
        policy["metadata"]["namespace"]
        for policy in documents(overlay, "NetworkPolicy")
        if policy["spec"]["podSelector"] == {} and "ingress" not in policy["spec"] and "egress" not in policy["spec"]
    }
    for namespace in documents(overlay, "Namespace"):
        assert namespace["metadata"]["name"] in denied
        assert "pod-security.kubernetes.io/enforce" in namespace["metadata"]["labels"]


def test_pods_of_kfp_reach_the_api_and_kubeflow_whatever_their_labels() -> None:
    """KFP's driver and launcher and Argo's sidecar are in pods that carry no label of ours."""
    ways = [
        (to, rule.get("ports", []))
        for policy in documents("h800", "NetworkPolicy")
        if policy["metadata"]["namespace"] == "opensora" and policy["spec"]["podSelector"] == {}
        for rule in policy["spec"].get("egress", [])
        for to in rule["to"]
    ]
    api = named("h800", "ConfigMap", "site")["data"]["API_SERVER_CIDR"]
    assert ({"ipBlock": {"cidr": api}}, [{"protocol": "TCP", "port": 443}, {"protocol": "TCP", "port": 6443}]) in ways
    assert ({"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "kubeflow"}}}, []) in ways
    assert not [to for to, _ in ways if to.get("ipBlock", {}).get("cidr") == "0.0.0.0/0"]  # not all may go outside


def test_kfps_multi_user_mode_finds_its_namespace() -> None:
    labels = named("h800", "Namespace", "opensora")["metadata"]["labels"]
    assert labels["pipelines.kubeflow.org/enabled"] == "true"
    assert labels["app.kubernetes.io/part-of"] == "kubeflow-profile"


def rights(account: str) -> set[tuple[str, str, str, str]]:
    """Verb, group, resource and name ("" for any) of all that an account may do in its namespace."""
    roles = {
        binding["roleRef"]["name"]
        for binding in documents("h800", "RoleBinding")
        if {"kind": "ServiceAccount", "name": account, "namespace": "opensora"} in binding["subjects"]
    }
    return {
        (verb, group, resource, name)
        for role in documents("h800", "Role")
        if role["metadata"]["name"] in roles
        for rule in role["rules"]
        for verb in rule["verbs"]
        for group in rule["apiGroups"]
        for resource in rule["resources"]
        for name in rule.get("resourceNames", [""])
    }


def test_steps_have_the_rights_that_kfp_needs_and_write_nothing_else() -> None:
    found = rights(SERVICE_ACCOUNT)
    needed = {
        ("get", "", "configmaps", "kfp-launcher"),
        ("get", "", "secrets", "mlpipeline-minio-artifact"),
        ("create", "argoproj.io", "workflowtaskresults", ""),
        ("patch", "argoproj.io", "workflowtaskresults", ""),
        ("list", "argoproj.io", "workflowtasksets", ""),
        ("watch", "argoproj.io", "workflowtasksets", ""),
        ("patch", "argoproj.io", "workflowtasksets/status", ""),
    }
    assert needed <= found
    written = {(group, resource) for verb, group, resource, _ in found if verb not in ("get", "list", "watch")}
    assert written == {
        ("trainer.kubeflow.org", "trainjobs"),
        ("argoproj.io", "workflowtaskresults"),
        ("argoproj.io", "workflowtasksets/status"),
    }
    assert all(name for _, _, resource, name in found if resource == "secrets")
    assert "*" not in {part for right in found for part in right}


def test_training_pods_have_no_rights_and_the_submitter_has_kfps_own() -> None:
    assert training_pod("h800")["spec"]["serviceAccountName"] == "trainer"
    bound = {
        (subject["name"], binding["roleRef"]["kind"], binding["roleRef"]["name"])
        for kind in ("RoleBinding", "ClusterRoleBinding")
        for binding in documents("h800", kind)
        for subject in binding["subjects"]
    }
    assert "trainer" not in {account for account, _, _ in bound}
    assert [right for right in bound if right[0] == "submitter"] == [
        ("submitter", "ClusterRole", "kubeflow-pipelines-edit")
    ]


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_one_flavor_with_the_topology_has_all_that_a_training_pod_asks_for(overlay: str) -> None:
    """Kueue refuses a pod with a topology whose resources come from two flavors, or from one without a topology."""
    template = training_pod(overlay)
    (container,) = template["spec"]["containers"]
    requests = container["resources"]["requests"]
    assert requests == container["resources"]["limits"]
    (group,) = named(overlay, "ClusterQueue", "opensora")["spec"]["resourceGroups"]
    assert set(requests) == set(group["coveredResources"])
    for flavor in group["flavors"]:
        topology = named(overlay, "ResourceFlavor", flavor["name"])["spec"]["topologyName"]
        levels = [level["nodeLabel"] for level in named(overlay, "Topology", topology)["spec"]["levels"]]
        assert template["metadata"]["annotations"]["kueue.x-k8s.io/podset-required-topology"] in levels
        assert [resource["name"] for resource in flavor["resources"]] == group["coveredResources"]


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_the_quota_holds_the_nodes_it_is_for(overlay: str) -> None:
    """Kustomize cannot multiply, so the products stand beside their factors."""
    nodes = named(overlay, "ClusterTrainingRuntime", "opensora")["spec"]["mlPolicy"]["numNodes"]
    (container,) = training_pod(overlay)["spec"]["containers"]
    (group,) = named(overlay, "ClusterQueue", "opensora")["spec"]["resourceGroups"]
    (flavor,) = group["flavors"]
    for resource in flavor["resources"]:
        name, quota = resource["name"], parse_quantity(resource["nominalQuota"])
        wanted = nodes * parse_quantity(container["resources"]["requests"][name])
        assert quota >= wanted, f"{name}: {quota} is less than {wanted}, what {nodes} nodes ask for"


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_the_largest_task_of_a_pool_fits_its_quota(overlay: str) -> None:
    """Else it would wait for ever."""
    (group,) = named(overlay, "ClusterQueue", TASK_QUEUE)["spec"]["resourceGroups"]
    assert {flavor["name"] for flavor in group["flavors"]} == set(TASKS)
    for flavor in group["flavors"]:
        quotas = {resource["name"]: parse_quantity(resource["nominalQuota"]) for resource in flavor["resources"]}
        assert set(quotas) == set(group["coveredResources"])
        for name, amount in TASKS[flavor["name"]].items():
            assert quotas[name] >= parse_quantity(amount), f"{flavor['name']}: {name}"


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_no_room_is_privileged(overlay: str) -> None:
    for namespace in documents(overlay, "Namespace"):
        assert namespace["metadata"]["labels"]["pod-security.kubernetes.io/enforce"] in ("baseline", "restricted")


def test_h800_is_the_published_sixty_four_gpus() -> None:
    runtime, pod = named("h800", "ClusterTrainingRuntime", "opensora"), training_pod("h800")["spec"]
    per_node = int(pod["containers"][0]["resources"]["limits"]["nvidia.com/gpu"])
    assert runtime["spec"]["mlPolicy"]["numNodes"] * per_node == 64
    # One checkpoint must fit between SIGTERM and torchrun's own limit, and that one below the pod's.
    env = {item["name"]: item.get("value") for item in pod["containers"][0]["env"]}
    assert int(env["PET_SHUTDOWN_TIMEOUT"]) < pod["terminationGracePeriodSeconds"]
    assert "NCCL_IB_HCA" in env
    assert "NCCL_IB_DISABLE" not in env


def test_secrets_are_named_and_never_held() -> None:
    for overlay in OVERLAYS:
        assert not documents(overlay, "Secret")


def test_one_file_sets_a_site_and_every_value_arrives() -> None:
    """A copy in which each value is one of a kind: each is found where it is used, no old one is left there."""
    text = on_roce((K8S / "overlays" / "h800" / "kustomization.yaml").read_text())
    old = dict(re.findall(r"- ([A-Z_]+)=(\S+)", text))
    # Numbers stay numbers, as the schemas of some want them.
    new = {key: str(7000 + i) if text.isdigit() else f"{key.lower()}-{i}" for i, (key, text) in enumerate(old.items())}

    def edit(text: str) -> str:
        return re.sub(r"- ([A-Z_]+)=\S+", lambda found: f"- {found[1]}={new[found[1]]}", on_roce(text))

    rendered = {
        (document["kind"], document["metadata"]["name"]): document
        for document in yaml.safe_load_all(copied(edit))
        if document["metadata"]["name"] != "site"
    }
    result = yaml.safe_dump_all(rendered.values())
    for name, value in new.items():
        assert value in result, f"{name} is used nowhere"
    for name in ("GPU_PRODUCT", "STORAGE_SIZE", "MEMORY_PER_NODE", "GPU_POOL_CPU", "TOPOLOGY_BLOCK", "MLFLOW_IMAGE"):
        assert old[name] not in result, f"{name} stands outside the overlay as well"
    (job,) = rendered["ClusterTrainingRuntime", "opensora"]["spec"]["template"]["spec"]["replicatedJobs"]
    (container,) = job["template"]["spec"]["template"]["spec"]["containers"]
    (group,) = rendered["ClusterQueue", "opensora"]["spec"]["resourceGroups"]
    quota = {item["name"]: item["nominalQuota"] for item in group["flavors"][0]["resources"]}
    for name in ("nvidia.com/gpu", "rdma/roce"):
        assert container["resources"]["requests"][name] == new["GPUS_PER_NODE"]
        assert quota[name] == new["GPU_POOL_GPUS"]


def test_an_overlay_is_one_file_and_that_of_a_site_keeps_the_tree_clean() -> None:
    """`pipeline submit` refuses a tree that differs from its commit: a site's values are no difference."""
    for path in (path for path in (K8S / "overlays").iterdir() if path.name != "site"):
        assert [file.name for file in path.iterdir()] == ["kustomization.yaml"], path
    for path in ("k8s/overlays/site/kustomization.yaml", "object-store.env"):
        ignored = ["git", "-C", str(ROOT), "check-ignore", "--quiet", path]
        assert subprocess.run(ignored, timeout=60, check=False).returncode == 0, path
