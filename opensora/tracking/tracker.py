"""A run of one step, written to a local spool first.

Every record is a line in the spool, with its time fixed; a process beside this one sends it to the store. A tracking
server that is down, slow or broken neither stops training nor loses a point: what is left is sent at the end of the
next run, or by `opensora track replay`.
"""

import logging
import re
import subprocess
import sys
import time
from collections import deque
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from opensora.step import final_place
from opensora.tracking.chains import finish_step, join_chain, new_chain
from opensora.tracking.drain import look, replay, send
from opensora.tracking.lineage import data_digest, flatten, lineage
from opensora.tracking.redact import redact, redact_values
from opensora.tracking.spool import SpoolWriter

if TYPE_CHECKING:
    import numpy as np

__all__ = ["Tracker", "replay"]
CLOSE_TIMEOUT_S = 60.0
STOPPED_TIMEOUT_S = 15.0  # of a run that was told to stop: whoever told it does not wait for long
IMAGES = "images"  # folder beside the spool
RECENT = 64  # logged steps among which a checkpoint finds its metrics
log = logging.getLogger(__name__)


class Tracker:
    """One child run; see `start`. Threads may share it, and nothing that it is told raises for the store's sake."""

    def __init__(self, root: Path, place: Path, beside: bool = True) -> None:
        self.root, self.place = root.resolve(), place.resolve()
        self._spool = SpoolWriter(self.place)
        self._recent: deque[dict[str, Any]] = deque(maxlen=RECENT)
        self._dataset: dict[str, str] | None = None
        self._beside = beside
        self._sender: subprocess.Popen | None = None

    @classmethod
    def start(
        cls,
        root: Path,
        profile: str,
        step: str,
        params: dict[str, Any],
        tags: dict[str, str],
        folder: Path,
        *,
        beside: bool = True,
    ) -> "Tracker":
        """Open the child run of `step` below the chain's parent run; a stopped step goes on in its own run.

        A parent has one child a step: when a step that finished starts again, a new parent begins. Parameters that
        a step brings when it goes on stand beside those it began with, as tags `resumed.<name>`.

        Args:
            root: folder of all results.
            params: nested; credentials in them are not written.
            folder: where the step works; tracking.json there names the run.
            beside: records are sent while the step works, by another process; if not, by this one when the run is
                closed, as suits a step of a second that has imported MLflow anyway.
        """
        base = root / profile / ".mlflow"
        try:
            place, _ = join_chain(base, step, folder)
        except OSError as error:  # training says itself when it cannot write
            log.warning("tracking: %s: %s; records wait in memory, training goes on", base, error.strerror)
            place = base / new_chain() / step
        tracker = cls(root, place, beside)
        tracker._put(
            {
                "kind": "start",
                "params": redact_values(flatten(params)),
                "tags": redact_values(lineage() | tags),
            }
        )
        if beside:
            tracker._start_sender()
        return tracker

    def log_metrics(self, values: dict[str, float], step: int = 0) -> None:
        """Metrics of one step; NaN and infinities are recorded as such."""
        numbers = {name: float(value) for name, value in values.items()}
        record = {"kind": "metrics", "step": step, "values": numbers, "time": _now()}
        self._recent.append(record)
        self._spool.append(record)

    def log_image(self, pixels: "np.ndarray", key: str, step: int = 0) -> None:
        """A picture uint8 [H, W, 3], shown by step; characters that MLflow does not take become `_`."""
        from PIL import Image

        key = re.sub(r"[^a-zA-Z0-9_\-./ ]", "_", key)[:100]
        path = self.place / IMAGES / f"{key.replace('/', '-')}-{step}.png"
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(path)
        except OSError as error:
            log.warning("tracking: no picture %s of step %d: %s", key, step, error)
            return
        self._put({"kind": "image", "step": step, "key": key, "path": str(path.resolve())})

    def log_artifact(self, path: Path, artifact_path: str = "") -> None:
        """A file that stays where it is until it is sent, or until its step is done."""
        self._put({"kind": "artifact", "path": str(path.resolve()), "artifact_path": artifact_path})

    def log_dataset(self, folder: Path, context: str) -> None:
        """The data that the run reads, by its revision; checkpoints logged after it are linked to it.

        Args:
            folder: of the step that made it.
            context: "training" or "evaluation".
        """
        digest, source = data_digest(folder), redact(str(folder.resolve()))
        self._dataset = {"name": folder.name, "digest": digest}
        self._put({"kind": "dataset", **self._dataset, "source": source, "context": context})

    def log_checkpoint(self, path: Path, step: int, sha256: str) -> None:
        """A checkpoint by reference to where it lies when its step is done, with the newest metrics and the data."""
        record = {"kind": "checkpoint", "path": str(final_place(path.resolve())), "step": step, "sha256": sha256}
        known = [recent for recent in list(self._recent) if recent["step"] <= step]
        if known:
            record["metrics"] = {name: known[-1][name] for name in ("values", "step", "time")}
        if self._dataset:
            record["dataset"] = self._dataset
        self._put(record)

    def close(self, status: str = "FINISHED", timeout_s: float | None = None) -> None:
        """End the run; what cannot be sent in time stays in the spool.

        Args:
            timeout_s: a server that is known to be away is not waited for so long.
        """
        if status == "FINISHED":
            with suppress(OSError):
                finish_step(self.place)
        self._put({"kind": "status", "status": status})
        lost = self._spool.close()
        if lost:
            log.warning("tracking: %d records were lost, as the disk of %s took none", lost, self.place)
        if timeout_s is None:
            timeout_s = CLOSE_TIMEOUT_S if status == "FINISHED" else STOPPED_TIMEOUT_S
        reason = self._end_sender(timeout_s) if self._beside else send(self.root, self.place)
        if reason:
            log.warning(
                "tracking: not all was sent (%s); it lies in %s, and `opensora track replay --workdir %s` sends it",
                *(reason, self.place, self.root),
            )

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
        self._spool.append(record | {"time": _now()})

    def _start_sender(self) -> None:
        command = [sys.executable, "-m", "opensora.tracking.drain", str(self.root), str(self.place)]
        try:  # in a session of its own: Ctrl-C is for the training, which ends it
            self._sender = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True
            )
        except OSError as error:
            log.warning("tracking: nothing is sent before the end of a later run: %s", error)

    def _end_sender(self, timeout_s: float) -> str:
        """Have the process send the rest, and wait for it; returns why something is left."""
        if self._sender is None:
            return "no process could be started"
        try:
            return self._sender.communicate("end\n", timeout_s)[0].strip() or (
                f"the process that sends ended with {self._sender.returncode}" if self._sender.returncode else ""
            )
        except subprocess.TimeoutExpired:
            self._sender.kill()
            self._sender.communicate()
            if not look(self.root, self.place).unsent:  # it was at what earlier runs left
                return ""
            return f"the store did not take it within {timeout_s:g} s"


def _now() -> int:
    """Milliseconds."""
    return time.time_ns() // 1_000_000
