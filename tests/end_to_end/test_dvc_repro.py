"""The whole chain on the embedded world by `dvc repro`, as `make demo` runs it."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from opensora.chain import ALL_STEPS
from opensora.config import DATA_STEPS, TRAIN_STEPS
from opensora.data.video import read_frames
from opensora.manifest import read_manifest
from opensora.step import read_report
from tests.conftest import ROOT
from tests.end_to_end.command import run
from tests.s3 import s3_server

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3000)]  # on a machine that does other things too


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkout of its own whose default profile is `smoke`, after one `dvc repro`."""
    folder = tmp_path_factory.mktemp("project")
    for name in ("opensora", ".dvc", "prompts"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__", "cache", "tmp"))
    for name in ("dvc.yaml", ".dvcignore", ".gitignore"):
        shutil.copy(ROOT / name, folder)
    text = (ROOT / "params.yaml").read_text()
    (folder / "params.yaml").write_text(text.replace("profile: demo", "profile: smoke"))
    for command in (["git", "init", "-q"], ["git", "add", "."]):
        run(*command, folder=folder)
    run("git", "-c", "user.name=t", "-c", "user.email=t@localhost", "commit", "-qm", "start", folder=folder)
    run("dvc", "repro", folder=folder)
    return folder


def test_every_step_leaves_what_it_promises(project: Path) -> None:
    base = project / "runs" / "smoke"
    for name in DATA_STEPS:
        rows = read_manifest(base / name)
        assert any(row.kept for row in rows)
        assert read_report(base / name).kept == sum(row.kept for row in rows)
    assert len(read_manifest(base / "encode")) == 16
    for name in TRAIN_STEPS:
        assert list((base / name / "checkpoints").glob("step-*/checkpoint.json"))
    metrics = json.loads((base / "evaluate" / "metrics.json").read_text())
    names = {"prompt_following_seen", "image_stage_accuracy", "caption_exact_match", "seconds", "peak_memory_mib"}
    assert names <= set(metrics)
    assert set(metrics["seconds"]) == set(ALL_STEPS) - {"evaluate", "promote"}
    assert "<video" in (base / "evaluate" / "gallery.html").read_text()
    gate = json.loads((base / "promote" / "gate.json").read_text())
    assert (gate["verdict"], gate["model"], gate["alias"]) == ("promoted", "opensora-smoke", "champion")
    assert not list(base.rglob("*.part"))


def test_a_repeat_runs_nothing(project: Path) -> None:
    out = run("dvc", "repro", folder=project)
    assert "Running stage" not in out
    assert "up to date" in out


def test_only_what_depends_on_a_change_runs_again(project: Path) -> None:
    run("dvc", "status", folder=project)
    path = project / "params.yaml"
    before = path.read_text()
    values = yaml.safe_load(before)
    values["smoke"]["evaluate"]["steps"] = 1
    try:
        path.write_text(yaml.safe_dump(values, sort_keys=False))
        status = run("dvc", "status", folder=project)
    finally:
        path.write_text(before)
    changed = [line.rstrip(":") for line in status.splitlines() if line and not line[0].isspace()]
    assert "evaluate" in changed
    assert not {"train_highres", "encode", "split"} & set(changed)


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[str, str]]:
    """URL of an S3 server on loopback, and of a bucket there."""
    import boto3

    with s3_server(monkeypatch) as endpoint:
        boto3.client("s3", endpoint_url=endpoint).create_bucket(Bucket="data")
        yield endpoint, "s3://data/opensora"


def test_manifests_and_shards_travel_by_s3(project: Path, bucket: tuple[str, str], tmp_path: Path) -> None:
    endpoint, url = bucket
    run("dvc", "remote", "add", "--force", "--default", "store", url, folder=project)
    run("dvc", "remote", "modify", "store", "endpointurl", endpoint, folder=project)
    run("git", "add", ".", folder=project)
    run("git", "-c", "user.name=t", "-c", "user.email=t@localhost", "commit", "-qm", "data", folder=project)
    run("dvc", "push", folder=project)
    clone = tmp_path / "clone"
    run("git", "clone", "-q", str(project), str(clone), folder=tmp_path)
    assert not (clone / "runs").exists()
    run("dvc", "pull", folder=clone)
    for step in DATA_STEPS:
        there, here = project / "runs" / "smoke" / step, clone / "runs" / "smoke" / step
        names = sorted(path.name for path in there.iterdir())
        assert names == sorted(path.name for path in here.iterdir())
        # Videos and single clips are not versioned: thousands of small files would be.
        assert {Path(name).suffix for name in names} <= {".parquet", ".tar", ".safetensors", ".json", ".jsonl"}
        assert all((there / name).read_bytes() == (here / name).read_bytes() for name in names)
    assert not (clone / "runs" / "smoke" / "videos").exists()
    assert "up to date" in run("dvc", "repro", folder=clone)


def test_the_registered_champion_generates(project: Path, tmp_path: Path) -> None:
    command = ["opensora", "generate", "--checkpoint", "models:/opensora-smoke@champion"]
    command += ["--prompt", "a red circle moving left", "--seed", "4", "--out", str(tmp_path)]
    (line,) = run(*command, folder=project).splitlines()
    assert read_frames(Path(line).read_bytes()).shape == (4, 64, 64, 3)


def test_results_say_where_to_look(project: Path) -> None:
    out = run("opensora", "results", folder=project)
    for text in (
        "train_highres",
        "opensora-smoke version 1, alias champion",
        "gallery.html",
        "mlflow ui --host 127.0.0.1",
    ):
        assert text in out


def test_runs_are_in_mlflow_with_a_parent_and_a_child_a_stage(project: Path) -> None:
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{project / 'runs' / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("opensora-smoke")
    assert experiment
    assert str(project / "runs") in experiment.artifact_location
    found = {run.info.run_name: run for run in client.search_runs([experiment.experiment_id])}
    (parent,) = (run for run in found.values() if "mlflow.parentRunId" not in run.data.tags)
    for name in (*TRAIN_STEPS, "evaluate", "promote"):
        assert found[name].data.tags["mlflow.parentRunId"] == parent.info.run_id
        assert found[name].info.status == "FINISHED"
    assert "loss" in found["train_video"].data.metrics
    assert client.list_artifacts(found["evaluate"].info.run_id, "samples/train_video")
    metrics = json.loads((project / "runs" / "smoke" / "evaluate" / "metrics.json").read_text())
    recorded = {name: value for name, value in found["evaluate"].data.metrics.items() if not name.startswith("system/")}
    assert recorded == {name: value for name, value in metrics.items() if isinstance(value, int | float)}
    assert "prompt_following_seen" in recorded
