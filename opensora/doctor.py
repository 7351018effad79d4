"""Is this machine, or this cluster, ready? Each check says what it saw and, where that will not do, what to do."""

import os
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from opensora.config import Config

GIB = 2**30
DISK_GIB = 10  # of the demo and its environment, with room to spare
DECODERS = ("h264", "hevc", "vp9", "av1")
TIMEOUT_S = 10
# Group, kind in plural and version that k8s/ is written for.
KINDS = (
    ("trainer.kubeflow.org", "trainjobs", "v1alpha1"),
    ("trainer.kubeflow.org", "clustertrainingruntimes", "v1alpha1"),
    ("jobset.x-k8s.io", "jobsets", "v1alpha2"),
    ("kueue.x-k8s.io", "clusterqueues", "v1beta2"),
)
VERBS = ("create", "get", "list", "watch", "patch", "delete")


@dataclass(frozen=True)
class Finding:
    """What a check saw. A warning does not stop the chain; a failure does."""

    name: str
    state: Literal["ok", "warning", "failure"]
    seen: str
    advice: str = ""


def examine(config: "Config", root: Path) -> Iterator[Finding]:
    """Check this machine for a profile, whose results go below `root`; one finding after the other."""
    checks: list[Callable[[], Iterator[Finding]]] = [
        _python,
        lambda: _torch(config),
        _video,
        lambda: _space(root),
        lambda: _weights(config),
        _dvc,
        lambda: _mlflow(root),
    ]
    for check in checks:
        yield from check()


def _python() -> Iterator[Finding]:
    version = ".".join(map(str, sys.version_info[:3]))
    good = sys.version_info >= (3, 11)
    yield Finding("Python", "ok" if good else "failure", version, "" if good else "install Python 3.11 or newer")


def _torch(config: "Config") -> Iterator[Finding]:
    try:
        import torch
    except ImportError as error:
        yield Finding("PyTorch", "failure", str(error), "run `make setup`")
        return
    yield Finding("PyTorch", "ok", torch.__version__)
    if not torch.cuda.is_available():
        needed = config.profile in ("single_gpu", "h800")
        advice = f"profile {config.profile} needs one: check the driver by nvidia-smi, or choose the profile demo"
        yield Finding("GPU", "failure" if needed else "ok", "none", advice if needed else "")
        return
    for index in range(torch.cuda.device_count()):
        about = torch.cuda.get_device_properties(index)
        yield Finding(
            f"GPU {index}", "ok", f"{about.name}, {about.total_memory / GIB:.0f} GiB, CUDA {torch.version.cuda}"
        )


def _video() -> Iterator[Finding]:
    """Write a clip as the chain does and read it back as training does."""
    import av
    import numpy as np

    missing = [name for name in DECODERS if name not in av.codecs_available]
    yield Finding(
        "decoders",
        "warning" if missing else "ok",
        f"{len(DECODERS) - len(missing)} of {len(DECODERS)}" + (f", without {', '.join(missing)}" if missing else ""),
        "videos of these codecs will be dropped; install PyAV's own wheel (pip install av)" if missing else "",
    )
    from opensora.clip_file import write_clip
    from opensora.data.video import read_frames

    advice = "install PyAV's own wheel (pip install av)"
    frames = np.random.default_rng(0).integers(0, 255, (8, 64, 64, 3), np.uint8)
    with TemporaryDirectory() as folder:
        path = Path(folder) / "clip.mp4"
        try:
            write_clip(path, frames, 8)
        except Exception as error:
            yield Finding(
                "H.264", "failure", f"cannot be written: {error}", "install PyAV's own wheel (pip install av)"
            )
            return
        read = read_frames(path.read_bytes())
    good = read.shape == frames.shape
    seen = f"{len(read)} of {len(frames)} frames written and read back by PyAV {av.__version__}"
    yield Finding("H.264", "ok" if good else "failure", seen, "" if good else advice)


def _space(root: Path) -> Iterator[Finding]:
    there = next(path for path in (root.resolve(), *root.resolve().parents) if path.exists())
    free = shutil.disk_usage(there).free / GIB
    advice = f"free some, or give --workdir on a larger disk: the demo needs {DISK_GIB} GiB, your own videos more"
    yield Finding("disk", "ok" if free >= DISK_GIB else "warning", f"{free:.0f} GiB free at {there}", advice)
    shared = Path("/dev/shm")
    if shared.is_dir():
        size = shutil.disk_usage(shared).free / GIB
        advice = "mount a memory volume there: processes that read training data pass batches through it"
        yield Finding("/dev/shm", "ok" if size >= 1 else "warning", f"{size:.1f} GiB free", advice)


