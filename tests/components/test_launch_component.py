"""The launcher of a stage on a cluster, as a component runs it: what goes wrong is the last line of its log."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from components.launch import Launch, launch
from components.step import Job
from tests.components.fake_cluster import GPU, FakeCluster, exited, kubeconfig, serve
from tests.conftest import ROOT

dsl = pytest.importorskip("kfp.dsl", reason="the extra `kubeflow` is not installed")

NODES = 16


class Stage:
    """The image stage of 16 nodes, and the cluster that it is launched on."""

    def __init__(self, folder: Path, fake: FakeCluster) -> None:
        self.folder, self.fake = folder, fake
        for step in ("encode", "train_image"):
            (folder / "h800" / step).mkdir(parents=True)
        self.finish("encode")

    def finish(self, step: str) -> None:
        """Leave what a finished step leaves."""
        (self.folder / "h800" / step / "report.json").write_text(json.dumps({"step": step, "metrics": {"loss": 0.5}}))
        (self.folder / "h800" / step / "fingerprint.json").write_text('"made here"')

    def launch(self, *changes: str, budget: float = 0.0) -> "dsl.Model":
        overrides = [f"train_image.processes={8 * NODES}", "hardware.dollars_per_gpu_hour=2", *changes]
        job = Job("h800", overrides, str(self.folder), "raw-1", "0123abc")
        how = Launch("registry.example/train@sha256:0", "http://mlflow:5000", budget, "run-1")
        checkpoint = dsl.Model(name="c", uri=str(self.folder / "c"), metadata={})
        metrics = dsl.Metrics(name="m", uri=str(self.folder / "m"), metadata={})
        launch("train_image", [], job, how, checkpoint, metrics)
        return checkpoint


@pytest.fixture
def stage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Stage]:
    from kubernetes import client, config

    fake = FakeCluster()
    fake.quota[GPU] = str(8 * NODES)
    with serve(fake) as url:
        path = kubeconfig(tmp_path, url)
        monkeypatch.setattr(config.kube_config, "KUBE_CONFIG_DEFAULT_LOCATION", str(path))
        monkeypatch.setattr(client.Configuration, "_default", None)
        monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "127.0.0.1")
        for name in ("MLFLOW_TRACKING_URI", "OPENSORA_DATA_REVISION", "OPENSORA_REVISION"):
            monkeypatch.setenv(name, "")  # the launcher sets them
        monkeypatch.setattr("components.launch.POLL_S", 0.0)
        monkeypatch.setattr("components.launch.STUCK_S", 0.0)
        yield Stage(tmp_path, fake)


def starts(fake: FakeCluster) -> None:
    for node in range(NODES):
        fake.pod(node)
    fake.log(0, "step 1/2")


def last_line(capsys: pytest.CaptureFixture[str]) -> str:
    return capsys.readouterr().err.strip().splitlines()[-1]


def test_a_job_ends_and_its_checkpoint_is_described(stage: Stage, capsys: pytest.CaptureFixture[str]) -> None:
    def ends(fake: FakeCluster) -> None:
        stage.finish("train_image")
        fake.condition("Complete", "all nodes finished")

    stage.fake.steps = [starts, lambda fake: None, ends]
    said = json.loads(Path(stage.launch(budget=1e6).path).read_text())
    assert said["uri"] == str(stage.folder / "h800" / "train_image")
    assert (said["data_revision"], said["code_revision"]) == ("raw-1", "0123abc")
    assert "step 1/2" in capsys.readouterr().out
    (job,) = stage.fake.jobs.values()
    trainer = job["spec"]["trainer"]
    assert (trainer["numNodes"], trainer["numProcPerNode"]) == (NODES, 8)
    assert {item["name"]: item["value"] for item in trainer["env"]} == {
        "MLFLOW_TRACKING_URI": "http://mlflow:5000",
        "OPENSORA_DATA_REVISION": "raw-1",
        "OPENSORA_REVISION": "0123abc",
        "OPENSORA_IMAGE": trainer["image"],
    }


def test_a_job_has_the_run_and_the_time_that_the_budget_pays_for(stage: Stage) -> None:
    def ends(fake: FakeCluster) -> None:
        stage.finish("train_image")
        fake.condition("Complete", "all nodes finished")

    stage.fake.steps = [ends]
    stage.launch("train_image.steps=1", budget=2560)
    (job,) = stage.fake.jobs.values()
    assert job["metadata"]["labels"]["opensora/run"] == "run-1"
    assert job["spec"]["activeDeadlineSeconds"] == 10 * 3600  # 128 GPUs at $2


def test_a_terminated_launcher_whose_log_nobody_reads_deletes_its_job(stage: Stage) -> None:
    """As on a cluster: KFP's own process, which reads the log, gets the same signal and is gone first."""
    code = f"""
from components.launch import Launch, launch
from components.step import Job
job = Job("h800", ["train_image.processes={8 * NODES}"], {str(stage.folder)!r}, "raw-1", "0123abc")
launch("train_image", [], job, Launch("image", "", 0.0, "run-1"), None, None)
"""
    environment = os.environ | {"KUBECONFIG": str(stage.folder / "kubeconfig"), "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(
        [sys.executable, "-c", code], env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    try:
        assert process.stdout
        lines = iter(process.stdout.readline, "")
        assert any("is made" in line for line in lines)  # it follows the job
        assert stage.fake.jobs
        process.stdout.close()
        process.send_signal(signal.SIGTERM)
        process.wait(timeout=120)
    finally:
        process.kill()
        process.wait(timeout=60)
    assert stage.fake.calls[-1].startswith("delete train-image-")
    assert not stage.fake.jobs


def test_node_13_of_16_failed(stage: Stage, capsys: pytest.CaptureFixture[str]) -> None:
    def fails(fake: FakeCluster) -> None:
        for node in range(NODES):
            fake.pod(node, exited(1, second=30))
            fake.log(node, "rank 0: lost its peer")
        fake.pod(13, exited(1, second=20))
        fake.log(13, "error: rank 107: encode/latents-00007-00.safetensors is damaged", "stack of the process")
        fake.condition("Failed", "job node-0 failed")

    stage.fake.steps = [starts, fails]
    with pytest.raises(SystemExit) as end:
        stage.launch()
    assert end.value.code == 1
    line = last_line(capsys)
    assert line.startswith("error: TrainJob train-image-")
    assert line.endswith(
        "failed on node 13, exit code 1: error: rank 107: encode/latents-00007-00.safetensors is damaged"
    )


def test_what_a_new_start_would_repeat_ends_with_its_code(stage: Stage, capsys: pytest.CaptureFixture[str]) -> None:
    def fails(fake: FakeCluster) -> None:
        fake.pod(0, exited(2))
        fake.log(0, "error: train_image.lr must be above 0")
        fake.condition("Failed", "job node-0 failed")

    stage.fake.steps = [fails]
    for _ in range(2):
        with pytest.raises(SystemExit) as end:
            stage.launch()
        assert end.value.code == 42
        assert last_line(capsys).endswith("a new start would fail again: error: train_image.lr must be above 0")
    assert len(stage.fake.calls) == 2  # the retry tried to create, and left the failed job alone


def test_a_profile_that_does_not_fit_the_queue(stage: Stage, capsys: pytest.CaptureFixture[str]) -> None:
    stage.fake.quota[GPU] = "64"
    with pytest.raises(SystemExit):
        stage.launch()
    assert "never fits queue opensora: 16 nodes ask for 128 nvidia.com/gpu of 64 in flavor h800" in last_line(capsys)
    assert not stage.fake.calls


def test_a_missing_secret(stage: Stage, capsys: pytest.CaptureFixture[str]) -> None:
    def waits(fake: FakeCluster) -> None:
        message = 'secret "object-store" not found'
        fake.pod(0, {"waiting": {"reason": "CreateContainerConfigError", "message": message}})

    stage.fake.steps = [waits]
    with pytest.raises(SystemExit):
        stage.launch()
    line = last_line(capsys)
    assert line.startswith("error: TrainJob train-image-")
    assert 'CreateContainerConfigError in pod job-node-0-0: secret "object-store" not found' in line
    assert not stage.fake.jobs


def test_a_budget_that_is_too_small(stage: Stage, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        stage.launch("train_image.steps=100000", budget=5)
    assert "more than the budget of $5; raise the budget, or lower" in last_line(capsys)
    assert not stage.fake.calls


def test_an_error_of_ours_comes_with_its_traceback_and_one_line(
    stage: Stage, capsys: pytest.CaptureFixture[str]
) -> None:
    (stage.folder / "h800" / "encode" / "fingerprint.json").write_text("torn")
    with pytest.raises(SystemExit):
        stage.launch()
    lines = capsys.readouterr().err.strip().splitlines()
    assert lines[0].startswith("Traceback")
    assert lines[-1].startswith("error: JSONDecodeError: ")
