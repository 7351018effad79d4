"""A run of one step, written to a local spool first.

Every record is a line in the spool, with its time fixed; a thread drains it. A tracking server that is down neither
stops training nor loses a point: what is left is sent at the next start, or by `replay`.
"""

import json
import logging
import threading
import time
import uuid
from pathlib import Path
from types import TracebackType
from typing import IO, TYPE_CHECKING, Any

from opensora.step import final_place, lock_file, write_json
from opensora.tracking.lineage import flatten, lineage
from opensora.tracking.store import connect, experiment_id

if TYPE_CHECKING:
    import numpy as np
    from mlflow import MlflowClient

BATCH = 900  # metrics a request; the store accepts 1000
PARAMS_BATCH = 100
DRAIN_EVERY_S = 2.0
CLOSE_TIMEOUT_S = 60.0
LOCK = "lock"  # beside a spool, held while a run writes to it
log = logging.getLogger(__name__)


class Tracker:
    """One child run; see `start`."""

    def __init__(self, root: Path, profile: str, step: str, folder: Path) -> None:
        self.root, self.profile, self.step, self.folder = root, profile, step, folder
        self.spool, self.offset = folder / "spool.jsonl", folder / "offset"
        self._client: MlflowClient | None = None
        self._held: IO[str] | None = None
        self._wake, self._stop = threading.Event(), threading.Event()
        self._lock = threading.Lock()
        self._thread = threading.Thread(target=self._drain_forever, name="tracking", daemon=True)

    @classmethod
    def start(
        cls, root: Path, profile: str, step: str, params: dict[str, Any], tags: dict[str, str], folder: Path
    ) -> "Tracker":
        """Open the child run of `step` below the chain's parent run; a stopped step goes on in its own run.

        A parent has one child a step: when a step that finished starts again, a new parent begins.

        Args:
            root: folder of all results.
            folder: where the step works; pictures wait there until they are sent.
        """
        base = root / profile / ".mlflow"
        base.mkdir(parents=True, exist_ok=True)
        state_file = base / "current.json"
        state = json.loads(state_file.read_text()) if state_file.is_file() else {}
        if not state or state["steps"].get(step) == "finished":
            state = {"group": uuid.uuid4().hex[:12], "steps": {}}
        fresh = step not in state["steps"]
        state["steps"][step] = "open"
        write_json(state_file, state)
        place = base / state["group"] / step
        place.mkdir(parents=True, exist_ok=True)
        tracker = cls(root, profile, step, place)
        if fresh:
            tracker._put({"kind": "start", "params": flatten(params), "tags": lineage() | tags})
        tracker._held = lock_file(place / LOCK)
        tracker._thread.start()
        return tracker

    def log_metrics(self, values: dict[str, float], step: int = 0) -> None:
        """Metrics of one step."""
        self._put({"kind": "metrics", "step": step, "values": values})

    def log_image(self, pixels: "np.ndarray", key: str, step: int = 0) -> None:
        """A picture uint8 [H, W, 3], shown by step."""
        from PIL import Image

        path = self.folder / f"{key.replace('/', '-')}-{step}.png"
        Image.fromarray(pixels).save(path)
        self._put({"kind": "image", "step": step, "key": key, "path": str(path.resolve())})

    def log_artifact(self, path: Path, artifact_path: str = "") -> None:
        """A file that stays where it is until it is sent, or until its step is done."""
        self._put({"kind": "artifact", "path": str(path.resolve()), "artifact_path": artifact_path})

    def log_checkpoint(self, path: Path, step: int, sha256: str) -> None:
        """A checkpoint by reference to where it lies when its step is done."""
        place = str(final_place(path.resolve()))
        self._put({"kind": "checkpoint", "path": place, "step": step, "sha256": sha256})

    def close(self, status: str = "FINISHED", timeout_s: float = CLOSE_TIMEOUT_S) -> None:
        """End the run; what cannot be sent in time stays in the spool."""
        self._put({"kind": "status", "status": status})
        self._stop.set()
        self._wake.set()
        self._thread.join(timeout_s)
        if self._held:
            self._held.close()
        if status == "FINISHED":
            state_file = self.root / self.profile / ".mlflow" / "current.json"
            state = json.loads(state_file.read_text())
            state["steps"][self.step] = "finished"
            write_json(state_file, state)

    def __enter__(self) -> "Tracker":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.close()
        else:
            self.close("KILLED" if getattr(error, "exit_code", 0) > 128 or kind is KeyboardInterrupt else "FAILED")

    def _put(self, record: dict[str, Any]) -> None:
        line = json.dumps(record | {"time": int(time.time() * 1000)})
        with self._lock, self.spool.open("a") as handle:
            handle.write(line + "\n")

    def _drain_forever(self) -> None:
        while True:
            stopping = self._stop.is_set()
            try:
                self.drain()
                if stopping:
                    replay(self.root)
            except Exception as error:  # whatever the store says, training goes on and the spool keeps all
                log.debug("tracking: %s", error)
                if stopping:
                    log.warning("tracking: the store could not be reached; %s keeps what was not sent", self.spool)
            if stopping:
                return
            self._wake.wait(DRAIN_EVERY_S)

    def drain(self) -> None:
        """Send what the spool holds past the offset; any error of the store leaves the offset where it is."""
        done = int(self.offset.read_text()) if self.offset.is_file() else 0
        with self.spool.open("rb") as handle:
            handle.seek(done)
            lines = [line for line in handle.readlines() if line.endswith(b"\n")]
        if not lines:
            return
        self._client = self._client or connect(self.root)
        run = self._run_id()
        pending: list[dict] = []
        for line in [*lines, b""]:
            record = json.loads(line) if line else {"kind": "end"}
            if record["kind"] == "metrics" and sum(len(item["values"]) for item in pending) < BATCH - 20:
                pending.append(record)
                done += len(line)
                continue
            self._send_metrics(run, pending)
            self._mark(done)
            pending = [record] if record["kind"] == "metrics" else []
            if record["kind"] not in ("metrics", "end"):
                self._send(run, record)
            done += len(line)
            if not pending:
                self._mark(done)

    def _mark(self, done: int) -> None:
        part = self.offset.with_name("offset.part")
        part.write_text(str(done))
        part.replace(self.offset)

    def _send_metrics(self, run: str, records: list[dict]) -> None:
        from mlflow.entities import Metric

        if records:
            assert self._client is not None
            metrics = [
                Metric(name, float(value), record["time"], record["step"])
                for record in records
                for name, value in record["values"].items()
            ]
            self._client.log_batch(run, metrics=metrics)

    def _send(self, run: str, record: dict) -> None:
        from mlflow.entities import Param, RunTag

        client = self._client
        assert client is not None
        match record["kind"]:
            case "start":
                params = [Param(name, value[:6000]) for name, value in record["params"].items()]
                for start in range(0, len(params), PARAMS_BATCH):
                    client.log_batch(run, params=params[start : start + PARAMS_BATCH])
                client.log_batch(run, tags=[RunTag(name, value) for name, value in record["tags"].items()])
            case "image" if Path(record["path"]).is_file():
                import numpy as np
                from PIL import Image

                picture = np.asarray(Image.open(record["path"]))
                client.log_image(run, picture, key=record["key"], step=record["step"])
            case "artifact":
                path = Path(record["path"])
                for place in (path, final_place(path)):
                    if place.is_file():
                        client.log_artifact(run, str(place), record["artifact_path"] or None)
                        break
            case "checkpoint":
                self._send_checkpoint(run, record)
            case "status":
                client.set_terminated(run, record["status"], record["time"])
                client.set_terminated(self._parent_id(), record["status"], record["time"])

    def _send_checkpoint(self, run: str, record: dict) -> None:
        from mlflow.entities import LoggedModelOutput

        assert self._client is not None
        model = self._client.create_logged_model(
            experiment_id(self._client, self.root, self.profile),
            name=f"{self.step}-{record['step']}",
            source_run_id=run,
            params={"step": str(record["step"])},
            tags={"checkpoint.uri": record["path"], "checkpoint.sha256": record["sha256"]},
        )
        self._client.finalize_logged_model(model.model_id, "READY")  # the files stay where they are
        self._client.log_outputs(run, [LoggedModelOutput(model.model_id, record["step"])])

    def _parent_id(self) -> str:
        return self._create_once(self.folder.parent / "run_id", f"chain {self.folder.parent.name}", {})

    def _run_id(self) -> str:
        return self._create_once(self.folder / "run_id", self.step, {"mlflow.parentRunId": self._parent_id()})

    def _create_once(self, file: Path, name: str, tags: dict[str, str]) -> str:
        """The run whose id `file` holds; created and written there the first time."""
        if not file.is_file():
            assert self._client is not None
            experiment = experiment_id(self._client, self.root, self.profile)
            run = self._client.create_run(experiment, run_name=name, tags=tags | {"profile": self.profile})
            part = file.with_name("run_id.part")
            part.write_text(run.info.run_id)
            part.replace(file)
        return file.read_text()


def replay(root: Path) -> int:
    """Send what spools that no process uses any more still hold; returns how many there were.

    Every run does so at its end, for the runs before it that had no server to send to.
    """
    count = 0
    for spool in sorted(root.glob("*/.mlflow/*/*/spool.jsonl")):
        offset = spool.with_name("offset")
        if (int(offset.read_text()) if offset.is_file() else 0) < spool.stat().st_size:
            held = lock_file(spool.with_name(LOCK))
            if held:
                with held:
                    Tracker(root, spool.parts[-5], spool.parent.name, spool.parent).drain()
                count += 1
    return count
