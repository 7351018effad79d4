"""The doctor: what it says of a machine that is, and is not, ready."""

from pathlib import Path

import pytest

from opensora.config import load_config
from opensora.doctor import Finding, examine, show
from tests.conftest import ROOT
from tests.json_server import serve

PARAMS = ROOT / "params.yaml"


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
        assert f"weights/{name}" in findings[f"weights {name}"].seen
        assert "put the model there" in findings[f"weights {name}"].advice


@pytest.mark.parametrize(("status", "word"), [(401, "MLFLOW_TRACKING_USERNAME"), (403, "--allowed-hosts")])
def test_a_tracking_server_that_refuses_is_a_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, status: int, word: str
) -> None:
    monkeypatch.chdir(tmp_path)
    with serve(lambda *_: (status, {})) as url:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", url)
        findings = {finding.name: finding for finding in examine(load_config(PARAMS, "demo"), tmp_path)}
    assert findings["MLflow"].state == "failure"
    assert word in findings["MLflow"].advice


def test_a_tracking_server_that_is_down_is_a_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with serve(lambda *_: (200, {})) as url:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", url)
    findings = {finding.name: finding for finding in examine(load_config(PARAMS, "demo"), tmp_path)}
    assert findings["MLflow"].state == "failure"
    assert "ConnectionError" in findings["MLflow"].seen


def test_show_says_what_to_do_and_whether_all_is_well(capsys: pytest.CaptureFixture[str]) -> None:
    assert show(iter([Finding("a", "ok", "1", "unneeded"), Finding("b", "warning", "2", "[mend] it")]))
    assert not show(iter([Finding("c", "failure", "3", "install it")]))
    out = capsys.readouterr().out
    assert "unneeded" not in out
    assert "→ [mend] it" in out
    assert "→ install it" in out
