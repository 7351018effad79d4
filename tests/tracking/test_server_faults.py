"""A real MLflow server that is killed, slow, broken or forgetful: training goes on, nothing is lost or doubled."""

import json
import os
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from mlflow import MlflowClient
from typer.testing import CliRunner

from opensora.config import UserError
from opensora.step import write_json
from opensora.track_cli import track
from opensora.tracking.drain import Drain, look
from opensora.tracking.spool import SYSTEM, SpoolWriter, count_records, read_marks, read_rejected
from opensora.tracking.store import StoreAway
from opensora.tracking.tracker import Tracker
from tests.conftest import ROOT
from tests.tracking import nvidia_smi
from tests.tracking.broken_servers import answering, hanging, losing_answers
from tests.tracking.mlflow_server import MlflowServer

LIMIT_S = 120.0
NAMES = ("loss", "gradient_norm", "lr", "samples_per_second", "mfu")
STEPS = 2000


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[MlflowServer]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(ROOT))
        server = MlflowServer(tmp_path_factory.mktemp("server"))
        try:
            server.start()
            MlflowClient(server.uri).search_experiments()  # the first use of a new database takes seconds
            yield server
        finally:
            server.close()


@pytest.fixture
def use(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Let trackers use the store at an address."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "60")
    return lambda address: monkeypatch.setenv("MLFLOW_TRACKING_URI", address)


def begin(root: Path, step: str = "train_image", profile: str = "smoke", **params: object) -> Tracker:
    work = root / profile / step
    work.mkdir(parents=True, exist_ok=True)
    return Tracker.start(root, profile, step, {"train": params or {"lr": 0.1}}, {}, work)


def record(root: Path, step: str = "train_image", **params: object) -> tuple[Tracker, Path]:
    """A tracker whose records nobody sends but the test."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Tracker, "_start_sender", lambda self: None)
        tracker = begin(root, step, **params)
    return tracker, tracker.place


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + LIMIT_S
    while not condition():
        assert time.monotonic() < deadline, "it never happened"
        time.sleep(0.01)


def of_chain(server: MlflowServer, place: Path) -> dict[str, list]:
    """Runs of the chain, by step; the parent is ""."""
    client = MlflowClient(server.uri)
    experiment = client.get_experiment_by_name("opensora-smoke")
    found: dict[str, list] = {}
    for run in client.search_runs([experiment.experiment_id]):
        chain, _, step = run.data.tags["opensora.run"].partition("/")
        if chain == place.parent.name:
            found.setdefault(step, []).append(run)
    return found


def test_ten_thousand_points_survive_three_kills(
    server: MlflowServer, use: Callable[[str], None], tmp_path: Path
) -> None:
    use(server.uri)
    tracker = begin(tmp_path)

    def sent() -> int:
        return sum(read_marks(tracker.place).values())

    with tracker:
        for kill in range(4):
            for step in range(kill * STEPS // 4, (kill + 1) * STEPS // 4):
                tracker.log_metrics(dict.fromkeys(NAMES, step + 0.5), step)
            if kill < 3:
                before = sent()
                wait_until(lambda before=before: sent() > before)  # some of it, and the next request is on its way
                server.kill()
                tracker.log_metrics({"while_down": 1.0}, kill)
                server.start()
    state = look(tmp_path, tracker.place)
    assert (state.unsent, state.rejected) == (0, 0)
    ((parent,), (child,)) = (of_chain(server, tracker.place)[step] for step in ("", "train_image"))
    assert parent.info.status == child.info.status == "FINISHED"
    client = MlflowClient(server.database)  # not by a thousand pages over HTTP
    for name in NAMES:
        points = [(point.step, point.value) for point in client.get_metric_history(child.info.run_id, name)]
        assert sorted(points) == [(step, step + 0.5) for step in range(STEPS)]
    assert len(client.get_metric_history(child.info.run_id, "while_down")) == 3


def test_an_answer_that_is_lost_makes_nothing_twice(
    server: MlflowServer, use: Callable[[str], None], tmp_path: Path
) -> None:
    tracker, place = record(tmp_path, lr=0.1, depth=4)
    data = tmp_path / "smoke" / "encode"
    data.mkdir()
    write_json(data / "fingerprint.json", "0123456789" * 6)
    tracker.log_dataset(data, "training")
    tracker.log_metrics({"loss": 2.0, "bad": float("nan"), "high": float("inf")}, 5)
    tracker.log_image(np.zeros((8, 6, 3), np.uint8), "a red circle, moving; left", 5)
    (tmp_path / "note.txt").write_text("hello")
    tracker.log_artifact(tmp_path / "note.txt", "notes")
    tracker.log_checkpoint(tmp_path / "smoke" / ".partial" / "train_image" / "step-5", 5, "a" * 64)
    tracker.close()
    lost: list[str] = []
    with losing_answers(server.uri, lost) as proxy:
        use(proxy)
        for _ in range(40):  # a process each, which knows nothing of the one before
            drain = Drain(tmp_path, place, lambda text: None)
            try:
                drain.run()
                break
            except StoreAway:
                continue
        assert drain.readers[0].sent == drain.readers[0].path.stat().st_size
        assert drain.rejected == 0
    wanted = (
        "runs/create",
        "runs/log-batch",
        "logged-models",
        "runs/outputs",
        "log-inputs",
        "artifacts",
        "runs/update",
    )
    assert all(any(word in change for change in lost) for word in wanted), lost
    runs = of_chain(server, place)
    assert Counter({step: len(found) for step, found in runs.items()}) == {"": 1, "train_image": 1}
    child = runs["train_image"][0]
    client = MlflowClient(server.uri)
    history = {name: client.get_metric_history(child.info.run_id, name) for name in ("loss", "bad", "high")}
    assert [len(points) for points in history.values()] == [1, 1, 1]
    assert np.isnan(history["bad"][0].value)
    assert history["high"][0].value > 1e308
    assert len(client.list_artifacts(child.info.run_id, "images")) == 2  # the picture and its preview
    assert [item.path for item in client.list_artifacts(child.info.run_id, "notes")] == ["notes/note.txt"]
    (dataset,) = client.get_run(child.info.run_id).inputs.dataset_inputs
    assert (dataset.dataset.name, dataset.dataset.digest) == ("encode", ("0123456789" * 6)[:36])
    assert [(tag.key, tag.value) for tag in dataset.tags] == [("mlflow.data.context", "training")]
    (output,) = client.get_run(child.info.run_id).outputs.model_outputs
    models = client.search_logged_models(
        [child.info.experiment_id],
        filter_string=f"metrics.loss < 3 AND source_run_id = '{child.info.run_id}'",
        datasets=[{"dataset_name": "encode", "dataset_digest": dataset.dataset.digest}],
    )
    assert [(model.model_id, model.params["step"], str(model.status)) for model in models] == [
        (output.model_id, "5", "READY")
    ]
    assert models[0].tags["checkpoint.sha256"] == "a" * 64
    assert models[0].tags["checkpoint.uri"] == str(tmp_path / "smoke" / "train_image" / "step-5")


def test_a_record_that_is_refused_holds_nothing_up(
    server: MlflowServer, use: Callable[[str], None], tmp_path: Path
) -> None:
    use(server.uri)
    tracker, place = record(tmp_path, **{"lr": 0.1, "n" * 300: 1})
    for step in range(20):
        tracker.log_metrics({"loss": float(step), "samples%/s|": 1.0} if step == 7 else {"loss": float(step)}, step)
    tracker.log_artifact(tmp_path / "gone.txt")
    tracker.log_metrics({"after": 1.0}, 20)
    tracker.close()
    said: list[str] = []
    Drain(tmp_path, place, said.append).run()
    assert len(said) == 1
    refused = read_rejected(place)
    assert [item["record"]["kind"] for item in refused] == ["start", "metrics", "artifact"]
    assert refused[1]["record"]["values"] == {"samples%/s|": 1.0}
    assert "gone.txt is gone" in refused[2]["reason"]
    (child,) = of_chain(server, place)["train_image"]
    assert child.data.params == {"train.lr": "0.1"}
    assert child.data.metrics["after"] == 1.0
    assert len(MlflowClient(server.uri).get_metric_history(child.info.run_id, "loss")) == 20
    (tmp_path / "gone.txt").write_text("back")
    done = CliRunner().invoke(track, ["replay", "--rejected", "--workdir", str(tmp_path)])
    assert isinstance(done.exception, UserError)
    assert "2 records were refused" in str(done.exception)
    assert [item.path for item in MlflowClient(server.uri).list_artifacts(child.info.run_id)] == ["gone.txt"]


def test_a_step_that_goes_on_with_other_values_keeps_those_it_began_with(
    server: MlflowServer, use: Callable[[str], None], tmp_path: Path
) -> None:
    use(server.uri)
    for processes, status in ((1, "KILLED"), (8, "FINISHED")):
        tracker, place = record(tmp_path, lr=0.1, processes=processes)
        tracker.close(status)
        Drain(tmp_path, place, lambda text: None).run()
    (child,) = of_chain(server, place)["train_image"]
    assert child.data.params == {"train.lr": "0.1", "train.processes": "1"}
    assert child.data.tags["resumed.train.processes"] == "8"
    assert child.info.status == "FINISHED"
    assert read_rejected(place) == []


def test_a_store_that_lost_the_run_gets_all_of_it_again(
    server: MlflowServer, use: Callable[[str], None], tmp_path: Path
) -> None:
    use(server.uri)
    tracker, place = record(tmp_path)
    tracker.log_metrics({"loss": 1.0}, 1)
    drain = Drain(tmp_path, place, lambda text: None)
    drain.run()
    (child,) = of_chain(server, place)["train_image"]
    MlflowClient(server.uri).delete_run(child.info.run_id)
    tracker.log_metrics({"loss": 2.0}, 2)
    tracker.close()
    with pytest.raises(StoreAway, match="made anew"):
        drain.run()
    drain.run()
    (child,) = of_chain(server, place)["train_image"]
    history = MlflowClient(server.uri).get_metric_history(child.info.run_id, "loss")
    assert [point.value for point in history] == [1.0, 2.0]


def test_two_pods_that_send_at_once_share_a_parent_which_runs_until_both_end(
    server: MlflowServer, use: Callable[[str], None], tmp_path: Path
) -> None:
    use(server.uri)
    trackers = {step: record(tmp_path, step)[0] for step in ("evaluate", "train_highres")}
    place = trackers["evaluate"].place

    def send_all() -> None:
        with ThreadPoolExecutor(2) as pool:
            drains = [Drain(tmp_path, tracker.place, lambda text: None) for tracker in trackers.values()]
            for done in [pool.submit(drain.run) for drain in drains]:
                done.result(LIMIT_S)

    send_all()
    trackers["evaluate"].close("FAILED")
    send_all()
    runs = of_chain(server, place)
    assert {step: [run.info.status for run in found] for step, found in runs.items()} == {
        "": ["RUNNING"],
        "evaluate": ["FAILED"],
        "train_highres": ["RUNNING"],
    }
    trackers["train_highres"].close()
    send_all()
    assert [run.info.status for run in of_chain(server, place)[""]] == ["FAILED"]


def test_replay_sends_what_a_killed_run_left(server: MlflowServer, use: Callable[[str], None], tmp_path: Path) -> None:
    code = (
        "import os, signal, sys; from pathlib import Path; from opensora.tracking.tracker import Tracker\n"
        "Tracker._start_sender = lambda self: None\n"
        "tracker = Tracker.start(Path(sys.argv[1]), 'smoke', 'train_image', {}, {}, Path(sys.argv[1]))\n"
        "for step in range(100): tracker.log_metrics({'loss': float(step)}, step)\n"
        "os.kill(os.getpid(), signal.SIGKILL)"
    )
    use("http://127.0.0.1:9")
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], timeout=LIMIT_S, check=False)
    (spool,) = tmp_path.glob("*/.mlflow/*/*/spool.jsonl")
    with spool.open("a") as handle:
        handle.write('{"kind": "metrics", "st')  # what the kill left of a line
    writer = SpoolWriter(spool.parent)
    writer.append({"kind": "metrics", "step": 100, "values": {"loss": 100.0}, "time": 1})  # the next start
    writer.close()
    away = CliRunner().invoke(track, ["replay", "--workdir", str(tmp_path)])
    assert isinstance(away.exception, UserError)
    assert "cannot be reached" in str(away.exception)
    use(server.uri)
    done = CliRunner().invoke(track, ["replay", "--workdir", str(tmp_path)])
    assert "103 records sent" in done.stdout
    assert "0 records left" in done.stdout
    (child,) = of_chain(server, spool.parent)["train_image"]
    history = MlflowClient(server.uri).get_metric_history(child.info.run_id, "loss")
    assert sorted(point.value for point in history) == [float(step) for step in range(101)]
    status = CliRunner().invoke(track, ["status", "--workdir", str(tmp_path)]).stdout
    assert status.splitlines()[-1].split()[1:] == ["103", "0", "1"]  # the torn line is set aside
    assert CliRunner().invoke(track, ["replay", "--workdir", str(tmp_path)]).stdout.startswith("0 spools sent")


def test_what_the_machine_does_is_sent_once_though_the_server_was_down(
    server: MlflowServer, use: Callable[[str], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_ENABLE_SYSTEM_METRICS_LOGGING", "true")
    monkeypatch.setenv("MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL", "0.2")
    nvidia_smi.install(tmp_path / "bin", monkeypatch, ["0, 97, 61440, 81920, 612.34, 700.00"])
    use("http://127.0.0.1:9")
    tracker = begin(tmp_path)
    system = tracker.place / SYSTEM
    with suppress(KeyboardInterrupt), tracker:
        wait_until(lambda: count_records(system) > 2)
        raise KeyboardInterrupt
    stopped = count_records(system)
    assert look(tmp_path, tracker.place).unsent == stopped + 2  # its start and its end
    use(server.uri)
    with begin(tmp_path) as again:
        assert again.place == tracker.place
        wait_until(lambda: count_records(system) > stopped and sum(read_marks(system).values()) > 0)
    state = look(tmp_path, tracker.place)
    assert (state.unsent, state.rejected) == (0, 0)
    samples = [json.loads(line) for line in (system / "spool.jsonl").read_text().splitlines()]
    assert [sample["step"] for sample in samples] == list(range(len(samples)))
    assert samples[0]["values"]["system/gpu_0_power_usage_watts"] == 612.3
    (child,) = of_chain(server, tracker.place)["train_image"]
    assert child.info.status == "FINISHED"
    client = MlflowClient(server.uri)
    for name in ("system/cpu_utilization_percentage", "system/gpu_0_utilization_percentage"):
        points = [
            (point.step, point.timestamp, point.value) for point in client.get_metric_history(child.info.run_id, name)
        ]
        assert sorted(points) == [(sample["step"], sample["time"], sample["values"][name]) for sample in samples]
    kinds = [json.loads(line)["kind"] for line in (tracker.place / "spool.jsonl").read_text().splitlines()]
    assert kinds == ["start", "status"] * 2  # no line of another process among those of the training


@pytest.mark.parametrize(
    ("trouble", "words"),
    [
        (lambda: answering(500), "HTTP 500"),
        (lambda: answering(503), "HTTP 503"),
        (lambda: answering(401), "MLFLOW_TRACKING_USERNAME"),
        (lambda: answering(403), "--allowed-hosts"),
        (lambda: answering(404), "no MLflow server"),
        (hanging, "does not answer within"),
    ],
    ids=["500", "503", "401", "403", "404", "hangs"],
)
def test_a_server_in_trouble_is_named_and_keeps_nothing(
    trouble: Callable, words: str, use: Callable[[str], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if trouble is hanging:
        monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "1")
    tracker, place = record(tmp_path)
    tracker.log_metrics({"loss": 1.0}, 1)
    tracker.close()
    with trouble() as address:
        use(address.replace("http://", "http://user:hunter2@"))
        drain = Drain(tmp_path, place, lambda text: None)
        with pytest.raises(StoreAway, match=words) as caught:
            drain.run()
    assert "hunter2" not in str(caught.value)
    assert look(tmp_path, place).unsent == 3
    assert read_rejected(place) == []


def test_a_run_on_a_server_that_hangs_ends_and_says_where_its_records_are(
    use: Callable[[str], None], tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "1")
    with hanging() as address:
        use(address)
        with begin(tmp_path) as tracker:
            tracker.log_metrics({"loss": 1.0}, 1)
    assert "opensora track replay" in caplog.text
    assert str(tracker.place) in caplog.text
    lines = [json.loads(line) for line in (tracker.place / "spool.jsonl").read_text().splitlines()]
    assert [line["kind"] for line in lines] == ["start", "metrics", "status"]
    assert tracker._sender is not None
    assert tracker._sender.returncode is not None
    assert not Path(f"/proc/{tracker._sender.pid}").exists() or os.name != "posix"
