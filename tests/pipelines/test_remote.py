"""`opensora pipeline submit`, `status` and `cancel` against a KFP API over HTTP, by KFP's own client."""

import json
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from components.image_names import IMAGES
from pipelines import remote
from pipelines.cli import main
from tests.pipelines.fake_kfp import FakeKfp, serve_kfp

pytest.importorskip("kfp", reason="the extra `kubeflow` is not installed")


class Desk:
    """A user with a checkout, images of a registry, a token and a KFP server."""

    def __init__(self, folder: Path, fake: FakeKfp, host: str, capsys: pytest.CaptureFixture[str]) -> None:
        self.folder, self.fake, self.host, self._capsys = folder, fake, host, capsys
        (folder / "code").mkdir()
        (folder / "code" / "steps.py").write_text("x = 1\n")
        self.git("init", "-q")
        self.git("add", "steps.py")
        self.git("-c", "user.name=n", "-c", "user.email=e@example.org", "commit", "-qm", "first")
        self.commit = self.git("rev-parse", "HEAD")
        self.images = folder / "images.json"
        self.images.write_text(json.dumps({name: f"registry.example/{name}@sha256:{'0' * 64}" for name in IMAGES}))

    def git(self, *arguments: str) -> str:
        command = ["git", "-C", str(self.folder / "code"), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout.strip()

    def say(self, *arguments: str) -> str:
        """Output of a command that passes."""
        with pytest.raises(SystemExit) as end:
            main([*arguments, "--host", self.host])
        said = self._capsys.readouterr()
        assert not end.value.code, said.err
        return said.out

    def fail(self, *arguments: str, host: str = "") -> str:
        """The one line of a command that fails."""
        with pytest.raises(SystemExit) as end:
            main([*arguments, "--host", host or self.host])
        assert end.value.code == 1
        (line,) = self._capsys.readouterr().err.strip().splitlines()
        assert line.startswith("error: ")
        return line


@pytest.fixture
def desk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Iterator[Desk]:
    monkeypatch.setenv("KFP_TOKEN", "secret")
    for name in ("KFP_TOKEN_FILE", "KFP_HOST", "KFP_PAGE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("kubernetes.config.kube_config.KUBE_CONFIG_DEFAULT_LOCATION", str(tmp_path / "none"))
    monkeypatch.setattr(remote, "ROOT", tmp_path / "code")
    monkeypatch.chdir(tmp_path)
    fake = FakeKfp(token="secret")
    with serve_kfp(fake) as host:
        yield Desk(tmp_path, fake, host, capsys)


def test_a_run_is_submitted_looked_at_and_cancelled(desk: Desk) -> None:
    said = desk.say("submit", "full", "--images", str(desk.images), "-p", "profile=h800", "-p", "shares=32")
    assert said.splitlines()[:2] == ["run run-0", f"{desk.host}/#/runs/details/run-0"]
    (run,) = desk.fake.runs.values()
    assert run["runtime_config"]["parameters"] == {
        "profile": "h800",
        "shares": 32,
        "code_revision": desk.commit,
        "image": f"registry.example/opensora-python-train@sha256:{'0' * 64}",  # of the nodes of training
    }
    assert run["service_account"] == "default-editor"
    assert run["display_name"].startswith(f"full {desk.commit[:9]} ")
    assert desk.fake.experiments["opensora"]["namespace"] == "opensora"
    spec = json.dumps(run["pipeline_spec"])
    assert "registry.example/opensora-python-data@sha256:" in spec
    assert desk.fake.tokens == {"Bearer secret"}

    assert "enableCache" in spec

    reason = "error: TrainJob train-video-1a failed on node 13,\nexit code 1: error: rank 107"
    run["run_details"] = {
        "task_details": [
            {"display_name": "train-video", "state": "FAILED", "start_time": "2026-01-01T02:00:00Z"}
            | {"error": {"message": reason}},
            {"display_name": "encode", "state": "SUCCEEDED", "start_time": "2026-01-01T01:00:00Z"},
        ]
    }
    assert desk.say("status", "run-0").splitlines()[1:] == [
        "  encode: SUCCEEDED",
        f"  train-video: FAILED: {' '.join(reason.split())}",
    ]

    assert "run-0 is being ended" in desk.say("cancel", "run-0")
    assert run["state"] == "CANCELING"
    assert desk.fake.calls[-1] == "POST /apis/v2beta1/runs/run-0:terminate"


def test_a_tree_that_differs_from_its_commit_is_refused_unless_allowed(desk: Desk) -> None:
    (desk.folder / "code" / "steps.py").write_text("x = 2\n")
    command = ["submit", "training", "--images", str(desk.images)]
    line = desk.fail(*command)
    assert f"differs from commit {desk.commit[:9]} (steps.py); commit, or give --allow-dirty" in line
    assert not desk.fake.calls
    desk.say(*command, "--allow-dirty")
    (run,) = desk.fake.runs.values()
    assert run["runtime_config"]["parameters"]["code_revision"] == f"{desk.commit}-dirty"


def test_nothing_is_sent_that_cannot_be_repeated_or_read(desk: Desk) -> None:
    assert "images not pinned by digest: opensora-python-data; give --images" in desk.fail("submit", "training")
    data_alone = desk.folder / "data.json"
    of_tasks = {name: image for name, image in json.loads(desk.images.read_text()).items() if "train" not in name}
    data_alone.write_text(json.dumps(of_tasks))
    assert "no image for the nodes of training; give" in desk.fail("submit", "training", "--images", str(data_alone))
    assert "unknown pipeline 'ful'; one of data" in desk.fail("submit", "ful", "--images", str(desk.images))
    assert "has no parameter 'share'; did you mean shares" in desk.fail("submit", "full", "-p", "share=3")
    assert "--images nowhere.json: " in desk.fail("submit", "full", "--images", "nowhere.json")
    assert not desk.fake.calls


def test_a_run_may_take_nothing_from_the_cache(desk: Desk) -> None:
    desk.say("submit", "full", "--images", str(desk.images), "--no-cache")
    (run,) = desk.fake.runs.values()
    spec = json.dumps(run["pipeline_spec"])
    assert "cachingOptions" in spec
    assert "enableCache" not in spec


def test_servers_that_do_not_answer_as_they_should(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "says: Run gone not found (HTTP 404)" in desk.fail("status", "gone")
    monkeypatch.setenv("KFP_TOKEN", "wrong")
    assert "refuses the token of KFP_TOKEN or KFP_TOKEN_FILE (HTTP 401)" in desk.fail("status", "run-0")
    monkeypatch.delenv("KFP_TOKEN")
    assert "wants a token: set KFP_TOKEN (HTTP 401)" in desk.fail("cancel", "run-0")
    monkeypatch.setenv("KFP_TOKEN_FILE", "token.txt")
    assert "token.txt, which cannot be read: No such file" in desk.fail("status", "run-0")
    (desk.folder / "token.txt").write_text("secret\n")
    assert "Run run-0 not found" in desk.fail("status", "run-0")
    desk.fake.answer = lambda *_: (500, {})  # type: ignore[method-assign]
    assert "is no Kubeflow Pipelines API (HTTP 500); give its address" in desk.fail("status", "run-0")
    assert "no Kubeflow Pipelines API at http://127.0.0.1:9 (ConnectionError)" in desk.fail(
        "status", "run-0", host="http://127.0.0.1:9"
    )
