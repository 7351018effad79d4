"""Files of versions through a real server: uploaded once, fetched whole or not at all."""

import shutil
import threading
from pathlib import Path

import pytest
from mlflow import MlflowClient

from opensora.step import fingerprint, write_json
from opensora.tracking.registry import RegistryError, find_version
from opensora.tracking.store import connect
from opensora.tracking.version_files import (
    FilesGone,
    checkpoint_folder,
    find_here,
    model_version_path,
    register_folder,
    version_place,
)
from tests.small_disk import small_disk
from tests.tracking.mlflow_server import MlflowServer

SIZE = 300_000


@pytest.fixture(autouse=True)
def server(mlflow_server: MlflowServer, monkeypatch: pytest.MonkeyPatch) -> MlflowServer:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", mlflow_server.uri)
    return mlflow_server


def make_folder(folder: Path, sha256: str) -> dict[str, str]:
    """A folder of the form of a served model; returns the tags of its version."""
    checkpoint = folder / "artifacts" / "step-1"
    checkpoint.mkdir(parents=True)
    write_json(checkpoint / "checkpoint.json", {"sha256": sha256})
    (checkpoint / "model.safetensors").write_bytes(sha256.encode() * (SIZE // len(sha256)))
    (folder / "MLmodel").write_text("{}")
    return {"checkpoint.uri": str(checkpoint), "checkpoint.sha256": sha256}


def register_elsewhere(root: Path, model: str) -> str:
    """Register a version whose folder is gone, as on another machine; returns its URI."""
    elsewhere = root.parent / f"elsewhere-{model}"
    number = register_folder(root, model, model, elsewhere, make_folder(elsewhere, fingerprint(model)))
    shutil.rmtree(elsewhere)
    return f"models:/{model}/{number}"


def names(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def test_processes_that_need_the_same_version_fetch_it_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = tmp_path / "runs"
    uri = register_elsewhere(root, "fetched")
    place = version_place(root, "fetched", fingerprint("fetched"))
    cut_off = place / ".model.fetch.part" / "artifacts"
    cut_off.mkdir(parents=True)
    (cut_off / "half of a file").touch()
    asked, ask = [], MlflowClient.get_model_version_download_uri

    def count(*arguments: object) -> object:
        asked.append(arguments)
        return ask(*arguments)

    monkeypatch.setattr(MlflowClient, "get_model_version_download_uri", count)
    found: list[Path] = []
    threads = [threading.Thread(target=lambda: found.append(model_version_path(uri, root))) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert found == [place / "model" / "artifacts" / "step-1"] * 3
    assert len(asked) == 1
    inside = {"MLmodel", "artifacts/step-1/checkpoint.json", "artifacts/step-1/model.safetensors"}
    assert names(place) == {".fetch.lock"} | {f"model/{name}" for name in inside}
    shutil.rmtree(found[0])  # what is left of the folder is no reason not to fetch it again
    assert model_version_path(uri, root) == found[0]


def test_files_that_are_not_those_that_were_uploaded_do_not_appear(tmp_path: Path, server: MlflowServer) -> None:
    root = tmp_path / "runs"
    uri = register_elsewhere(root, "changed")
    (uploaded,) = (
        path
        for path in server.artifacts.rglob("model.safetensors")
        if path.read_bytes().startswith(fingerprint("changed").encode())
    )
    uploaded.write_bytes(uploaded.read_bytes()[:-1] + b"?")
    with pytest.raises(FilesGone, match="no longer has the files that version 1 of changed was registered with"):
        model_version_path(uri, root)
    shutil.rmtree(uploaded.parents[2])
    with pytest.raises(FilesGone, match="no longer has the files"):
        model_version_path(uri, root)
    assert names(root) == {"registry/changed/" + fingerprint("changed")[:12] + "/.fetch.lock"}


def test_a_full_disk_is_said_and_leaves_nothing(tmp_path: Path) -> None:
    with small_disk(tmp_path / "runs", "200k") as root:
        uri = register_elsewhere(root, "large")
        with pytest.raises(
            RegistryError, match=r"version 1 of large cannot be fetched to .*: the disk is full"
        ) as error:
            model_version_path(uri, root)
        assert not isinstance(error.value, FilesGone)  # nothing is lost
        assert len(names(root)) == 1


def test_a_version_of_a_database_is_where_it_was_registered(tmp_path: Path, mlflow_store: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("MLFLOW_TRACKING_URI")
        shutil.copy(mlflow_store, tmp_path)
        tags = make_folder(tmp_path / "served", "abc")
        version = find_version(tmp_path, "m", register_folder(tmp_path, "smoke", "m", tmp_path / "served", tags))
        assert version
        folder = tmp_path / "served" / "artifacts" / "step-1"
        assert checkpoint_folder(tmp_path, "m", version) == folder
        shutil.rmtree(folder)
        assert find_here(tmp_path, "m", version) is None
        assert checkpoint_folder(tmp_path, "m", version) == folder  # for whoever says what is missing
        assert connect(tmp_path).search_logged_models(["0"]) == []
