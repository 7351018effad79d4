"""Running the project's commands as a user does."""

import os
import subprocess
import sys
from pathlib import Path

BIN = Path(sys.executable).parent


def run(*command: str, folder: Path) -> str:
    """Output of a command that must pass."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("DVC_", "MLFLOW_"))}
    environment |= {"PATH": f"{BIN}:{environment['PATH']}", "DVC_NO_ANALYTICS": "1", "PYTHONPATH": str(folder)}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=1500)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout
