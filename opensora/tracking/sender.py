"""Sends the records of a run to the store. Each may be sent again: what the store has is not made twice.

An answer can be lost after the store did what it was asked. Metrics, parameters, tags, data sets and files are the same
when they come twice; runs, checkpoints and their links are looked up by what we wrote on them before they are made.
"""

import json
import tempfile
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from opensora.step import final_place
from opensora.tracking.spool import LOCK, alone
from opensora.tracking.store import StoreAway, StoreRefused, connect, experiment_id, probe, store_name, understood

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import LoggedModel, Metric

BATCH, SMALLEST_BATCH = 900, 50  # metrics a request; the store accepts 1000
PARAMS_BATCH = 100
VALUE_LENGTH = {"params": 6000, "tags": 5000}
RUN = "opensora.run"  # tag: CHAIN of a parent, CHAIN/STEP of a child
PREVIEW = 256  # pixels of the larger side
Record = dict[str, Any]
T = TypeVar("T")


class Sender:
    """Sends to the run of one spool's folder, WORKDIR/<profile>/.mlflow/<chain>/<step>."""

    def __init__(self, root: Path, place: Path) -> None:
        self.root, self.place = root, place
        self.profile, self.chain, self.step = place.parts[-4], place.parent.name, place.name
        self.batch = BATCH
        self._client: MlflowClient | None = None
        self._run = self._parent = self._experiment = ""

    @property
    def client(self) -> "MlflowClient":
        """Of the store, once it is open."""
        assert self._client is not None
        return self._client

    def open(self, time: int, begin: Callable[[], None]) -> None:
        """Find or make the run and its parent.

        Args:
            time: of its first record, in milliseconds.
            begin: called before the run is made, as the store has nothing of it.

        Raises:
            StoreAway: the store does not take it now.
        """
        if self._run:
            return
        probe(self.root)
        self._client = self._client or connect(self.root)
        try:
            with understood(self.root), alone(self.place.parent / LOCK):  # other steps look for the parent, too
                self._experiment = experiment_id(self.client, self.root, self.profile)
                parent = f"chain {self.chain}"
                self._parent = self._find_or_make_run(self.chain, parent, {}, time, lambda: None)
                tags = {"mlflow.parentRunId": self._parent}
                self._run = self._find_or_make_run(f"{self.chain}/{self.step}", self.step, tags, time, begin)
        except StoreRefused as error:
            raise StoreAway(f"{store_name(self.root)} makes no run: {error}") from None

    def send_metrics(self, records: Sequence[Record], refuse: Callable[[Record, str], None]) -> None:
        """Metrics in one request; those that the store refuses are found and given to `refuse`."""
        points = [point for record in records for point in _points(record)]
        try:
            refused = self._send_all(
                points, lambda some: self.client.log_batch(self._run, [_metric(point) for point in some])
            )
        except StoreAway:
            self.batch = max(SMALLEST_BATCH, self.batch // 2)  # a slow server may answer in time for fewer
            raise
        for point, reason in refused:
            refuse(point, reason)
        self.batch = min(BATCH, self.batch * 2)

    def send(self, record: Record) -> None:
        """Any other record.

        Raises:
            StoreAway: try again later.
            StoreRefused: never; the reason.
        """
        try:
            with understood(self.root):
                self._send(record)
        except StoreRefused:
            self._check_run()
            raise

    def _send_all(self, items: Sequence[T], send: Callable[[Sequence[T]], None]) -> list[tuple[T, str]]:
        """Send items in one request; of a request that is refused those that are, and why, by halves."""
        try:
            with understood(self.root):
                send(items)
        except StoreRefused as error:
            self._check_run()
            if len(items) == 1:
                return [(items[0], str(error))]
            half = len(items) // 2
            return self._send_all(items[:half], send) + self._send_all(items[half:], send)
        return []

    def _check_run(self) -> None:
        """Raise StoreAway if the run is gone: deleted, or of a store that was made anew. The next `open` makes it."""
        try:
            with understood(self.root):
                gone = self.client.get_run(self._run).info.lifecycle_stage != "active"
        except StoreRefused:
            gone = True
        if gone:
            self._run = ""
            raise StoreAway(f"{store_name(self.root)} has lost the run of {self.step}; it is made anew")

    def _send(self, record: Record) -> None:
        match record["kind"]:
            case "start":
                self._send_start(record)
            case "dataset":
                self._send_dataset(record)
            case "image":
                self._send_image(record)
            case "artifact":
                self.client.log_artifact(self._run, str(_find(record["path"])), record["artifact_path"] or None)
            case "checkpoint":
                self._send_checkpoint(record)
            case "status":
                self.client.set_terminated(self._run, record["status"], record["time"])
                self._end_parent(record["time"])
            case other:
                raise ValueError(f"no such kind of record: {other}")

    def _send_start(self, record: Record) -> None:
        """Parameters and tags of a start. MLflow changes no parameter: what another start brought stands beside it."""
        from mlflow.entities import Param, RunTag

        data = self.client.get_run(self._run).data
        params, tags = (
            {name: str(value)[: VALUE_LENGTH[part]] for name, value in record[part].items()}
            for part in ("params", "tags")
        )
        for name, value in params.items():
            if data.params.get(name, value) != value:
                tags[f"resumed.{name}"] = value
        for name, value in list(tags.items()):
            if data.tags.get(name, value) != value and not name.startswith("resumed."):
                tags[f"resumed.{name}"] = tags.pop(name)
        new = [Param(name, value) for name, value in params.items() if name not in data.params]
        pairs = [RunTag(name, value) for name, value in tags.items()]
        refused = []
        for start in range(0, len(new), PARAMS_BATCH):
            part = new[start : start + PARAMS_BATCH]
            refused += self._send_all(part, lambda some: self.client.log_batch(self._run, params=some))
        for start in range(0, len(pairs), PARAMS_BATCH):
            part = pairs[start : start + PARAMS_BATCH]
            refused += self._send_all(part, lambda some: self.client.log_batch(self._run, tags=some))
        for run in (self._run, self._parent):
            self.client.update_run(run, status="RUNNING")
        if refused:
            raise StoreRefused("; ".join(f"{item.key}: {reason}" for item, reason in refused))

    def _send_dataset(self, record: Record) -> None:
        from mlflow.entities import Dataset, DatasetInput, InputTag

        source = json.dumps({"uri": record["source"]})
        dataset = Dataset(record["name"], record["digest"], source_type="local", source=source)
        context = InputTag("mlflow.data.context", record["context"])
        self.client.log_inputs(self._run, datasets=[DatasetInput(dataset, [context])])

    def _send_image(self, record: Record) -> None:
        """As MlflowClient.log_image, whose names hold something random; here the same record gives the same names."""
        from PIL import Image

        path = _find(record["path"])
        key, step, time = record["key"].replace("/", "~"), record["step"], record["time"]
        mark = uuid.uuid5(uuid.NAMESPACE_OID, f"{self.chain}/{self.step}/{key}/{step}/{time}")
        name = f"{key}+step+{step}+timestamp+{time}+{mark}"
        with tempfile.TemporaryDirectory() as folder, Image.open(path) as picture:
            whole, preview = Path(folder, f"{name}.png"), Path(folder, f"{name}+compressed.webp")
            picture.save(whole)
            picture.thumbnail((PREVIEW, PREVIEW))
            picture.save(preview)
            for file in (whole, preview):
                self.client.log_artifact(self._run, str(file), "images")
        self.client.set_tag(self._run, "mlflow.loggedImages", True)

    def _send_checkpoint(self, record: Record) -> None:
        """The checkpoint as a logged model that lies elsewhere, an output of the run, with its metrics and data."""
        from mlflow.entities import LoggedModelOutput

        model = self._find_or_make_model(record)
        if str(model.status) != "READY":
            self.client.finalize_logged_model(model.model_id, "READY")  # the files stay where they are
        outputs = self.client.get_run(self._run).outputs
        if model.model_id not in {output.model_id for output in (outputs.model_outputs if outputs else [])}:
            self.client.log_outputs(self._run, [LoggedModelOutput(model.model_id, record["step"])])
        if record.get("metrics"):
            data = record.get("dataset") or {}
            links = {"dataset_name": data.get("name"), "dataset_digest": data.get("digest"), "run_id": self._run}
            points = _points(record["metrics"])
            self.client.log_batch(self._run, [_metric(point, model_id=model.model_id, **links) for point in points])

    def _find_or_make_model(self, record: Record) -> "LoggedModel":
        name, step = f"{self.step}-{record['step']}", str(record["step"])
        found = self.client.search_logged_models(
            [self._experiment], filter_string=f"name = '{name}' AND source_run_id = '{self._run}'"
        )
        same = [model for model in found if model.tags.get("checkpoint.sha256") == record["sha256"]]
        same.sort(key=lambda model: (model.creation_timestamp, model.model_id))
        for model in same[1:]:
            self.client.delete_logged_model(model.model_id)
        if same:
            return same[0]
        tags = {
            "checkpoint.uri": record["path"],
            "checkpoint.sha256": record["sha256"],
            "mlflow.model.isExternal": "true",
        }
        return self.client.create_logged_model(
            self._experiment, name=name, source_run_id=self._run, params={"step": step}, tags=tags
        )

    def _end_parent(self, time: int) -> None:
        """The parent runs while a step does, and ends as its steps did."""
        with alone(self.place.parent / LOCK):
            children = self.client.search_runs(
                [self._experiment], f"tags.`mlflow.parentRunId` = '{self._parent}'", max_results=100
            )
            states = {child.info.status for child in children}
            if "RUNNING" in states:
                return
            status = next((state for state in ("FAILED", "KILLED") if state in states), "FINISHED")
            self.client.set_terminated(self._parent, status, time)

    def _find_or_make_run(
        self, mark: str, name: str, tags: dict[str, str], time: int, begin: Callable[[], None]
    ) -> str:
        """The run with that mark. Of several, made by a request that was thought lost, the empty ones are deleted."""
        found = self.client.search_runs([self._experiment], f"tags.`{RUN}` = '{mark}'")
        runs = sorted(found, key=lambda run: (not run.data.params, not run.data.metrics, run.info.run_id))
        for run in runs[1:]:
            if not run.data.metrics and not run.data.params:
                self.client.delete_run(run.info.run_id)
        if runs:
            return runs[0].info.run_id
        begin()
        tags = tags | {RUN: mark, "profile": self.profile, "mlflow.source.name": f"opensora {name}"}
        return self.client.create_run(self._experiment, time, tags, name).info.run_id


def _points(record: Record) -> list[Record]:
    """A record of several metrics as one of each."""
    return [record | {"values": {name: value}} for name, value in record["values"].items()]


def _metric(point: Record, **links: str | None) -> "Metric":
    from mlflow.entities import Metric

    ((name, value),) = point["values"].items()
    return Metric(name, float(value), point["time"], point["step"], **links)


def _find(name: str) -> Path:
    """A file where it was, or where it lies when its step is done; raises FileNotFoundError."""
    path = Path(name)
    for place in (path, final_place(path)):
        if place.is_file():
            return place
    raise FileNotFoundError(f"{path} is gone")
