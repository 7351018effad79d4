"""The registry: what it says of things that are missing or changed, and the lock among all who use it."""

import json
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from opensora.tracking.promotion_lock import LOCK_TAG, folder_lock, registry_lock
from opensora.tracking.registry import (
    ChampionMoved,
    RegistryError,
    adopt,
    champion,
    check_champion,
    ensure_model,
    find_version,
    lost_champion,
    move_champion,
    register,
    versions,
)
from opensora.tracking.store import connect
from opensora.tracking.version_files import model_version_path
from tests.conftest import ROOT


@pytest.fixture(autouse=True)
def default_store(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("runs")


def test_a_password_in_the_address_is_not_repeated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://eva:hunter2@127.0.0.1:9")
    for ask in (champion, versions, lost_champion):
        with pytest.raises(RegistryError, match=r"at http://\*\*\*@127\.0\.0\.1:9 does not answer") as error:
            ask(tmp_path, "m")
        assert "hunter2" not in str(error.value)


def test_asking_a_store_that_is_not_there_does_not_make_it(tmp_path: Path) -> None:
    assert champion(tmp_path, "m") is None
    assert versions(tmp_path, "m") == []
    assert find_version(tmp_path, "m", "1") is None
    assert lost_champion(tmp_path, "m") == ""
    with pytest.raises(RegistryError, match="not in the registry"):
        model_version_path("models:/m@champion", tmp_path)
    assert not list(tmp_path.iterdir())


def test_registry_names_what_is_missing_or_changed(root: Path, tmp_path: Path) -> None:
    ensure_model(root, "m")
    for uri in ("models:/nothing@champion", "models:/m@champion", "models:/m/7", "models:/m/seven"):
        with pytest.raises(RegistryError, match="not in the registry"):
            model_version_path(uri, root)
    (tmp_path / "checkpoint.json").write_text(json.dumps({"sha256": "new"}))
    tags = {"checkpoint.uri": str(tmp_path), "checkpoint.sha256": "old"}
    version = register(root, "m", tmp_path, tags)
    move_champion(root, "m", version, None)
    with pytest.raises(RegistryError, match="another sha256"):
        model_version_path("models:/m@champion", root)
    (tmp_path / "checkpoint.json").unlink()
    with pytest.raises(RegistryError, match="no checkpoint any more"):
        model_version_path(f"models:/m/{version}", root)


def test_a_version_is_found_again_by_its_checkpoint(root: Path, tmp_path: Path) -> None:
    tags = {"checkpoint.sha256": "a", "score": "1"}
    assert adopt(root, "again", tags) is None
    version = register(root, "again", tmp_path, tags)
    assert adopt(root, "again", tags | {"score": "2"}) == version
    (found,) = versions(root, "again")
    assert found.tags["score"] == "2"
    assert adopt(root, "again", {"checkpoint.sha256": "b"}) is None
    twice = register(root, "again", tmp_path, tags)  # as two machines do that promote it at the same moment
    assert adopt(root, "again", tags | {"previous_champion": "none"}) == version
    assert adopt(root, "again", tags | {"previous_champion": version}) == version
    (_, first) = versions(root, "again")
    assert (twice, first.tags["previous_champion"]) == ("2", "none")  # nothing comes after itself


def test_the_alias_moves_only_from_where_it_was(root: Path, tmp_path: Path) -> None:
    one, two = (register(root, "alias", tmp_path, {"checkpoint.sha256": name}) for name in "ab")
    move_champion(root, "alias", one, None)
    with pytest.raises(ChampionMoved, match=r"was on no version, and meanwhile somebody put it on version 1"):
        move_champion(root, "alias", two, None)
    check_champion(root, "alias", one)
    assert [version.aliases for version in versions(root, "alias")] == [(), ("champion",)]
    connect(root).delete_model_version("alias", one)
    assert champion(root, "alias") is None
    assert lost_champion(root, "alias") == one  # the alias went with it, and is remembered
    with pytest.raises(RegistryError, match="refuses"):
        move_champion(root, "alias", "9", None)


def test_the_lock_of_a_folder_has_a_name_of_its_own(tmp_path: Path) -> None:
    for name in "ab":
        (tmp_path / name).mkdir()
    with folder_lock(tmp_path / "a") as first, folder_lock(tmp_path / "b") as other:
        assert first != other
    with folder_lock(tmp_path / "a") as again:
        assert again == first


def test_one_at_a_time_holds_the_lock_of_a_registry(root: Path) -> None:
    """Three folders of results that share a registry, each in its thread."""
    inside, most, done = [], [], []

    def work(name: str) -> None:
        with registry_lock(root, "busy", name, settle_s=3.0, stale_s=60) as check:
            inside.append(name)
            most.append(len(inside))
            check()
            inside.remove(name)
        done.append(name)

    ensure_model(root, "busy")
    threads = [threading.Thread(target=work, args=[name]) for name in "abc"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert sorted(done) == list("abc")
    assert max(most) == 1
    assert LOCK_TAG not in connect(root).get_registered_model("busy").tags


def test_a_lock_that_nobody_gave_back(root: Path) -> None:
    ensure_model(root, "left")
    client = connect(root)
    client.set_registered_model_tag("left", LOCK_TAG, json.dumps({"folder": "gone", "by": "eva@there"}))
    with pytest.raises(RegistryError, match="eva@there"), registry_lock(root, "left", "b", stale_s=60, patience_s=0):
        pass
    with registry_lock(root, "left", "gone", settle_s=0, stale_s=60):  # its own, of a process that was killed
        pass
    client.set_registered_model_tag("left", LOCK_TAG, "what somebody wrote there by hand")
    with registry_lock(root, "left", "b", settle_s=0, stale_s=0.1) as check:
        client.set_registered_model_tag("left", LOCK_TAG, "somebody who took it over")
        with pytest.raises(RegistryError, match="nothing was moved"):
            check()
    assert client.get_registered_model("left").tags[LOCK_TAG] == "somebody who took it over"


def test_the_first_to_ask_may_be_a_thread_beside_another(root: Path) -> None:
    """As a promotion asks while its tracker sends."""
    ensure_model(root, "m")
    code = (
        "import sys, threading; from pathlib import Path\n"
        "from opensora.tracking.registry import champion\n"
        "from opensora.tracking.store import connect\n"
        "root, failed = Path(sys.argv[1]), []\n"
        "def look(number):\n"
        "    try: champion(root, 'none') if number % 2 else connect(root)\n"
        "    except BaseException as error: failed.append(error)\n"
        "threads = [threading.Thread(target=look, args=[n]) for n in range(4)]\n"
        "for thread in threads: thread.start()\n"
        "for thread in threads: thread.join()\n"
        "sys.exit(str(failed) if failed else 0)"
    )
    command = [sys.executable, "-c", code, str(root)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
