"""Promotion against a real registry: who becomes the champion, and what is left when something breaks."""

import gc
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from mlflow import MlflowClient
from typer.testing import CliRunner

from opensora import promote as step
from opensora.cli import app
from opensora.config import PromoteConfig, UserError
from opensora.evaluation import METRICS_VERSION
from opensora.evaluation.champion import find_champion
from opensora.promote import preview, run
from opensora.promotion.evidence import damage_of
from opensora.promotion.rollback import rollback
from opensora.promotion.table import list_versions
from opensora.step import CACHE, StepError
from opensora.tracking.lineage import lineage
from opensora.tracking.promotion_lock import LOCK_TAG
from opensora.tracking.registry import RegistryError, champion, versions
from opensora.tracking.store import connect
from opensora.tracking.version_files import model_version_path
from opensora.training.checkpoint import describe_checkpoint
from tests.conftest import ROOT
from tests.promotion_case import BETTER, GATES, change_json, make_beside, make_candidate, make_evaluation
from tests.small_disk import small_disk
from tests.test_architecture import own_imports
from tests.tracking.mlflow_server import MlflowServer

MODEL = "opensora-smoke"


@pytest.fixture(autouse=True)
def default_store(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)


class Place:
    """A folder of results, and the shortest way to a promotion there."""

    def __init__(self, root: Path, checkpoint: Path) -> None:
        self.root, self.base, self.checkpoint = root, root / "smoke", checkpoint

    def candidate(self, shift: float, right: int, lineage: dict[str, str] | None = None, **changes: object) -> str:
        sha256 = make_candidate(self.base, self.checkpoint, shift, lineage)
        make_evaluation(self.base, sha256, right, **changes)
        return sha256

    def inputs(self) -> tuple[Path, Path]:
        return self.base / "evaluate", self.base / "train_video"

    def promote(self, config: PromoteConfig = GATES) -> dict:
        run(config, "smoke", *self.inputs(), self.root, self.base / "promote")
        return json.loads((self.base / "promote" / "gate.json").read_text())

    def champion(self) -> str | None:
        now = champion(self.root, MODEL)
        return now.version if now else None

    def kept(self) -> list[Path]:
        """Copies under a final name."""
        return [path for path in self.root.glob(f"registry/{MODEL}/*") if not path.name.startswith(".")]


@pytest.fixture
def place(tmp_path: Path, mlflow_store: Path, checkpoint: Path) -> Place:
    root = tmp_path / "runs"
    root.mkdir()
    shutil.copy(mlflow_store, root / "mlflow.db")
    return Place(root, checkpoint)


def failed(verdict: dict) -> dict[str, str]:
    return {check["kind"]: check["reason"] for check in verdict["checks"] if not check["passed"]}


def test_promotion_refusal_and_roll_back(place: Place) -> None:
    first = place.candidate(1, 20)
    dry = preview(GATES, "smoke", *place.inputs(), place.root)
    assert dry["verdict"] == "promoted"
    assert not versions(place.root, MODEL)
    assert not (place.base / "promote").exists()
    assert not place.kept()

    verdict = place.promote()
    assert (verdict["verdict"], verdict["version"], verdict["champion"]) == ("promoted", "1", None)
    (one,) = versions(place.root, MODEL)
    assert one.aliases == ("champion",)
    assert (one.tags["checkpoint.sha256"], one.tags["previous_champion"]) == (first, "none")
    copy = Path(one.tags["evaluation.uri"])
    assert json.loads((copy / "scores.json").read_text())["prompts"]
    assert (copy / "samples" / "train_video" / "000.mp4").is_file()
    before = (place.base / "promote" / "report.json").stat().st_mtime_ns
    assert place.promote() == verdict  # nothing to do
    assert (place.base / "promote" / "report.json").stat().st_mtime_ns == before

    place.candidate(2, 15)
    verdict = place.promote()
    assert "worse by more than 0.1" in failed(verdict)["non-inferiority"]
    assert (verdict["verdict"], verdict["champion"], place.champion()) == ("rejected", "1", "1")
    assert "stays the champion" in (place.base / "promote" / "gate.md").read_text()

    place.candidate(3, 21)
    assert set(failed(place.promote(BETTER))) == {"improvement"}  # one prompt of 24 may be chance
    place.candidate(3, 20 + 4)
    assert set(failed(place.promote(BETTER))) == {"improvement"}
    verdict = place.promote()  # but it is not worse
    assert (verdict["version"], place.champion()) == ("2", "2")

    assert rollback(place.root, MODEL, reason="flickers") == ("2", "1")
    two, one = versions(place.root, MODEL)
    assert (one.aliases, two.aliases) == (("champion",), ())
    said = json.loads(two.tags["rolled_back"])
    assert (said["reason"], said["to"], "@" in said["by"]) == ("flickers", "1", True)
    assert "flickers" in failed(place.promote())["roll-back"]  # not again by itself
    with pytest.raises(RegistryError, match="first champion"):
        rollback(place.root, MODEL)
    with pytest.raises(RegistryError, match="already"):
        rollback(place.root, MODEL, to="1")
    with pytest.raises(RegistryError, match="no version 9"):
        rollback(place.root, MODEL, to="9")
    assert rollback(place.root, MODEL, to="2") == ("1", "2")
    assert "rolled_back" not in versions(place.root, MODEL)[0].tags
    assert place.promote()["version"] == "2"  # it is the champion already
    assert len(versions(place.root, MODEL)) == 2

    shutil.rmtree(Path(one.tags["checkpoint.uri"]))
    with pytest.raises(RegistryError, match=r"cannot be loaded any more.*nothing was moved"):
        rollback(place.root, MODEL)
    assert place.champion() == "2"
    table = CliRunner().invoke(app, ["registry", "--profile", "smoke", "--workdir", str(place.root)])
    assert "champion" in table.stdout
    assert "nothing at" in table.stdout
    listed = CliRunner().invoke(app, ["registry", "--profile", "smoke", "--workdir", str(place.root), "--json"])
    newest, oldest = json.loads(listed.stdout)
    assert newest["metrics"]["following"] == 1
    assert newest["lineage"]["data_revision"] == "data-1"
    assert oldest["restored"]["reason"] == "flickers"


def test_a_candidate_that_is_not_what_was_evaluated(place: Place) -> None:
    place.candidate(1, 20, checkpoint_sha256="other")
    assert "of checkpoint other" in failed(place.promote())["evaluation"]
    place.candidate(1, 20, metrics_version=METRICS_VERSION + 1)
    assert f"version {METRICS_VERSION + 1}" in failed(place.promote())["evaluation"]
    place.candidate(1, 20, following=float("nan"))
    assert "nan" in failed(place.promote())["floor"]
    place.candidate(1, 20)
    sample = place.base / "evaluate" / "samples" / "train_video" / "000.mp4"
    sample.write_bytes(sample.read_bytes()[:200])
    assert "does not decode" in failed(place.promote())["sample"]
    place.candidate(1, 20)
    (weights,) = place.base.glob("train_video/checkpoints/step-*/model.safetensors")
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)  # of the same length and with the same description beside it
    assert "another sha256" in failed(place.promote())["artifact"]
    weights.unlink()
    assert "is missing" in failed(place.promote())["artifact"]
    (place.base / "evaluate" / "metrics.json").write_text("{")
    with pytest.raises(StepError, match=r"damaged.*opensora evaluate"):
        place.promote()
    (place.base / "evaluate" / "metrics.json").unlink()
    with pytest.raises(StepError, match="run `opensora evaluate` first"):
        place.promote()
    assert not versions(place.root, MODEL)
    assert not place.kept()


def test_a_champion_that_is_lost_is_no_free_pass(place: Place) -> None:
    place.candidate(1, 20)
    place.promote()
    second = place.candidate(2, 20)
    (one,) = versions(place.root, MODEL)
    (Path(one.tags["checkpoint.uri"]) / "ema.safetensors").write_bytes(b"x")
    (Path(one.tags["checkpoint.uri"]) / "model.safetensors").write_bytes(b"x")
    assert "version 1 is lost" in failed(place.promote())["champion"]
    lax = GATES.model_copy(update={"replace_lost_champion": True})
    place.candidate(2, 11)
    assert set(failed(place.promote(lax))) == {"floor"}
    assert place.candidate(2, 20) == second
    assert (place.promote(lax)["version"], place.champion()) == ("2", "2")

    connect(place.root).delete_model_version(MODEL, "2")  # and with it the alias, without a word
    place.candidate(3, 24)
    assert "version 2 is lost: the alias `champion` is gone" in failed(place.promote())["champion"]
    assert place.promote(lax)["version"] == "3"

    stranger = connect(place.root).create_model_version(MODEL, str(place.root)).version
    connect(place.root).set_registered_model_alias(MODEL, "champion", str(stranger))
    place.candidate(4, 24)
    assert "not by `opensora promote`" in failed(place.promote())["champion"]

    connect(place.root).set_registered_model_alias(MODEL, "champion", "3")
    version = champion(place.root, MODEL)
    known = {"champion_version": "3", "champion_sha256": version.tags["checkpoint.sha256"] if version else ""}
    place.candidate(4, 24, champion_unavailable="out of memory", **known)
    reason = failed(place.promote())["champion"]
    assert "version 3 is lost: out of memory; `opensora evaluate` tries it again; go back" in reason


