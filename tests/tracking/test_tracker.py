"""Tracking: spool first, one parent with a child a step, nothing lost when the store is away."""

import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from opensora.tracking.spool import SYSTEM, SpoolWriter
from opensora.tracking.store import connect
from opensora.tracking.tracker import IMAGES, Tracker, replay
from tests.conftest import ROOT


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory, mlflow_store: Path) -> Path:
    root = tmp_path_factory.mktemp("runs")
    shutil.copy(mlflow_store, root)
    return root


@pytest.fixture(autouse=True)
def default_store(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))  # of the process that sends


def track(root: Path, step: str, profile: str = "smoke") -> Tracker:
    return Tracker.start(root, profile, step, {"train": {"lr": 0.1}}, {"stage": step}, root)


def runs(root: Path, profile: str = "smoke") -> list:
    client = connect(root)
    experiment = client.get_experiment_by_name(f"opensora-{profile}")
    return list(client.search_runs([experiment.experiment_id])) if experiment else []


def test_a_chain_is_a_parent_with_one_child_a_step(root: Path) -> None:
    for step in ("train_image", "train_video"):
        with track(root, step) as tracker:
            tracker.log_metrics({"loss": 2.0}, 1)
            tracker.log_metrics({"loss": 1.0}, 2)
            tracker.log_image(np.zeros((4, 4, 3), np.uint8), "sample", 2)
        pictures = [path.name for path in (tracker.place / IMAGES).iterdir()]
        assert pictures == ["sample-2.png"]  # they wait there, not in the step's folder
    children = [run for run in runs(root) if "mlflow.parentRunId" in run.data.tags]
    assert {run.info.run_name for run in children} == {"train_image", "train_video"}
    assert len({run.data.tags["mlflow.parentRunId"] for run in children}) == 1
    assert all(run.info.status == "FINISHED" for run in runs(root))
    child = children[0]
    assert child.data.params["train.lr"] == "0.1"
    assert child.data.tags["git_commit"]
    history = connect(root).get_metric_history(child.info.run_id, "loss")
    assert [(point.step, point.value) for point in history] == [(1, 2.0), (2, 1.0)]


def test_what_the_machine_did_is_sent_by_the_next_run_where_it_was_left_over(root: Path) -> None:
    with track(root, "train_image", "demo") as tracker:
        tracker.log_metrics({"loss": 1.0})
    writer = SpoolWriter(tracker.place / SYSTEM)  # a last sample, after the run's own records were sent
    writer.append({"kind": "metrics", "step": 0, "values": {"system/cpu": 7.0}, "time": 1})
    assert writer.close() == 0
    replay(root, nowhere=True)  # as the next run does at its end
    (run,) = (run for run in runs(root, "demo") if run.info.run_name == "train_image")
    assert run.data.metrics == {"loss": 1.0, "system/cpu": 7.0}


def test_an_error_marks_the_run_as_failed(root: Path) -> None:
    with pytest.raises(ZeroDivisionError), track(root, "evaluate", "single_gpu"):
        _ = 1 / 0
    assert {run.info.status for run in runs(root, "single_gpu")} == {"FAILED"}


def test_a_dead_store_stops_nothing_and_loses_nothing(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")  # nobody answers there
        with track(root, "promote", "smoke") as tracker:
            for step in range(50):
                tracker.log_metrics({"loss": float(step)}, step)
            work = tmp_path / ".partial" / "promote"
            work.mkdir(parents=True)
            (work / "gate.json").write_text("{}")
            tracker.log_artifact(work / "gate.json")
    work.rename(tmp_path / "promote")  # the step is done
    assert not any(run.info.run_name == "promote" for run in runs(root))
    with track(root, "evaluate", "smoke"):  # the next step finds the server and sends for both
        pass
    child = next(run for run in runs(root) if run.info.run_name == "promote")
    history = connect(root).get_metric_history(child.info.run_id, "loss")
    assert [point.value for point in history] == [float(step) for step in range(50)]
    assert [item.path for item in connect(root).list_artifacts(child.info.run_id)] == ["gate.json"]
    assert replay(root) == 0


def test_two_threads_may_be_the_first_to_use_mlflow(tmp_path: Path) -> None:
    code = (
        "import sys, threading; from pathlib import Path; from opensora.tracking.registry import champion\n"
        "from opensora.tracking.store import connect\n"
        "root, failed = Path(sys.argv[1]), []\n"
        "def look(number):\n"
        "    try: champion(root, 'none') if number % 2 else connect(root)\n"
        "    except Exception as error: failed.append(error)\n"
        "threads = [threading.Thread(target=look, args=[n]) for n in range(4)]\n"
        "for thread in threads: thread.start()\n"
        "for thread in threads: thread.join()\n"
        "sys.exit(str(failed) if failed else 0)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, cwd=ROOT, timeout=120
    )
    assert done.returncode == 0, done.stderr
