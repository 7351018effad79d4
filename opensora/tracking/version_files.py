"""Where the files of a version are: uploaded once to a registry that is a server, found here, or fetched from there.

A database is told the path of the folder. A server does not take a path of another machine's, and could not give it to
anybody: the folder is uploaded to its store, as a logged model of the profile's experiment.
"""

import json
import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from opensora.config import UserError
from opensora.step import UNWRITABLE, fingerprint, sync
from opensora.tracking.redact import redact
from opensora.tracking.registry import (
    CHECKPOINT_SHA256,
    CHECKPOINT_URI,
    RegistryError,
    Version,
    asking,
    ensure_model,
    read_version,
    register,
)
from opensora.tracking.spool import alone
from opensora.tracking.store import experiment_id, store_name, tracking_uri
from opensora.weights import hash_file

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import LoggedModel

FILES = "files.sha256"  # tag of what was uploaded: hash of all that lies below ARTIFACTS
MODEL, ARTIFACTS = "model", "artifacts"  # folder of a version that MLflow loads, and of the weights in it
FETCH_LOCK = ".fetch.lock"  # in the folder of a version
TIMEOUT, BAR = "MLFLOW_HTTP_REQUEST_TIMEOUT", "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR"
PATIENCE_S = 3600


class FilesGone(RegistryError):
    """The server's store no longer has the files of a version, or has others."""


def version_place(root: Path, model: str, sha256: str) -> Path:
    """Folder of all that this folder of results keeps of the version of a checkpoint."""
    return root / "registry" / model / sha256[:12]


def register_folder(root: Path, profile: str, model: str, folder: Path, tags: dict[str, str]) -> str:
    """Register a served model as the next version of `model`; returns its number.

    An upload that was cut off is gone on with, and one that no version came of is not made again.

    Raises:
        RegistryError: the registry does not answer, or refuses.
    """
    if not _is_server(root):
        return register(root, model, folder, tags)
    ensure_model(root, model)
    tags = tags | {FILES: _hash_files(folder / ARTIFACTS)}
    with asking(root) as client:
        logged = _find_or_make_logged_model(client, experiment_id(client, root, profile), model, tags)
        if str(logged.status) != "READY":
            with _patience():
                client.log_model_artifacts(logged.model_id, str(folder))
            client.finalize_logged_model(logged.model_id, "READY")
        source = f"models:/{logged.model_id}"
        return str(client.create_model_version(model, source, tags=tags, model_id=logged.model_id).version)


def _find_or_make_logged_model(
    client: "MlflowClient", experiment: str, model: str, tags: dict[str, str]
) -> "LoggedModel":
    """The first one with these files, whole if there is one."""
    same = client.search_logged_models([experiment], f"name = '{model}' AND tags.`{FILES}` = '{tags[FILES]}'")
    first = min(same, key=lambda found: (str(found.status) != "READY", found.creation_timestamp), default=None)
    return first or client.create_logged_model(experiment, name=model, tags=tags)


def find_here(root: Path, model: str, version: Version) -> Path | None:
    """The checkpoint folder of a version on this machine: where it was registered, or fetched to; else None."""
    recorded = Path(version.tags.get(CHECKPOINT_URI, ""))
    fetched = version_place(root, model, version.tags.get(CHECKPOINT_SHA256, "")) / MODEL / ARTIFACTS / recorded.name
    return next((folder for folder in (recorded, fetched) if recorded.name and folder.is_dir()), None)


def is_uploaded(root: Path, version: Version) -> bool:
    """Whether the files of a version can be fetched from the registry's store."""
    return FILES in version.tags and _is_server(root)


def checkpoint_folder(root: Path, model: str, version: Version) -> Path:
    """The checkpoint folder of a version, fetched from the server's store if it is not on this machine.

    What was fetched has the hash that was recorded at the upload, appears whole, and is found again.

    Returns:
        Where it should be, if it is nowhere and was not uploaded.

    Raises:
        FilesGone: the store does not have the files any more.
        RegistryError: the server does not answer, or the disk is full.
    """
    here, recorded = find_here(root, model, version), Path(version.tags.get(CHECKPOINT_URI, ""))
    if here or not is_uploaded(root, version):
        return here or recorded
    place = version_place(root, model, version.tags[CHECKPOINT_SHA256])
    place.mkdir(parents=True, exist_ok=True)
    with alone(place / FETCH_LOCK):
        if find_here(root, model, version) is None:  # else another process fetched it meanwhile
            _fetch(root, model, version, place)
    return place / MODEL / ARTIFACTS / recorded.name


