"""What recording a step costs the thread that trains, whatever the tracking server does.

    python -m benchmarks.tracking          # two minutes

Each state of the server gets a run of its own: 1500 steps of two milliseconds, each of which records twelve metrics.
Wall time and CPU time of the call alone, on the thread that trains. For comparison the same by MLflow's own client,
which waits for the server's answer.
"""

import multiprocessing
import os
import signal
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path

from benchmarks.measure import save
from opensora.tracking.drain import look
from opensora.tracking.tracker import Tracker
from tests.tracking.broken_servers import answering, hanging
from tests.tracking.mlflow_server import MlflowServer

STEPS, STEP_S, DIRECT_CALLS = 1500, 0.002, 30
VALUES = {f"metric_{number}": number + 0.123456789 for number in range(12)}


@contextmanager
def healthy() -> Iterator[str]:
    """A real MLflow server."""
    with tempfile.TemporaryDirectory() as folder:
        server = MlflowServer(Path(folder))
        try:
            server.start()
            yield server.uri
        finally:
            server.close()


@contextmanager
def at(address: str) -> Iterator[str]:
    """Nobody there, or a file."""
    yield address


@contextmanager
def apart(server: Callable[[], AbstractContextManager[str]]) -> Iterator[str]:
    """A server in a process of its own: its threads would take turns with the one that is measured."""
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=_hold, args=(server, there), daemon=True)
    process.start()
    try:
        yield here.recv()
    finally:
        process.kill()
        process.join()


def _hold(server: Callable[[], AbstractContextManager[str]], there: Connection) -> None:
    with server() as address:
        there.send(address)
        signal.pause()


STATES: dict[str, Callable[[], AbstractContextManager[str]]] = {
    "no server (a file)": lambda: at(""),
    "up": healthy,
    "down": lambda: at("http://127.0.0.1:9"),
    "hangs": lambda: apart(hanging),
    "answers 503": lambda: apart(partial(answering, 503)),
}


def record(root: Path) -> tuple[dict[str, float], int]:
    """Milliseconds a call, and how many records were left unsent at the end."""
    wall, processor = [], []
    tracker = Tracker.start(root, "smoke", "train_image", {"lr": 0.1}, {}, root)
    for step in range(STEPS):
        end = time.perf_counter() + STEP_S
        while time.perf_counter() < end:  # a thread that holds the interpreter, as one that trains does
            pass
        start, start_processor = time.perf_counter(), time.thread_time()
        tracker.log_metrics(VALUES, step)
        processor.append(1000 * (time.thread_time() - start_processor))
        wall.append(1000 * (time.perf_counter() - start))
    start = time.perf_counter()
    tracker.close()
    ordered = sorted(wall)
    figures = {
        "mean": statistics.fmean(wall),
        "median": ordered[STEPS // 2],
        "99 of 100 below": ordered[STEPS * 99 // 100],
        "mean, CPU": statistics.fmean(processor),
    }
    return {name: round(value, 4) for name, value in figures.items()} | {
        "close_seconds": round(time.perf_counter() - start, 1)
    }, look(root, tracker.place).unsent


def by_client(address: str) -> float:
    """Median milliseconds of the same metrics by MLflow's client."""
    from mlflow import MlflowClient
    from mlflow.entities import Metric

    client = MlflowClient(address)
    run = client.create_run(client.create_experiment("direct")).info.run_id
    times = []
    for step in range(DIRECT_CALLS):
        start = time.perf_counter()
        client.log_batch(run, [Metric(name, value, step, step) for name, value in VALUES.items()])
        times.append(1000 * (time.perf_counter() - start))
    return round(statistics.median(times), 2)


def main() -> None:
    """Measure and save."""
    values: dict[str, object] = {"command": "python -m benchmarks.tracking", "steps": STEPS, "metrics_a_step": 12}
    values |= {"niceness": os.nice(0), "load_average": round(os.getloadavg()[0], 1), "cores": os.cpu_count()}
    states: dict[str, object] = {}
    for name, state in STATES.items():
        with state() as address, tempfile.TemporaryDirectory() as folder:
            if name == "up":
                values["milliseconds_by_mlflow_client"] = by_client(address)
            os.environ["MLFLOW_TRACKING_URI"] = address
            figures, unsent = record(Path(folder))
            del os.environ["MLFLOW_TRACKING_URI"]
        states[name] = {"milliseconds_a_step": figures, "records_left_in_the_spool": unsent}
        print(name, states[name], flush=True)
    print(save("tracking", values | {"states": states}))


if __name__ == "__main__":
    main()
