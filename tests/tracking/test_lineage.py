"""What a run is made of: from git and DVC on a workstation, from the environment in a container."""

import json
import subprocess
from pathlib import Path

import pytest

from opensora.tracking.lineage import data_digest, flatten, lineage


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    for name in ("OPENSORA_REVISION", "OPENSORA_IMAGE", "OPENSORA_DATA_REVISION"):
        monkeypatch.delenv(name, raising=False)


def lock(path: str, md5: str) -> None:
    text = json.dumps({"stages": {"encode": {"outs": [{"path": path, "md5": md5}]}}})  # JSON is YAML
    Path("dvc.lock").write_text(text)


def test_a_checkout_names_commit_and_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    git = ["git", "-c", "user.name=x", "-c", "user.email=x@x", "-c", "commit.gpgsign=false"]
    Path("a").write_text("1")
    lock("runs/demo/encode", "1.dir")
    for command in (["init", "-q"], ["add", "a", "dvc.lock"], ["commit", "-qm", "x"]):
        subprocess.run([*git, *command], check=True, timeout=60)
    tags = lineage()
    assert len(tags["git_commit"]) == 40
    assert tags["mlflow.source.git.commit"] == tags["git_commit"]
    assert tags["git_dirty"] == "false"
    lock("runs/demo/encode", "2.dir")  # as DVC does while it runs the steps
    assert lineage()["git_dirty"] == "false"
    Path("a").write_text("2")
    assert lineage()["git_dirty"] == "true"
    (tmp_path / "below").mkdir()
    monkeypatch.chdir(tmp_path / "below")
    assert lineage()["git_dirty"] == "true"


def test_a_container_names_what_its_environment_says(monkeypatch: pytest.MonkeyPatch) -> None:
    assert lineage()["git_commit"] == "unknown"
    monkeypatch.setenv("OPENSORA_REVISION", "abc123")
    monkeypatch.setenv("OPENSORA_IMAGE", "registry/opensora-train@sha256:12ab")
    monkeypatch.setenv("OPENSORA_DATA_REVISION", "77.dir")
    tags = lineage()
    assert tags["git_commit"] == "abc123"
    assert tags["image_digest"] == "sha256:12ab"
    assert tags["image"] == "registry/opensora-train@sha256:12ab"
    assert tags["data_revision"] == "77.dir"


def test_the_data_is_named_by_dvc_then_the_pipeline_then_its_fingerprint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "runs" / "demo" / "encode"
    assert data_digest(folder) == "unknown"
    folder.mkdir(parents=True)
    (folder / "fingerprint.json").write_text(json.dumps("f" * 64))
    assert data_digest(folder) == "f" * 36
    monkeypatch.setenv("OPENSORA_DATA_REVISION", "r" * 40)
    assert data_digest(folder) == "r" * 36
    lock("runs/demo/encode", "0123456789abcdef0123456789abcdef.dir")
    assert data_digest(folder) == "0123456789abcdef0123456789abcdef.dir"
    assert lineage()["dvc.runs/demo/encode.md5"] == "0123456789abcdef0123456789abcdef.dir"
    lock("runs/demo/other", "1.dir")
    assert data_digest(folder) == "r" * 36


def test_flatten() -> None:
    assert flatten({"a": {"b": 1, "c": [2]}, "d": None}) == {"a.b": "1", "a.c": "[2]", "d": "None"}
