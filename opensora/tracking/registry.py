"""The model registry: versions, and the alias `champion` that says which one users get."""

import json
from pathlib import Path
from typing import Any

from opensora.config import UserError
from opensora.tracking.store import connect, tracking_uri

CHAMPION = "champion"


class RegistryError(UserError):
    """The registry has no such model, or what it points to is gone or changed."""


def champion(root: Path, model: str) -> Any | None:
    """The registered version that carries the alias `champion`, or None."""
    client = connect(root)
    from mlflow.exceptions import MlflowException

    try:
        return client.get_model_version_by_alias(model, CHAMPION)
    except MlflowException as error:
        if error.error_code in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
            return None
        raise


def register(root: Path, model: str, source: Path, tags: dict[str, str]) -> str:
    """Register a version whose files lie in `source`; returns its number."""
    client = connect(root)
    from mlflow.exceptions import MlflowException

    try:
        client.create_registered_model(model)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
    return str(client.create_model_version(model, str(source.resolve()), tags=tags).version)


def set_champion(root: Path, model: str, version: str) -> None:
    """Move the alias."""
    connect(root).set_registered_model_alias(model, CHAMPION, version)


def model_version_path(uri: str, root: Path) -> Path:
    """The checkpoint folder behind `models:/NAME@ALIAS` or `models:/NAME/VERSION`.

    Raises:
        RegistryError: no such version, or its files are gone or not those that were registered.
    """
    client = connect(root)
    from mlflow.exceptions import MlflowException

    name, at, alias = uri.removeprefix("models:/").partition("@")
    try:
        if at:
            version = client.get_model_version_by_alias(name, alias)
        else:
            name, _, number = name.partition("/")
            version = client.get_model_version(name, number)
    except MlflowException as error:
        raise RegistryError(f"{uri} is not in the registry at {tracking_uri(root)}: {error.message}") from None
    folder = Path(version.tags.get("checkpoint.uri", ""))
    try:
        found = json.loads((folder / "checkpoint.json").read_text())["sha256"]
    except (OSError, ValueError, KeyError):
        raise RegistryError(f"{uri} points to {folder}, which holds no checkpoint any more") from None
    if found != version.tags.get("checkpoint.sha256"):
        raise RegistryError(f"{uri}: the checkpoint at {folder} is not the one that was registered (another sha256)")
    return folder
