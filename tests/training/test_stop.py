"""Told to stop before torch is imported: an exit code at once, and no traceback."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.conftest import ROOT

SLOW_TORCH = "import os, pathlib, time\npathlib.Path(os.environ['MARK']).touch()\ntime.sleep(300)\n"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize(
    "command",
    [
        ["opensora.cli", "train_image", "--profile", "smoke", "--workdir", "{folder}"],
        ["opensora.training.worker", "{folder}"],
        ["opensora.launch", "--nproc-per-node", "2", "train_image"],
    ],
    ids=lambda command: command[0],
)
def test_a_signal_during_the_start_ends_it(number: signal.Signals, command: list[str], tmp_path: Path) -> None:
    encoded = tmp_path / "smoke" / "encode"
    encoded.mkdir(parents=True)
    (encoded / "report.json").write_text('{"step": "encode"}')
    (encoded / "fingerprint.json").write_text('"made here"')
    (tmp_path / "job.json").write_text("{}")
    (tmp_path / "slow" / "torch").mkdir(parents=True)
    (tmp_path / "slow" / "torch" / "__init__.py").write_text(SLOW_TORCH)
    environment = {"PYTHONPATH": f"{tmp_path / 'slow'}:{ROOT}", "MARK": str(tmp_path / "importing")}
    process = subprocess.Popen(
        [sys.executable, "-m", *(part.format(folder=tmp_path) for part in command)],
        cwd=ROOT,
        env=os.environ | environment,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        deadline = time.monotonic() + 60
        while not (tmp_path / "importing").exists() and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.02)
        assert (tmp_path / "importing").exists(), process.communicate(timeout=10)
        process.send_signal(number)
        _, errors = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 128 + number
    assert errors == f"stopped by {number.name}; start the same command again to resume\n"
