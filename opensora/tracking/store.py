"""The MLflow server, or file, that everything is recorded in: where it is, and what its errors mean."""

import logging
import os
import re
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

from opensora.config import UserError
from opensora.tracking.redact import redact

if TYPE_CHECKING:
    from mlflow import MlflowClient

SETTINGS = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_MODEL_CATALOG_URI": "",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
}
PROBE_S = 3.0
REFUSED = {"INVALID_PARAMETER_VALUE", "RESOURCE_DOES_NOT_EXIST", "RESOURCE_ALREADY_EXISTS", "BAD_REQUEST"}
TRY_AGAIN = {401, 403, 404, 408, 425, 429}  # of the answers 4xx; 404 comes from what is no MLflow server
FOREIGN = ("botocore", "boto3", "urllib3", "google", "azure")  # whose errors say that files cannot be stored now
_CONNECTING = threading.Lock()  # of two threads that import MLflow at once, one sees half of it


class StoreAway(UserError):
    """The store takes nothing now; the message says why, and what to do."""


class StoreRefused(UserError):
    """The store will never take this record."""


def tracking_uri(root: Path) -> str:
    """MLFLOW_TRACKING_URI, or a SQLite file below the results' root."""
    return os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{(root / 'mlflow.db').resolve()}"


def store_name(root: Path) -> str:
    """The store's address without credentials, to show and to write down."""
    return redact(tracking_uri(root))


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


def probe(root: Path) -> None:
    """Raise StoreAway if nobody listens at the store's address: known in moments, without importing MLflow."""
    address = urlsplit(tracking_uri(root))
    host = address.hostname
    if not address.scheme.startswith("http") or not host:
        return
    if address.scheme in getproxies() and not proxy_bypass(host):
        return
    try:
        port = address.port or (443 if address.scheme == "https" else 80)
        socket.create_connection((host, port), PROBE_S).close()
    except (OSError, ValueError) as error:
        raise StoreAway(f"{store_name(root)} cannot be reached: {error}; start the server, or wait for it") from None


def experiment_id(client: "MlflowClient", root: Path, profile: str) -> str:
    """Of the profile's experiment, which is made at its first use."""
    from mlflow.exceptions import MlflowException

    name = f"opensora-{profile}"
    found = client.get_experiment_by_name(name)
    if not found:
        local = tracking_uri(root).startswith("sqlite:")
        place = (root / "mlartifacts" / name).resolve().as_uri() if local else None
        try:
            return client.create_experiment(name, artifact_location=place)
        except MlflowException as error:
            found = client.get_experiment_by_name(name) if error.error_code == "RESOURCE_ALREADY_EXISTS" else None
            if not found:  # else another process made it in between
                raise
    return found.experiment_id


@contextmanager
def understood(root: Path) -> Iterator[None]:
    """Errors of the store become StoreAway or StoreRefused; what is unforeseen passes."""
    from mlflow.exceptions import MlflowException
    from requests import RequestException

    try:
        yield
    except (MlflowException, RequestException) as error:
        text = " ".join(redact(str(error)).split())
        status = _status(error, text)
        if getattr(error, "error_code", "") in REFUSED and not status:
            raise StoreRefused(text) from error
        if 400 <= status < 500 and status not in TRY_AGAIN:
            raise StoreRefused(text) from error
        raise StoreAway(_explain(root, error, status, text)) from error
    except (FileNotFoundError, IsADirectoryError, ValueError, TypeError) as error:
        raise StoreRefused(redact(str(error))) from error
    except Exception as error:
        if type(error).__module__.startswith(FOREIGN):
            raise StoreAway(f"{store_name(root)} cannot write files: {redact(str(error))}") from error
        raise


def _status(error: Exception, text: str) -> int:
    """Of an HTTP answer that MLflow did not write or that was for a file; 0 for its own errors."""
    response = getattr(error, "response", None)
    if response is not None:
        return response.status_code
    found = re.search(r"failed with error code (\d{3})|too many (\d{3}) error", text)
    return int(found[1] or found[2]) if found else 0


def _explain(root: Path, error: Exception, status: int, text: str) -> str:
    """One line: what is wrong with the store, and what to do."""
    from requests import ConnectionError as Unreachable
    from requests import Timeout

    store, cause = store_name(root), error.__cause__ or error.__context__ or error
    if isinstance(cause, Timeout) or "timed out" in text:
        wait = os.environ.get("MLFLOW_HTTP_REQUEST_TIMEOUT")
        return f"{store} does not answer within {wait} s (MLFLOW_HTTP_REQUEST_TIMEOUT); look at the server's load"
    if isinstance(cause, Unreachable):
        return f"{store} cannot be reached; start the server, or wait for it"
    if not status and hasattr(error, "get_http_status_code"):
        status = error.get_http_status_code()
    match status:
        case 401:
            return f"{store} wants a login: set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD"
        case 403:
            host = urlsplit(tracking_uri(root)).netloc.rpartition("@")[2]
            return (
                f"{store} refuses this client (403): start the server with --allowed-hosts that hold {host}, or give "
                "the user of MLFLOW_TRACKING_USERNAME permission"
            )
        case 404:
            return f"{store} is no MLflow server (404); set MLFLOW_TRACKING_URI to one"
    said = "" if "API request to" in text else f": {text[:200]}"  # else it is the address again
    return f"{store} fails (HTTP {status}); look at its log{said}"
