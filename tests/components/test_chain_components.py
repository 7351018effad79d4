"""The components of the chain called as functions, from videos to a promoted model, on the smallest possible run."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import ROOT
from tests.data.caption_server import caption_server

dsl = pytest.importorskip("kfp.dsl", reason="the extra `kubeflow` is not installed")

NOBODY = "http://127.0.0.1:9"  # no MLflow answers there
OVERRIDES = [
    "demo.videos=2",
    "demo.shots_per_video=2",
    "caption.backend=endpoint",
    "executor.kind=sequential",
    "train_image.batch_size=1",
    "train_video.batch_size=1",
    "train_highres.batch_size=1",
    "train_image.steps=1",
    "train_video.steps=1",
    "train_highres.steps=1",
    "evaluate.steps=1",
    'evaluate.prompts=["a red circle moving left"]',
]

PROMOTE_WITHOUT_MLFLOW = """
import json, sys
from kfp import dsl
from components import release
given = json.loads(sys.argv[1])
evaluate = dsl.Dataset(name="evaluate", uri=given["evaluate"], metadata={})
manifest = dsl.Dataset(name="manifest", uri=given["out"] + "/refused", metadata={})
gate = dsl.Markdown(name="gate", uri=given["out"] + "/refused.md", metadata={})
release.promote.python_func(evaluate, **given["job"], tracking_uri=given["uri"], manifest=manifest, gate=gate)
"""


class World:
    """A workdir, what its components are told, and the artifacts that they left."""

    def __init__(self, folder: Path, captions: str) -> None:
        self.folder = folder
        overrides = [*OVERRIDES, f"caption.endpoint={captions}"]
        self.job = {"profile": "smoke", "overrides": overrides, "workdir": str(folder / "runs")}
        self.job |= {"data_revision": "raw-1", "code_revision": "0123abc-dirty"}
        self.made: dict[str, dsl.Artifact] = {}

    def artifact(self, name: str, kind: type = dsl.Dataset) -> "dsl.Artifact":
        path = self.folder / "artifacts" / name
        path.parent.mkdir(exist_ok=True)
        self.made[name] = kind(name=name, uri=str(path), metadata={})
        return self.made[name]

    def said(self, name: str) -> dict:
        return json.loads(Path(self.made[name].path).read_text())

    def step(self, name: str) -> Path:
        return self.folder / "runs" / "smoke" / name


@pytest.fixture(scope="module", autouse=True)
def environment() -> Iterator[None]:
    """Components change it, as they may in a process of their own."""
    before = dict(os.environ)
    os.environ["MLFLOW_TRACKING_URI"] = NOBODY
    yield
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture(scope="module")
def encoded(tmp_path_factory: pytest.TempPathFactory, vae: Path, text_encoder: Path) -> World:
    """A world whose data steps are done; training its models takes a quarter of a minute, so they are brought."""
    from components import data
    from components.step import Job, describe
    from opensora.step import Report

    reads = {
        "demo_videos": [],
        "download": ["demo_videos"],
        "split": ["download"],
        "score": ["split"],
        "demo_models": ["score"],
        "caption": ["score", "demo_models"],
        "encode": ["caption", "demo_models"],
    }
    with caption_server() as server:
        world = World(tmp_path_factory.mktemp("world"), server.url)
        models = world.step("demo_models")
        shutil.copytree(vae, models / "vae")
        shutil.copytree(text_encoder, models / "t5")
        (models / "fingerprint.json").write_text('"brought"')
        for name, before in reads.items():
            manifest = world.artifact(name)
            if name == "demo_models":
                describe(manifest, name, Job(**world.job), Report(name))
            else:
                inputs = [world.made[step] for step in before]
                getattr(data, name).python_func(*inputs, **world.job, manifest=manifest)
    return world


@pytest.fixture(scope="module")
def trained(encoded: World) -> World:
    """A world whose stages are done: the first by the launcher, the others before their launchers are asked."""
    from components import training
    from components.step import Job
    from opensora.chain import run_step

    how = encoded.job | {"image": "", "tracking_uri": NOBODY, "budget_dollars": 0.0, "run_id": "run-1"}
    inputs = [encoded.made["encode"]]
    for stage in ("train_image", "train_video", "train_highres"):
        if stage != "train_image":
            run_step(stage, Job(**encoded.job).load(), Path(encoded.job["workdir"]))
        outputs = {
            "checkpoint": encoded.artifact(stage, dsl.Model),
            "metrics": encoded.artifact(f"{stage}-metrics", dsl.Metrics),
        }
        getattr(training, stage).python_func(*inputs, **how, **outputs)
        inputs = [encoded.made["encode"], encoded.made[stage]]
    return encoded


def test_data_components_describe_what_they_left(encoded: World) -> None:
    for name in ("demo_videos", "download", "split", "score", "demo_models", "caption", "encode"):
        said = encoded.said(name)
        assert said["uri"] == str(encoded.step(name))
        assert said["fingerprint"] == json.loads((encoded.step(name) / "fingerprint.json").read_text())
        assert (said["data_revision"], said["code_revision"]) == ("raw-1", "0123abc-dirty")
    assert encoded.made["split"].metadata["kept"] == 4


def test_a_training_set_is_named_fetched_and_found(encoded: World, tmp_path: Path) -> None:
    from components import data

    made, remote = encoded.made["encode"], tmp_path / "remote"
    remote.mkdir()
    assert data.version.python_func(made, remote="") == encoded.said("encode")["fingerprint"]
    revision = data.version.python_func(made, remote=str(remote))
    assert revision.endswith(".dir")

    job = encoded.job | {"workdir": str(tmp_path / "elsewhere"), "data_revision": revision}
    found = dsl.Dataset(name="found", uri=str(tmp_path / "found"), metadata={})
    assert data.restore.python_func(**job, remote=str(remote), manifest=found) == revision
    there = tmp_path / "elsewhere" / "smoke" / "encode"
    names = {path.name for path in encoded.step("encode").iterdir()}
    assert {path.name for path in there.iterdir()} == names
    assert json.loads(Path(found.path).read_text())["data_revision"] == revision

    job = encoded.job | {"data_revision": ""}  # no remote: what lies in the workdir
    assert data.restore.python_func(**job, remote="", manifest=found) == encoded.said("encode")["fingerprint"]


def test_a_stage_trains_and_says_what_it_left(trained: World) -> None:
    for stage in ("train_image", "train_video", "train_highres"):
        said = trained.said(stage)
        assert said["uri"] == str(trained.step(stage))
        assert said["report"]["step"] == stage
        logged = json.loads(Path(trained.made[f"{stage}-metrics"].path).read_text())
        assert logged["loss"] == said["report"]["metrics"]["loss"] == trained.made[f"{stage}-metrics"].metadata["loss"]
    tags = (trained.step(".mlflow")).rglob("spool.jsonl")
    # MLflow was away; what it is to hear lies in the spool, with both revisions.
    spooled = "".join(path.read_text() for path in tags if path.parent.name == "train_image")
    for word in ('"raw-1"', '"0123abc"', '"git_dirty": "true"'):
        assert word in spooled


def test_a_stage_that_is_finished_starts_no_process(
    trained: World, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from components import launch, training

    def never(*_: object) -> None:
        raise AssertionError("something was started")

    monkeypatch.setattr(launch, "_on_this_machine", never)
    monkeypatch.setattr(launch, "_on_cluster", never)
    how = trained.job | {"image": "i", "tracking_uri": "", "budget_dollars": 1.0, "run_id": "run-2"}
    outputs = {
        "checkpoint": dsl.Model(name="c", uri=str(tmp_path / "c"), metadata={}),
        "metrics": dsl.Metrics(name="m", uri=str(tmp_path / "m"), metadata={}),
    }
    training.train_image.python_func(trained.made["encode"], **how, **outputs)
    assert "nothing to train" in capsys.readouterr().out
    assert (tmp_path / "c").read_text() == Path(trained.made["train_image"].path).read_text()


def test_the_last_error_of_a_training_process_is_the_launchers(
    trained: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from components import training

    job = trained.job | {"overrides": [*trained.job["overrides"], "train_image.batch_size=64"]}
    how = job | {"image": "", "tracking_uri": NOBODY, "budget_dollars": 0.0, "run_id": "run-3"}
    outputs = {
        "checkpoint": dsl.Model(name="c", uri=str(tmp_path / "c"), metadata={}),
        "metrics": dsl.Metrics(name="m", uri=str(tmp_path / "m"), metadata={}),
    }
    with pytest.raises(SystemExit) as end:
        training.train_image.python_func(trained.made["encode"], **how, **outputs)
    assert end.value.code
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert last.startswith("error: ")
    assert "no batch can be filled from the 4 clips" in last


def test_evaluation_and_gate(trained: World) -> None:
    from components import release

    checkpoint = dsl.Model(name="found", uri=str(trained.folder / "found"), metadata={})
    release.trained.python_func(**trained.job, checkpoint=checkpoint)
    assert json.loads(Path(checkpoint.path).read_text())["uri"] == str(trained.step("train_highres"))

    outputs = {
        "manifest": trained.artifact("evaluate"),
        "metrics": trained.artifact("evaluate-metrics", dsl.Metrics),
        "gallery": trained.artifact("gallery", dsl.HTML),
    }
    release.evaluate.python_func(checkpoint, **trained.job, tracking_uri=NOBODY, **outputs)
    assert "<html" in Path(outputs["gallery"].path).read_text()
    assert "train_highres_flicker" in outputs["metrics"].metadata

    outputs = {"manifest": trained.artifact("promote"), "gate": trained.artifact("gate", dsl.Markdown)}
    values = {"evaluate": trained.made["evaluate"].uri, "out": str(trained.folder), "job": trained.job}
    done = subprocess.run(  # a process of its own, as a step is, which its end frees of locks
        [sys.executable, "-c", PROMOTE_WITHOUT_MLFLOW, json.dumps(values | {"uri": NOBODY})],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 1
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("error: ")
    assert "127.0.0.1" in last

    del os.environ["MLFLOW_TRACKING_URI"]  # a file below the workdir
    verdict = release.promote.python_func(trained.made["evaluate"], **trained.job, tracking_uri="", **outputs)
    assert verdict.promoted is True
    assert "promoted" in Path(outputs["gate"].path).read_text()
    from opensora.tracking.registry import champion

    version = champion(Path(trained.job["workdir"]), "opensora-smoke")
    assert version.tags["data_revision"] == "raw-1"
    assert (version.tags["git_commit"], version.tags["git_dirty"]) == ("0123abc", "true")