def test_a_champion_of_another_shape_is_replaced_where_that_is_accepted(place: Place) -> None:
    first = place.candidate(1, 20)
    place.promote()
    place.candidate(2, 14, shape="16x32x32, interval 1", evaluation_sha256="of 16 frames")
    make_beside(place.base, "1", first, 20)
    reason = failed(place.promote())["champion"]
    assert "are 16x32x32, interval 1, those of version 1, evaluated beside the candidate, are 4x32x32, " in reason
    shutil.copytree(place.base / "train_video", place.base / "train_highres")
    command = ["promote", "--profile", "smoke", "--workdir", str(place.root), "--dry-run"]
    for flags in (["--accept-other-shape"], []):
        done = CliRunner().invoke(app, [*command, *flags])
        assert ("by promote.accept_other_shape the floors alone decide" in done.stdout) == bool(flags)
    any_shape = GATES.model_copy(update={"accept_other_shape": True})
    assert place.promote(any_shape)["version"] == "2"
    (previous,) = (version.tags["previous_champion"] for version in versions(place.root, MODEL) if version.aliases)
    assert previous == "1"


def test_a_promotion_stands_as_long_as_its_files_are_whole(place: Place) -> None:
    place.candidate(1, 20)
    verdict = place.promote()
    (one,) = versions(place.root, MODEL)
    weights = Path(one.tags["checkpoint.uri"]) / "model.safetensors"
    away = weights.rename(weights.with_name("away"))
    assert "version 1 is lost" in failed(place.promote())["champion"]
    away.rename(weights)
    assert place.promote()["version"] == "1"
    (place.base / "promote" / "gate.json").unlink()
    again = place.promote()
    assert (again["verdict"], again["version"], len(versions(place.root, MODEL))) == ("promoted", "1", 1)
    (place.base / "promote" / "gate.json").write_text("{")
    assert place.promote() == again
    assert verdict["sha256"] == again["sha256"]


def test_the_champion_beside_the_candidate_counts_before_what_was_recorded(place: Place) -> None:
    first = place.candidate(1, 20)
    place.promote()
    place.candidate(2, 22, fd_extractor="i3d")
    assert "fd_extractor is i3d here, randconv there" in failed(place.promote())["champion"]
    make_beside(place.base, "1", first, 14, fd_extractor="i3d")
    verdict = place.promote(BETTER)
    assert verdict["version"] == "2"
    (check,) = (check for check in verdict["checks"] if check["kind"] == "improvement")
    assert check["champion"] == 14 / 24
    assert check["interval"][0] > 0
    place.candidate(3, 24)  # its champion.json is gone, and version 2 recorded another extractor
    make_beside(place.base, "1", first, 14)  # of a champion that is none any more
    assert "as evaluated when it was promoted" in failed(place.promote())["champion"]
    version = champion(place.root, MODEL)
    assert version
    recorded = Path(version.tags["evaluation.uri"])
    change_json(recorded / "metrics.json", fd_extractor="randconv")  # somebody helps it along
    assert "no evaluation" in failed(place.promote(BETTER))["champion"]