def _weights(config: "Config") -> Iterator[Finding]:
    if config.demo.build_models:
        return
    from opensora.config import UserError
    from opensora.weights import find_weights

    names = [config.encode.vae, config.encode.text_encoder]
    names += [config.caption.model] if config.caption.backend == "llava" else []
    names += [stage.init_from for stage in (config.train_image, config.train_video) if stage.init_from]
    judges = config.evaluate
    names += [name for name in (judges.videomae, judges.i3d, judges.inception, judges.clip) if name]
    for name in dict.fromkeys(names):
        try:
            yield Finding(f"weights {name}", "ok", str(find_weights(name, Path(config.weights_dir), config.offline)))
        except UserError as error:
            yield Finding(f"weights {name}", "failure", "missing", str(error))


def _dvc() -> Iterator[Finding]:
    from subprocess import run

    command = Path(sys.executable).with_name("dvc")
    if not command.is_file():
        yield Finding(
            "DVC", "warning", "not installed beside this Python", "run `make setup`; `opensora run` needs none"
        )
        return
    if not Path(".dvc").is_dir():
        yield Finding("DVC", "warning", "no .dvc here", "run inside the project's folder, or `dvc init --no-scm`")
        return
    done = run([command, "remote", "list"], capture_output=True, text=True, timeout=60, check=False)
    remotes = [" ".join(line.split()) for line in done.stdout.splitlines()]
    advice = "`dvc remote add -d store s3://bucket/folder`, to share data and results; without one they stay here"
    yield Finding("DVC remote", "ok" if remotes else "warning", "; ".join(remotes) or "none", "" if remotes else advice)


def _mlflow(root: Path) -> Iterator[Finding]:
    uri = os.environ.get("MLFLOW_TRACKING_URI", "")
    if not uri.startswith("http"):
        yield Finding("MLflow", "ok", uri or f"a file below {root}")
        return
    import requests

    from opensora.tracking.redact import redact

    user = os.environ.get("MLFLOW_TRACKING_USERNAME")
    login = (user, os.environ.get("MLFLOW_TRACKING_PASSWORD", "")) if user else None
    address = f"{uri.rstrip('/')}/api/2.0/mlflow/experiments/search"
    try:  # /health answers even to those whom the server refuses
        answer = requests.post(address, json={"max_results": 1}, auth=login, timeout=TIMEOUT_S)
    except requests.RequestException as error:
        advice = "start the server or unset MLFLOW_TRACKING_URI; training goes on without it and sends its points later"
        yield Finding("MLflow", "failure", f"{redact(uri)}: {type(error).__name__}", advice)
        return
    advice = {
        401: "set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD",
        403: "add this name of the server to its --allowed-hosts, or this user to its permissions",
    }.get(answer.status_code, "look at the server's log")
    yield Finding("MLflow", "ok" if answer.ok else "failure", f"{redact(uri)}: HTTP {answer.status_code}", advice)


def examine_cluster(namespace: str, queue: str, kfp_host: str, api_client: Any = None) -> Iterator[Finding]:
    """Check what k8s/ should have made, through the account that the steps run under or the one of ~/.kube/config.

    Args:
        api_client: of the `kubernetes` package; None takes the account that is there.
    """
    yield _kfp(kfp_host)
    try:
        from kubernetes import client, config
    except ImportError:
        yield Finding("Kubernetes", "failure", "no client", "pip install 'opensora-workflow[kubeflow]'")
        return
    try:
        if api_client is None:
            try:
                config.load_incluster_config()
            except config.ConfigException:
                config.load_kube_config()
    except config.ConfigException as error:
        yield Finding("Kubernetes", "failure", str(error), "run in a pod, or set KUBECONFIG")
        return
    custom, core = client.CustomObjectsApi(api_client), client.CoreV1Api(api_client)
    try:
        yield from _kinds(client.ApiextensionsV1Api(api_client))
        yield from _queue(custom, namespace, queue)
        yield from _nodes(core)
        yield from _rights(client.AuthorizationV1Api(api_client), namespace)
        yield from _runtime(custom)
    except Exception as error:  # the connection, whatever the library calls it
        yield Finding("Kubernetes", "failure", str(error).splitlines()[0], "check the connection: kubectl version")