def make_whole(root: Path, model: str, version: Version) -> bool:
    """Fetch a version's files again where those in this folder of results are no longer what was uploaded.

    Returns:
        Whether they are what was uploaded now; False where nothing was, or they lie in another folder.

    Raises:
        FilesGone: the store does not have them any more; what is here stays.
        RegistryError: they do not arrive; what is here stays.
    """
    place = version_place(root, model, version.tags.get(CHECKPOINT_SHA256, ""))
    here = find_here(root, model, version)
    if here is None or not is_uploaded(root, version) or here.parents[1].resolve() != (place / MODEL).resolve():
        return False
    with alone(place / FETCH_LOCK):
        if _hash_files(place / MODEL / ARTIFACTS) != version.tags[FILES]:  # else another process fetched it meanwhile
            _fetch(root, model, version, place)
    return True


def _fetch(root: Path, model: str, version: Version, place: Path) -> None:
    """Download the version's folder to `place`, verify it, and put it under its final name."""
    part, final = place / f".{MODEL}.fetch.part", place / MODEL
    shutil.rmtree(part, ignore_errors=True)
    what = f"version {version.version} of {model}"
    with asking(root) as client:
        uri = client.get_model_version_download_uri(model, version.version)
    try:
        folder = _download(uri, part, tracking_uri(root))
        if folder is None or _hash_files(folder / ARTIFACTS) != version.tags[FILES]:
            raise FilesGone(f"{store_name(root)} no longer has the files that {what} was registered with")
        for path in [*folder.rglob("*"), folder]:
            sync(path)
        shutil.rmtree(final, ignore_errors=True)  # of a checkpoint that is not whole any more
        folder.rename(final)
    except UserError:
        raise
    except Exception as error:  # every kind of store has its own
        text = redact(" ".join(str(error).split()))
        why = next((advice for number, advice in UNWRITABLE.items() if os.strerror(number) in text), text[-200:])
        raise RegistryError(f"{what} cannot be fetched to {place}: {why}") from error
    finally:
        shutil.rmtree(part, ignore_errors=True)


def _download(uri: str, folder: Path, server: str) -> Path | None:
    """Where in `folder` it lies then; None if there is nothing to download."""
    from mlflow.artifacts import download_artifacts, list_artifacts

    with _patience():
        if not list_artifacts(artifact_uri=uri, tracking_uri=server):
            return None
        return Path(download_artifacts(artifact_uri=uri, dst_path=str(folder), tracking_uri=server))


def _hash_files(folder: Path) -> str:
    files = {str(path.relative_to(folder)): hash_file(path) for path in folder.rglob("*") if path.is_file()}
    return fingerprint(files)


def _is_server(root: Path) -> bool:
    return tracking_uri(root).startswith(("http://", "https://"))


@contextmanager
def _patience() -> Iterator[None]:
    """Requests may take the time of gigabytes, our usual seconds are for metrics; bars are for those who watch."""
    usual = {name: os.environ.get(name) for name in (TIMEOUT, BAR)}
    os.environ |= {TIMEOUT: str(max(PATIENCE_S, int(usual[TIMEOUT] or 0))), BAR: str(sys.stderr.isatty())}
    try:
        yield
    finally:
        for name, value in usual.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})


def model_version_path(uri: str, root: Path) -> Path:
    """The checkpoint folder behind `models:/NAME@ALIAS` or `models:/NAME/VERSION`, fetched if it is not here.

    Raises:
        RegistryError: no such version, or its files are gone or not those that were registered.
    """
    model, version = read_version(uri, root)
    folder = checkpoint_folder(root, model, version)
    try:
        found = json.loads((folder / "checkpoint.json").read_text())["sha256"]
    except (OSError, ValueError, KeyError):
        raise RegistryError(f"{uri} points to {folder}, which holds no checkpoint any more") from None
    if found != version.tags.get(CHECKPOINT_SHA256):
        raise RegistryError(f"{uri}: the checkpoint at {folder} is not the one that was registered (another sha256)")
    return folder