def test_the_vae_and_the_text_encoder_are_judged_too(place: Place) -> None:
    sha256 = place.candidate(1, 20)
    vae = place.base / "demo_models" / "vae"
    (weights,) = vae.glob("*.safetensors")
    good = weights.read_bytes()
    weights.unlink()
    assert "vae has sha256" in failed(place.promote())["artifact"]
    weights.write_bytes(bytes(len(good)))
    assert "put its files back" in failed(place.promote())["artifact"]
    vae.rename(hidden := vae.with_name("hidden"))
    assert "needs demo_models/vae, which is in none of the folders" in failed(place.promote())["artifact"]
    hidden.rename(vae)
    weights.write_bytes(good)
    assert place.promote()["version"] == "1"

    with (vae / "config.json").open("a") as handle:
        handle.write("\n")
    make_evaluation(place.base, sha256, 20)  # of the same checkpoint with another VAE
    assert "when this checkpoint was registered" in failed(place.promote())["artifact"]
    place.candidate(2, 20)
    assert place.promote()["version"] == "2"
    two, one = (Path(version.tags["checkpoint.uri"]).parent for version in versions(place.root, MODEL))
    (one / "demo_models" / "vae" / weights.name).unlink()
    with pytest.raises(RegistryError, match=r"vae/.*safetensors is missing.*nothing was moved"):
        rollback(place.root, MODEL)
    records = list_versions(place.root, MODEL, verify=True)
    assert [("is missing" in str(record["problem"])) for record in records] == [False, True]
    (encoder,) = (two / "demo_models" / "t5").glob("*.safetensors")
    encoder.unlink()
    encoder.write_bytes(b"another")
    place.candidate(3, 24)
    assert "version 2 is lost" in (reason := failed(place.promote())["champion"])
    assert "is not the file this model was saved with" in reason
    place.candidate(2, 20)  # whose damaged copy is there already
    lax = GATES.model_copy(update={"replace_lost_champion": True})
    assert place.promote(lax)["version"] == "2"
    assert not list_versions(place.root, MODEL, verify=True)[0]["problem"]


