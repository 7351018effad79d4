"""The components of the data steps, called as functions: the demo's steps in order, by shares and whole."""

import json
from pathlib import Path

import pytest

dsl = pytest.importorskip("kfp.dsl", reason="the extra `kubeflow` is not installed")


def artifact(folder: Path, name: str) -> "dsl.Dataset":
    return dsl.Dataset(name=name, uri=str(folder / "artifacts" / name), metadata={})


def test_steps_by_shares_and_whole(tmp_path: Path) -> None:
    from components import data

    whole = {"profile": "smoke", "overrides": [], "workdir": str(tmp_path / "runs")}
    whole |= {"data_revision": "raw-1", "code_revision": "abc"}
    made = {name: artifact(tmp_path, name) for name in ("demo_videos", "download", "split", "score")}
    data.demo_videos.python_func(**whole, manifest=made["demo_videos"])

    shares = data.list_shares.python_func(2)
    assert shares == ["0/2", "1/2"]
    folder = tmp_path / "runs" / "smoke"
    for step, before in (("download", made["demo_videos"]), ("split", made["download"])):
        for share in shares:
            data.data_share.python_func(before, before, step=step, share=share, **whole)
            assert not (folder / step).exists()  # a share finishes nothing
        parts = {path.name: path.read_bytes() for path in (folder / ".partial" / step).glob("manifest-*.parquet")}
        assert len(parts) == 2
        journal = (folder / ".partial" / step / "shards.jsonl").read_text()
        getattr(data, step).python_func(before, **whole, manifest=made[step])
        assert {path.name: path.read_bytes() for path in (folder / step).glob("manifest-*.parquet")} == parts
        assert (folder / step / "shards.jsonl").read_text() == journal  # what the shares did was not done again
    assert not list((folder / "download").glob("items*"))

    said = json.loads(Path(made["split"].path).read_text())
    assert (said["step"], said["uri"]) == ("split", str(folder / "split"))
    assert (said["data_revision"], said["code_revision"]) == ("raw-1", "abc")
    assert said["report"]["kept"] == made["split"].metadata["kept"] == 16

    (folder / "split" / "fingerprint.json").write_text('"another"')
    with pytest.raises(SystemExit) as end:
        data.score.python_func(made["split"], **whole, manifest=made["score"])
    assert end.value.code == 1


def test_a_step_that_the_profile_lacks_leaves_an_empty_manifest(tmp_path: Path) -> None:
    from components import data

    made = artifact(tmp_path, "demo_videos")
    job = {"profile": "h800", "overrides": [], "workdir": str(tmp_path), "data_revision": "", "code_revision": ""}
    data.demo_videos.python_func(**job, manifest=made)
    assert json.loads(Path(made.path).read_text())["uri"] == ""
    models = artifact(tmp_path, "demo_models")
    data.demo_models.python_func(made, **job, manifest=models)
    assert json.loads(Path(models.path).read_text())["uri"] == ""


def test_the_reason_is_the_last_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from components import data

    before = artifact(tmp_path, "before")
    Path(before.path).parent.mkdir(parents=True)
    Path(before.path).write_text(json.dumps({"step": "download", "uri": str(tmp_path / "gone"), "fingerprint": ""}))
    job = {"profile": "smoke", "overrides": [], "workdir": str(tmp_path), "data_revision": "", "code_revision": ""}
    with pytest.raises(SystemExit):
        data.split.python_func(before, **job, manifest=artifact(tmp_path, "x"))
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert last.startswith("error: ")
    assert "is gone" in last


def test_shares_at_the_same_time_do_not_remove_each_others_work(tmp_path: Path) -> None:
    from opensora.step import StepError, StepFolder

    first, second = (StepFolder(tmp_path / "step", "key") for _ in range(2))
    (first.open(shared=True) / "part").write_text("x")
    assert (second.open(shared=True) / "part").is_file()
    with pytest.raises(StepError, match="another process is working"):
        StepFolder(tmp_path / "step", "key").open()
