"""The components of the data steps, called as functions: the demo's steps in order, by shares and whole."""

import json
from pathlib import Path

import pytest

dsl = pytest.importorskip("kfp.dsl", reason="the extra `kubeflow` is not installed")


def artifact(folder: Path, name: str) -> "dsl.Dataset":
    return dsl.Dataset(name=name, uri=str(folder / "artifacts" / name), metadata={})


def test_steps_by_shares_and_whole(tmp_path: Path) -> None:
    from components import data

    common = {"profile": "smoke", "overrides": [], "workdir": str(tmp_path / "runs")}
    made = {name: artifact(tmp_path, name) for name in ("demo_videos", "download", "split", "score")}
    whole = common | {"revision": "raw-1"}
    data.demo_videos.python_func(**whole, manifest=made["demo_videos"])
    data.download.python_func(made["demo_videos"], **whole, manifest=made["download"])

    shares = data.list_shares.python_func(2)
    assert shares == ["0/2", "1/2"]
    folder = tmp_path / "runs" / "smoke"
    for share in shares:
        data.data_share.python_func(made["download"], made["download"], step="split", share=share, **common)
        assert not (folder / "split").exists()  # a share finishes nothing
    parts = {path.name: path.stat().st_mtime_ns for path in (folder / ".partial" / "split").glob("manifest-*.parquet")}
    assert len(parts) == 2
    data.split.python_func(made["download"], **whole, manifest=made["split"])
    after = {path.name: path.stat().st_mtime_ns for path in (folder / "split").glob("manifest-*.parquet")}
    assert after == parts  # what the shares did was not done again

    said = json.loads(Path(made["split"].path).read_text())
    assert (said["step"], said["uri"], said["revision"]) == ("split", str(folder / "split"), "raw-1")
    assert said["report"]["kept"] == made["split"].metadata["kept"] == 16

    (folder / "split" / "fingerprint.json").write_text('"another"')
    with pytest.raises(SystemExit) as end:
        data.score.python_func(made["split"], **whole, manifest=made["score"])
    assert end.value.code == 1


def test_a_step_that_the_profile_lacks_leaves_an_empty_manifest(tmp_path: Path) -> None:
    from components import data

    made = artifact(tmp_path, "demo_videos")
    data.demo_videos.python_func(profile="h800", overrides=[], workdir=str(tmp_path), revision="", manifest=made)
    assert json.loads(Path(made.path).read_text())["uri"] == ""


def test_the_reason_is_the_last_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from components import data

    before = artifact(tmp_path, "before")
    Path(before.path).parent.mkdir(parents=True)
    Path(before.path).write_text(json.dumps({"step": "download", "uri": str(tmp_path / "gone"), "fingerprint": ""}))
    with pytest.raises(SystemExit):
        data.split.python_func(
            before, profile="smoke", overrides=[], workdir=str(tmp_path), revision="", manifest=artifact(tmp_path, "x")
        )
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