def _kfp(host: str) -> Finding:
    import requests

    advice = "give --kfp-host; from outside: kubectl port-forward -n kubeflow svc/ml-pipeline 8888"
    try:
        answer = requests.get(f"{host.rstrip('/')}/apis/v2beta1/healthz", timeout=TIMEOUT_S)
    except requests.RequestException as error:
        return Finding("Kubeflow Pipelines", "failure", f"{host}: {type(error).__name__}", advice)
    return Finding("Kubeflow Pipelines", "ok" if answer.ok else "failure", f"{host}: HTTP {answer.status_code}", advice)


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


def _queue(custom: Any, namespace: str, queue: str) -> Iterator[Finding]:
    from kubernetes.client import ApiException

    where = ("kueue.x-k8s.io", "v1beta2")
    advice = "kubectl apply -k k8s/overlays/YOURS"
    try:
        local = custom.get_namespaced_custom_object(*where, namespace, "localqueues", queue, _request_timeout=TIMEOUT_S)
        name = local["spec"]["clusterQueue"]
        whole = custom.get_cluster_custom_object(*where, "clusterqueues", name, _request_timeout=TIMEOUT_S)
    except ApiException as error:
        yield Finding(f"queue {queue}", "failure", f"HTTP {error.status}", advice)
        return
    pools = [
        f"{flavor['name']} {resource['nominalQuota']}"
        for group in whole["spec"]["resourceGroups"]
        for flavor in group["flavors"]
        for resource in flavor["resources"]
        if resource["name"] == "nvidia.com/gpu"
    ]
    yield Finding(f"queue {queue}", "ok" if pools else "failure", f"GPUs: {', '.join(pools) or 'none'}", advice)


def _nodes(core: Any) -> Iterator[Finding]:
    from kubernetes.client import ApiException

    try:
        nodes = core.list_node(_request_timeout=TIMEOUT_S).items
    except ApiException as error:
        yield Finding(
            "nodes", "warning", f"HTTP {error.status}", "this account may not list nodes: labels are unchecked"
        )
        return
    pools: dict[str, int] = {}
    for node in nodes:
        pool = (node.metadata.labels or {}).get("opensora/pool", "")
        pools[pool] = pools.get(pool, 0) + 1
    for pool, state in (("h800", "failure"), ("captioning", "warning"), ("cpu", "failure")):
        advice = f"kubectl label node NODE opensora/pool={pool}"
        good = pools.get(pool, 0) > 0
        yield Finding(f"nodes {pool}", "ok" if good else state, str(pools.get(pool, 0)), "" if good else advice)  # type: ignore[arg-type]


def _rights(authorization: Any, namespace: str) -> Iterator[Finding]:
    missing = []
    for verb in VERBS:
        attributes = {"namespace": namespace, "group": "trainer.kubeflow.org", "resource": "trainjobs", "verb": verb}
        review = {"spec": {"resourceAttributes": attributes}}
        answer = authorization.create_self_subject_access_review(review, _request_timeout=TIMEOUT_S)
        missing += [] if answer.status.allowed else [verb]
    advice = "apply k8s/base/service-accounts.yaml and run steps under the account default-editor"
    seen = f"may not {', '.join(missing)}" if missing else ", ".join(VERBS)
    yield Finding("rights on trainjobs", "failure" if missing else "ok", seen, advice if missing else "")


def _runtime(custom: Any) -> Iterator[Finding]:
    from kubernetes.client import ApiException

    where = ("trainer.kubeflow.org", "v1alpha1", "clustertrainingruntimes", "opensora")
    try:
        custom.get_cluster_custom_object(*where, _request_timeout=TIMEOUT_S)
        yield Finding("training runtime", "ok", "opensora")
    except ApiException as error:
        yield Finding("training runtime", "failure", f"HTTP {error.status}", "kubectl apply -k k8s/overlays/YOURS")


def show(findings: Iterator[Finding]) -> bool:
    """Print a line a finding, as they come; returns whether none is a failure."""
    from rich.console import Console
    from rich.markup import escape

    console = Console(highlight=False, soft_wrap=True)
    marks = {"ok": "[green]ok[/]     ", "warning": "[yellow]warning[/]", "failure": "[red]failure[/]"}
    good = True
    for finding in findings:
        console.print(f"{marks[finding.state]}  {escape(f'{finding.name}: {finding.seen}')}")
        if finding.advice and finding.state != "ok":
            console.print(f"         → {finding.advice}", markup=False)
        good &= finding.state != "failure"
    return good
