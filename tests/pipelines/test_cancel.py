"""`opensora pipeline cancel` against a KFP API and a Kubernetes API over HTTP: no TrainJob of the run is left."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from components.cluster import RUN
from components.trainjob import TrainJob
from pipelines.cli import main
from tests.components.fake_cluster import FakeCluster, kubeconfig, serve
from tests.pipelines.fake_kfp import FakeKfp, serve_kfp

pytest.importorskip("kfp", reason="the extra `kubeflow` is not installed")


class Desk:
    """A user with a KFP server and, if it is told where, a cluster."""

    def __init__(self, kfp: FakeKfp, host: str, cluster: FakeCluster, capsys: pytest.CaptureFixture[str]) -> None:
        self.kfp, self.host, self.cluster, self._capsys = kfp, host, cluster, capsys
        kfp.runs["run-0"] = {"run_id": "run-0", "state": "RUNNING"}

    def job(self, name: str, run_id: str) -> None:
        """A launcher of that run has made a job."""
        self.cluster.jobs[name] = TrainJob(name, "opensora", "train_video", "image", (), 8, 8, run_id=run_id).document()

    def cancel(self) -> tuple[int, str]:
        """Exit code and output."""
        with pytest.raises(SystemExit) as end:
            main(["cancel", "run-0", "--host", self.host])
        said = self._capsys.readouterr()
        return int(end.value.code or 0), said.out + said.err


@pytest.fixture
def desk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Iterator[Desk]:
    from kubernetes import client, config

    for name in ("KFP_TOKEN", "KFP_TOKEN_FILE", "KFP_HOST", "KUBERNETES_SERVICE_HOST"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(config.kube_config, "KUBE_CONFIG_DEFAULT_LOCATION", str(tmp_path / "kubeconfig"))
    monkeypatch.setattr(client.Configuration, "_default", None)
    kfp, cluster = FakeKfp(), FakeCluster()
    with serve_kfp(kfp) as host, serve(cluster) as url:
        kubeconfig(tmp_path, url)
        yield Desk(kfp, host, cluster, capsys)


def test_the_jobs_of_a_cancelled_run_are_deleted_also_one_that_was_just_being_made(desk: Desk) -> None:
    desk.job("train-image-1", "run-0")
    desk.job("train-image-2", "run-1")
    answer = desk.kfp.answer

    def goes_on(method: str, path: str, query: dict, body: dict) -> tuple[int, dict]:
        if desk.kfp.runs["run-0"]["state"] == "CANCELING" and method == "GET":
            assert "train-image-1" not in desk.cluster.jobs  # the cluster is not kept waiting for KFP
            desk.job("train-video-1", "run-0")
            desk.kfp.runs["run-0"]["state"] = "CANCELED"
        return answer(method, path, query, body)

    desk.kfp.answer = goes_on  # type: ignore[method-assign]
    code, said = desk.cancel()
    assert code == 0, said
    assert "run run-0 is being ended" in said
    assert "namespace opensora: train-image-1, train-video-1" in said
    assert list(desk.cluster.jobs) == ["train-image-2"]

    desk.job("train-video-2", "run-0")  # found later, when KFP has nothing to end any more
    code, said = desk.cancel()
    assert code == 0, said
    assert "run run-0 has ended (CANCELED)" in said
    assert list(desk.cluster.jobs) == ["train-image-2"]
    assert sum("terminate" in call for call in desk.kfp.calls) == 1


def test_without_a_cluster_the_command_to_type_is_told(desk: Desk, tmp_path: Path) -> None:
    (tmp_path / "kubeconfig").unlink()
    code, said = desk.cancel()
    assert code == 0, said
    assert desk.kfp.runs["run-0"]["state"] == "CANCELING"
    assert "no cluster to delete TrainJobs in" in said
    assert f"kubectl -n opensora delete trainjobs -l {RUN}=run-0" in said


def test_a_cluster_that_refuses_is_an_error(desk: Desk) -> None:
    desk.job("train-image-1", "run-0")
    desk.cluster.refuse = (403, "trainjobs is forbidden")
    code, said = desk.cancel()
    assert code == 1
    assert "run run-0 is being ended, but TrainJob train-image-1 cannot be deleted: trainjobs is forbidden" in said
    assert f"by hand: kubectl -n opensora delete trainjobs -l {RUN}=run-0" in said
