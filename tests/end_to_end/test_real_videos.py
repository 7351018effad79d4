"""The whole chain on a folder of real videos, good and bad, by `opensora run`."""

import json
from pathlib import Path

import pytest

from opensora.data.video import read_frames
from opensora.manifest import read_manifest
from tests.conftest import ROOT
from tests.end_to_end.command import run
from tests.shared import shared


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_real_videos_go_through_the_same_chain(tmp_path: Path) -> None:
    source = shared("videos")
    command = ["opensora", "run", "--profile", "smoke", "--source", str(source), "--workdir", str(tmp_path)]
    out = run(*command, folder=ROOT)
    base = tmp_path / "smoke"
    rows = read_manifest(base / "encode")
    sintel = [row for row in rows if "sintel" in row.source]
    assert len(sintel) == 10
    for path in source.glob("bad_*"):
        (row,) = (row for row in rows if row.source.endswith(path.name))
        assert not row.kept
        assert row.reason
    assert all(row.caption for row in rows if row.kept)
    assert list((base / "train_highres" / "checkpoints").glob("step-*/model.safetensors"))
    assert json.loads((base / "evaluate" / "metrics.json").read_text())["seconds"]["train_video"] > 0
    clips = sorted((base / "evaluate" / "samples" / "train_highres").glob("*.mp4"))
    assert read_frames(clips[0].read_bytes()).shape == (4, 64, 64, 3)
    assert "alias champion" in out

    again = run(*command, folder=ROOT)  # finished steps are not run again
    assert [line for line in again.splitlines() if line.startswith("train_video:")]
    assert json.loads((base / "promote" / "gate.json").read_text())["version"] == "1"