def test_the_lineage_is_that_of_the_training(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENSORA_REVISION", "abc-dirty")
    monkeypatch.setenv("OPENSORA_DATA_REVISION", "data-7")
    place.candidate(1, 20, lineage=lineage())
    monkeypatch.setenv("OPENSORA_REVISION", "def")
    monkeypatch.setenv("OPENSORA_DATA_REVISION", "data-8")
    verdict = place.promote()
    assert verdict["checks"][0]["reason"] == "git_commit abc with uncommitted changes, data_revision data-7"
    (one,) = versions(place.root, MODEL)
    assert (one.tags["git_commit"], one.tags["git_dirty"], one.tags["data_revision"]) == ("abc", "true", "data-7")
    place.candidate(2, 20, lineage={})  # by a program that did not write it down
    assert "remove the folder of train_video and train it anew" in failed(place.promote())["lineage"]


def test_a_champion_that_lost_its_signature_is_asked_for_it(place: Place) -> None:
    place.candidate(1, 20)
    place.promote()
    connect(place.root).delete_model_version_tag(MODEL, "1", "signature")
    place.candidate(2, 20)
    verdict = preview(GATES, "smoke", *place.inputs(), place.root)
    assert [check["reason"] for check in verdict["checks"] if check["kind"] == "signature"] == ["the champion's"]
    (described,) = place.root.glob(f"registry/{MODEL}/*/model/MLmodel")
    text = described.read_text()
    described.write_text(text.replace('"name": "seed", "required": true', '"name": "seed", "required": false'))
    assert "cannot call the candidate" in failed(place.promote())["signature"]


def test_an_alias_moved_by_hand_meanwhile_is_judged_again(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    for shift, right in ((1, 14), (2, 24)):
        place.candidate(shift, right)
        place.promote()
    rollback(place.root, MODEL, reason="a trial")
    place.candidate(3, 15)  # as good as version 1, far worse than version 2
    copy = step.keep

    def keep_and_move(*arguments: Any) -> tuple[Path, Path]:
        connect(place.root).set_registered_model_alias(MODEL, "champion", "2")
        return copy(*arguments)

    monkeypatch.setattr(step, "keep", keep_and_move)
    verdict = place.promote()
    assert "meanwhile somebody put it on version 2" in verdict["notes"][0]
    assert "worse by more than" in failed(verdict)["non-inferiority"]
    assert (place.champion(), len(versions(place.root, MODEL))) == ("2", 2)


def test_a_champion_deleted_meanwhile_is_judged_again_and_not_replaced(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    place.candidate(1, 20)
    place.promote()
    place.candidate(2, 20)
    copy = step.keep

    def keep_and_delete(*arguments: Any) -> tuple[Path, Path]:
        connect(place.root).delete_model_version(MODEL, "1")
        return copy(*arguments)

    monkeypatch.setattr(step, "keep", keep_and_delete)
    verdict = place.promote()
    assert "was on version 1, and meanwhile somebody put it on no version; judged again" in verdict["notes"][0]
    assert "version 1 is lost: the alias `champion` is gone" in failed(verdict)["champion"]
    assert (verdict["version"], place.champion(), versions(place.root, MODEL)) == (None, None, [])


def test_a_refusal_stands_until_a_check_would_end_otherwise(place: Place) -> None:
    place.candidate(1, 20)
    place.promote()
    place.candidate(2, 20)
    (one,) = versions(place.root, MODEL)
    folder = Path(one.tags["checkpoint.uri"])
    away = folder.rename(folder.with_name("away"))
    verdict = place.promote()
    assert "version 1 is lost" in failed(verdict)["champion"]
    report = place.base / "promote" / "report.json"
    before = report.stat().st_mtime_ns
    assert place.promote() == verdict
    assert report.stat().st_mtime_ns == before  # and so no new run
    away.rename(folder)
    assert place.promote()["version"] == "2"


def test_an_evaluation_replaced_while_it_is_judged_is_not_kept(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    sha256 = place.candidate(1, 20)
    judged = step.judge

    def judge_and_replace(*arguments: Any) -> list:
        make_evaluation(place.base, sha256, 3)
        return judged(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(step, "judge", judge_and_replace)
        with pytest.raises(StepError, match="was replaced while it was judged"):
            place.promote()
    gc.collect()
    assert not versions(place.root, MODEL)
    assert not list(place.root.glob(f"registry/{MODEL}/*/evaluation"))
    assert set(failed(place.promote())) == {"floor"}


def test_the_champion_before_is_known_after_the_alias_was_lost(place: Place) -> None:
    lax = GATES.model_copy(update={"replace_lost_champion": True})
    for shift in (1, 2):
        place.candidate(shift, 20)
        place.promote()
    client = connect(place.root)
    client.delete_registered_model_alias(MODEL, "champion")
    assert place.promote(lax)["version"] == "2"
    assert versions(place.root, MODEL)[0].tags["previous_champion"] == "1"
    assert rollback(place.root, MODEL) == ("2", "1")
    assert rollback(place.root, MODEL, to="2") == ("1", "2")

    client.delete_registered_model_alias(MODEL, "champion")
    assert rollback(place.root, MODEL, to="2") == ("none", "2")  # it gets back what it had
    assert "rolled_back" not in versions(place.root, MODEL)[0].tags
    client.delete_registered_model_alias(MODEL, "champion")
    assert rollback(place.root, MODEL, to="1", reason="dark") == ("none", "1")
    two, one = versions(place.root, MODEL)
    assert json.loads(two.tags["rolled_back"])["reason"] == "dark"
    assert json.loads(one.tags["restored"])["from"] == "2"
    assert "dark" in failed(place.promote(lax))["roll-back"]


def test_the_registry_is_free_while_a_version_is_uploaded(
    place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A second folder of results promotes in the middle of the first one's upload."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{place.root / 'mlflow.db'}")
    place.candidate(1, 14)
    other = Place(tmp_path / "other", place.checkpoint)
    other.candidate(2, 24)
    upload, inside = step.register_folder, []

    def upload_slowly(*arguments: Any) -> str:
        if not inside:
            inside.append(True)
            assert other.promote()["version"] == "1"
        return upload(*arguments)

    monkeypatch.setattr(step, "register_folder", upload_slowly)
    verdict = place.promote()
    assert "was on no version, and meanwhile somebody put it on version 1" in verdict["notes"][0]
    assert set(failed(verdict)) == {"non-inferiority"}
    assert [version.aliases for version in versions(place.root, MODEL)] == [(), ("champion",)]
    place.candidate(1, 24)
    assert place.promote()["version"] == "2"  # that was uploaded before
    assert len(versions(place.root, MODEL)) == 2


def test_a_full_disk_leaves_no_half_copy(place: Place, tmp_path: Path) -> None:
    place.candidate(1, 20)
    with small_disk(tmp_path / "small", "200k") as small:
        (place.root / "registry").symlink_to(small)
        with pytest.raises(UserError, match=r"the disk is full; free some space"):
            place.promote()
        assert not [path for path in small.rglob("*") if path.is_file()]
        (place.root / "registry").unlink()
    assert not versions(place.root, MODEL)
    assert place.promote()["version"] == "1"


@pytest.mark.parametrize(
    ("where", "after"), [(step, "keep"), (MlflowClient, "log_model_artifacts"), (step, "register_folder")]
)
def test_a_server_killed_in_the_middle(
    place: Place, where: Any, after: str, mlflow_server: MlflowServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever was done before is found again: one upload and one version in the end, and the alias on it."""
    model, profile = f"opensora-{after}", after
    monkeypatch.setenv("MLFLOW_TRACKING_URI", mlflow_server.uri)
    place.candidate(1, 20)
    inputs = (GATES, profile, *place.inputs(), place.root, place.base / "promote")
    done, died = getattr(where, after), []

    def then_die(*arguments: object) -> object:
        result = done(*arguments)
        died.append(mlflow_server.kill())
        return result

    with monkeypatch.context() as patch:
        patch.setattr(where, after, then_die)
        with pytest.raises(UserError, match=r"^the registry at .* does not answer \(no connection\)[^\n]*$"):
            run(*inputs)
    gc.collect()  # what the error still holds would keep the step's folder locked; a command ends instead
    assert died
    mlflow_server.start_warm()
    assert champion(place.root, model) is None
    assert len(versions(place.root, model)) == (after == "register_folder")
    run(*inputs)
    (version,) = versions(place.root, model)
    assert version.aliases == ("champion",)
    client = connect(place.root)
    assert LOCK_TAG not in client.get_registered_model(model).tags
    experiment = client.get_experiment_by_name(model)
    assert experiment
    (uploaded,) = client.search_logged_models([experiment.experiment_id], f"name = '{model}'")
    assert str(uploaded.status) == "READY"


def test_a_machine_that_shares_only_the_server_fetches_the_champion(
    place: Place, tmp_path: Path, mlflow_server: MlflowServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", mlflow_server.uri)
    sha256 = place.candidate(1, 20)
    place.promote()
    place.root.rename(tmp_path / "elsewhere")
    place.root.mkdir()
    client = connect(place.root)
    client.delete_registered_model_alias(MODEL, "champion")
    for verify, problem in ((False, ""), (True, "not verified: in the server's store and not on this machine")):
        assert [record["problem"] for record in list_versions(place.root, MODEL, verify)] == [problem]
    assert not list(place.root.iterdir())  # nothing is fetched to be listed

    assert rollback(place.root, MODEL, to="1") == ("none", "1")
    folder = model_version_path(f"models:/{MODEL}@champion", place.root)
    assert folder.is_relative_to(place.root)
    assert describe_checkpoint(folder).sha256 == sha256
    found = find_champion(place.root, MODEL, place.base / CACHE)
    assert found
    assert found.checkpoint, found.unavailable
    assert (found.version, found.checkpoint.folder, found.kept) == ("1", folder, None)
    assert found.checkpoint.vae.is_relative_to(place.root)
    assert [record["problem"] for record in list_versions(place.root, MODEL, verify=True)] == [""]
    weights = folder / "model.safetensors"
    good = weights.read_bytes()
    weights.write_bytes(good[:-1])
    (record,) = list_versions(place.root, MODEL, verify=True)
    assert "model.safetensors has another sha256" in record["problem"]
    assert weights.stat().st_size == len(good) - 1  # nothing is fetched to be listed
    (version,) = versions(place.root, MODEL)
    assert damage_of(place.root, MODEL, version) == ""
    assert weights.read_bytes() == good
    before = folder.stat().st_ino
    weights.write_bytes(good[:-1])
    for uploaded in mlflow_server.artifacts.rglob("model.safetensors"):
        uploaded.write_bytes(b"x")
    assert "model.safetensors has another sha256" in damage_of(place.root, MODEL, version)
    assert folder.stat().st_ino == before  # what is here stays where the store has nothing better


def test_dvc_knows_the_code_that_decides() -> None:
    deps = yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"]["promote"]["deps"]
    own = [ROOT / "opensora" / "promote.py", *(ROOT / "opensora" / "promotion").glob("*.py")]
    # What decides where things lie and how they are read, and not who passes.
    plain = {"config", "step", "data.video", "tracking.store", "tracking.tracker"}
    used = {name for file in own for name in own_imports(file)} - plain
    assert {"evaluation.files", "served_model", "tracking.version_files"} <= used
    paths = {name: Path("opensora", *name.split(".")) for name in used}
    lacking = [
        name
        for name, path in paths.items()
        if not {str(path.with_suffix(".py")), str(path), str(path.parent)} & {*deps}
    ]
    assert lacking == []


@pytest.mark.parametrize("command", ["registry", "rollback", "promote"])
def test_a_server_that_is_away_is_one_clear_line(place: Place, command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    place.candidate(1, 20)
    shutil.copytree(place.base / "train_video", place.base / "train_highres")
    done = CliRunner().invoke(app, [command, "--profile", "smoke", "--workdir", str(place.root)])
    assert isinstance(done.exception, RegistryError)
    assert done.exception.exit_code == 1
    assert "does not answer (no connection); start the server" in str(done.exception)
    assert "\n" not in str(done.exception)
    assert not (place.base / "promote").exists()
