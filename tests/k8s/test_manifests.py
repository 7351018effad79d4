"""What kustomize renders: valid against the schemas, and as guarded as the pages of docs say."""

import shutil
import subprocess
import sys
from collections.abc import Iterator
from functools import cache

import pytest
import yaml

from tests.conftest import ROOT
from tests.shared import shared

OVERLAYS = sorted(path.parent.name for path in (ROOT / "k8s" / "overlays").glob("*/kustomization.yaml"))

pytestmark = pytest.mark.skipif(not shutil.which("kubectl"), reason="kubectl is not installed: it renders the overlays")


@cache
def render(overlay: str) -> str:
    done = subprocess.run(
        ["kubectl", "kustomize", str(ROOT / "k8s" / "overlays" / overlay)],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def documents(overlay: str, kind: str = "") -> list[dict]:
    return [document for document in yaml.safe_load_all(render(overlay)) if kind in ("", document["kind"])]


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
    for name, pod in found.items():
        context = pod["securityContext"]
        assert context["runAsNonRoot"], name
        assert context["runAsUser"] > 0, name
        assert context["seccompProfile"]["type"] == "RuntimeDefault", name
        assert pod["automountServiceAccountToken"] is False, name
        for container in pod["containers"]:
            own = container["securityContext"]
            assert own["allowPrivilegeEscalation"] is False, name
            assert own["readOnlyRootFilesystem"] is True, name
            assert own["capabilities"]["drop"] == ["ALL"], name
            assert {"cpu", "memory"} <= set(container["resources"]["limits"]), name
            assert not container["image"].endswith(":latest"), container["image"]
            assert ":" in container["image"], container["image"]


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


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_the_queue_covers_what_a_training_node_asks_for(overlay: str) -> None:
    (queue,) = documents(overlay, "ClusterQueue")
    covered = {name for group in queue["spec"]["resourceGroups"] for name in group["coveredResources"]}
    (runtime,) = documents(overlay, "ClusterTrainingRuntime")
    (job,) = runtime["spec"]["template"]["spec"]["replicatedJobs"]
    (container,) = job["template"]["spec"]["template"]["spec"]["containers"]
    assert set(container["resources"]["requests"]) <= covered


def test_h800_is_the_published_sixty_four_gpus() -> None:
    (runtime,) = documents("h800", "ClusterTrainingRuntime")
    (job,) = runtime["spec"]["template"]["spec"]["replicatedJobs"]
    pod = job["template"]["spec"]["template"]["spec"]
    per_node = int(pod["containers"][0]["resources"]["limits"]["nvidia.com/gpu"])
    assert runtime["spec"]["mlPolicy"]["numNodes"] * per_node == 64
    # One checkpoint must fit between SIGTERM and torchrun's own limit, and that one below the pod's.
    env = {item["name"]: item.get("value") for item in pod["containers"][0]["env"]}
    assert int(env["PET_SHUTDOWN_TIMEOUT"]) < pod["terminationGracePeriodSeconds"]
    assert "NCCL_IB_HCA" in env
    assert "NCCL_IB_DISABLE" not in env
    assert pod["containers"][0]["securityContext"]["capabilities"]["add"] == ["IPC_LOCK"]


def test_secrets_are_named_and_never_held() -> None:
    for overlay in OVERLAYS:
        assert not documents(overlay, "Secret")


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_site_values_arrive(overlay: str) -> None:
    (site,) = (d for d in documents(overlay, "ConfigMap") if d["metadata"]["name"] == "site")
    rest = [d for d in documents(overlay) if d is not site and d["kind"] != "ConfigMap"]
    text = yaml.safe_dump_all(rest)
    for name, value in site["data"].items():
        assert value in text, f"{name} is used nowhere"


def round_trip(model: str, document: dict) -> None:
    """Kubeflow's own models drop what they do not know without a word: nothing may be missing afterwards."""
    models = pytest.importorskip("kubeflow_trainer_api.models")
    again = getattr(models, model).from_dict(document).to_dict()
    assert again == document


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_the_runtime_survives_kubeflows_own_models(overlay: str) -> None:
    (runtime,) = documents(overlay, "ClusterTrainingRuntime")
    round_trip("TrainerV1alpha1ClusterTrainingRuntime", runtime)


def test_the_template_of_a_job_is_what_the_launcher_makes() -> None:
    from components.launch import arguments
    from components.step import Job
    from components.trainjob import TrainJob

    template = yaml.safe_load((ROOT / "k8s" / "trainjob.yaml").read_text())
    round_trip("TrainerV1alpha1TrainJob", template)
    trainer = template["spec"]["trainer"]
    made = TrainJob(
        name=template["metadata"]["name"],
        namespace="opensora",
        stage="train_video",
        image=trainer["image"],
        args=tuple(arguments("train_video", Job("h800", [], "/runs/first", "", ""))),
        nodes=8,
        gpus_per_node=8,
        env={item["name"]: item["value"] for item in trainer["env"]},
    )
    assert made.document() == template
