"""`opensora track`: what is not sent yet, in a table, and one line where nothing can be sent."""

import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from opensora.track_cli import track
from opensora.tracking.drain import replay
from opensora.tracking.spool import SpoolReader, SpoolWriter, find_spools
from opensora.tracking.store import StoreAway
from tests.conftest import ROOT

AWAY = "http://user:hunter2@127.0.0.1:9"


@pytest.fixture
def runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", AWAY)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    place = tmp_path / "demo" / ".mlflow" / "abc" / "evaluate"
    writer = SpoolWriter(place)
    for number in range(3):
        writer.append({"kind": "metrics", "step": number, "values": {"fvd": 1.0}, "time": number})
    writer.close()
    reader = SpoolReader(place, "http://***@127.0.0.1:9")
    reader.mark(next(reader.lines())[1])
    reader.reject({"kind": "metrics", "time": 1}, "why")
    return tmp_path


def test_status_counts_what_is_not_sent(runs: Path) -> None:
    done = CliRunner().invoke(track, ["status", "--workdir", str(runs)])
    assert done.exit_code == 0, done.exception
    lines = done.stdout.splitlines()
    assert lines[0] == "store http://***@127.0.0.1:9"
    assert lines[2].split() == ["demo/abc/evaluate", "3", "2", "1"]
    empty = CliRunner().invoke(track, ["status", "--workdir", str(runs / "none")])
    assert empty.stdout.splitlines()[1].startswith("no runs below")


def test_replay_without_a_server_is_one_clear_line(runs: Path) -> None:
    command = [sys.executable, "-m", "opensora.cli", "track", "replay", "--workdir", str(runs)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, stdin=subprocess.DEVNULL)
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: http://***@127.0.0.1:9 cannot be reached")
    assert "hunter2" not in done.stdout + done.stderr


def test_the_end_of_a_run_leaves_alone_what_another_store_has(runs: Path) -> None:
    (place,) = find_spools(runs)
    reader = SpoolReader(place, "sqlite:///elsewhere")
    *_, (_, end) = reader.lines()
    reader.mark(end)
    assert replay(runs, nowhere=True) == 0
    with pytest.raises(StoreAway):  # who asks for it gets it, and there is no server
        replay(runs)
