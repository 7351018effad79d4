"""The MLflow server, or file, that everything is recorded in."""

import logging
import os
import threading
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mlflow import MlflowClient

SETTINGS = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_MODEL_CATALOG_URI": "",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "5",
}
_CONNECTING = threading.Lock()  # of two threads that import MLflow at once, one sees half of it


def tracking_uri(root: Path) -> str:
    """MLFLOW_TRACKING_URI, or a SQLite file below the results' root."""
    return os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{(root / 'mlflow.db').resolve()}"


def connect(root: Path) -> "MlflowClient":
    """A client of the store; the first use of a new SQLite file takes some seconds."""
    for name, value in SETTINGS.items():
        os.environ.setdefault(name, value)
    for name in ("alembic", "mlflow.store.db.utils"):
        logging.getLogger(name).setLevel(logging.WARNING)
    uri = tracking_uri(root)  # not set globally: MLflow would write it into the environment
    with _CONNECTING:
        import mlflow

        return mlflow.MlflowClient(tracking_uri=uri, registry_uri=uri)


def experiment_id(client: "MlflowClient", root: Path, profile: str) -> str:
    """Of the profile's experiment, which is made at its first use."""
    name = f"opensora-{profile}"
    found = client.get_experiment_by_name(name)
    if found:
        return found.experiment_id
    local = tracking_uri(root).startswith("sqlite:")
    place = (root / "mlartifacts" / name).resolve().as_uri() if local else None
    return client.create_experiment(name, artifact_location=place)
