"""The doctor: what it says of a machine and of a cluster that is, and is not, ready."""

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from opensora.config import load_config
from opensora.doctor import KINDS, VERBS, Finding, examine, examine_cluster, show
from tests.conftest import ROOT

PARAMS = ROOT / "params.yaml"
READY = {
    "/apis/v2beta1/healthz": {},
    "/apis/kueue.x-k8s.io/v1beta2/namespaces/opensora/localqueues/opensora": {"spec": {"clusterQueue": "opensora"}},
    "/apis/kueue.x-k8s.io/v1beta2/clusterqueues/opensora": {
        "spec": {
            "resourceGroups": [
                {"flavors": [{"name": "h800", "resources": [{"name": "nvidia.com/gpu", "nominalQuota": "64"}]}]}
            ]
        }
    },
    "/apis/trainer.kubeflow.org/v1alpha1/clustertrainingruntimes/opensora": {"metadata": {"name": "opensora"}},
    "/api/v1/nodes": {
        "items": [{"metadata": {"name": p, "labels": {"opensora/pool": p}}} for p in ("h800", "cpu", "captioning")]
    },
    **{
        f"/apis/apiextensions.k8s.io/v1/customresourcedefinitions/{plural}.{group}": {
            "spec": {
                "group": group,
                "names": {"kind": plural, "plural": plural},
                "scope": "Namespaced",
                "versions": [{"name": version, "served": True, "storage": True}],
            }
        }
        for group, plural, version in KINDS
    },
}


@contextmanager
def serve(answers: dict[str, dict], allowed: tuple[str, ...] = VERBS, status: int = 200) -> Iterator[str]:
    """A server that gives these answers, 404 for other paths, and access reviews by verb."""

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            pass

        def _answer(self, code: int, value: dict) -> None:
            data = json.dumps(value).encode()
            self.send_response(code)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def do_GET(self) -> None:
            path = self.path.partition("?")[0]
            self._answer(*((200, answers[path]) if path in answers else (404, {})))

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            verb = body.get("spec", {}).get("resourceAttributes", {}).get("verb")
            self._answer(status, {"spec": body.get("spec", {}), "status": {"allowed": verb in allowed}})

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


def look(url: str) -> dict[str, Finding]:
    client = pytest.importorskip("kubernetes.client", reason="the extra `kubeflow` is not installed")
    api = client.ApiClient(client.Configuration(host=url))
    return {finding.name: finding for finding in examine_cluster("opensora", "opensora", url, api)}


def test_this_machine_can_run_the_demo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    findings = {finding.name: finding for finding in examine(load_config(PARAMS, "demo"), tmp_path / "runs")}
    assert {"Python", "PyTorch", "decoders", "H.264", "disk", "MLflow"} <= set(findings)
    assert not [finding for finding in findings.values() if finding.state == "failure"]


def test_missing_weights_and_gpu_are_named_with_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    config = load_config(PARAMS, "single_gpu", ("evaluate.videomae=videomae-base",))
    findings = {finding.name: finding for finding in examine(config, tmp_path)}
    assert findings["GPU"].state == "failure"
    for name in ("vae", "t5", "llava", "videomae-base"):
        assert findings[f"weights {name}"].state == "failure"
        assert f"weights/{name}" in findings[f"weights {name}"].advice


@pytest.mark.parametrize(("status", "word"), [(401, "MLFLOW_TRACKING_USERNAME"), (403, "--allowed-hosts")])
def test_a_tracking_server_that_refuses_is_a_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, status: int, word: str
) -> None:
    monkeypatch.chdir(tmp_path)
    with serve({}, status=status) as url:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", url)
        findings = {finding.name: finding for finding in examine(load_config(PARAMS, "demo"), tmp_path)}
    assert findings["MLflow"].state == "failure"
    assert word in findings["MLflow"].advice


def test_a_tracking_server_that_is_down_is_a_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with serve({}) as url:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", url)
    findings = {finding.name: finding for finding in examine(load_config(PARAMS, "demo"), tmp_path)}
    assert findings["MLflow"].state == "failure"
    assert "ConnectionError" in findings["MLflow"].seen


def test_a_ready_cluster_has_no_failure() -> None:
    with serve(READY) as url:
        findings = look(url)
    assert {finding.state for finding in findings.values()} == {"ok"}
    assert findings["queue opensora"].seen == "GPUs: h800 64"


def test_what_a_cluster_lacks_is_named() -> None:
    answers = {path: answer for path, answer in READY.items() if "localqueues" not in path and "jobset" not in path}
    answers["/api/v1/nodes"] = {"items": [{"metadata": {"name": "a", "labels": {"opensora/pool": "cpu"}}}]}
    crd = "/apis/apiextensions.k8s.io/v1/customresourcedefinitions/clusterqueues.kueue.x-k8s.io"
    old = json.loads(json.dumps(READY[crd]))
    old["spec"]["versions"][0]["name"] = "v1beta1"
    with serve(answers | {crd: old}, allowed=("get", "list")) as url:
        findings = look(url)
    failures = {name for name, finding in findings.items() if finding.state == "failure"}
    assert failures == {
        "jobsets.jobset.x-k8s.io",
        "clusterqueues.kueue.x-k8s.io",
        "queue opensora",
        "nodes h800",
        "rights on trainjobs",
    }
    assert findings["nodes captioning"].state == "warning"
    assert findings["rights on trainjobs"].seen == "may not create, watch, patch, delete"
    assert "serves it" in findings["clusterqueues.kueue.x-k8s.io"].advice


def test_an_unreachable_cluster_is_one_failure() -> None:
    with serve({}) as url:
        pass
    findings = look(url)
    assert findings["Kubernetes"].state == "failure"
    assert "kubectl version" in findings["Kubernetes"].advice


def test_show_says_what_to_do_and_whether_all_is_well(capsys: pytest.CaptureFixture[str]) -> None:
    assert show(iter([Finding("a", "ok", "1", "unneeded"), Finding("b", "warning", "2", "[mend] it")]))
    assert not show(iter([Finding("c", "failure", "3", "install it")]))
    out = capsys.readouterr().out
    assert "unneeded" not in out
    assert "→ [mend] it" in out
    assert "→ install it" in out
