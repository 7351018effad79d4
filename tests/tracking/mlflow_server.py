"""A real MLflow server on loopback that can be killed and started again in moments.

A process that has imported MLflow forks the server, so that a start costs a tenth of a second and not eight.
"""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from urllib.request import urlopen

LIMIT_S = 120.0
ZYGOTE = """
import os, signal, sys
import uvicorn
from mlflow.server.fastapi_app import app
signal.signal(signal.SIGCHLD, signal.SIG_IGN)
print("ready", flush=True)
for line in sys.stdin:
    child = os.fork()
    if child == 0:
        uvicorn.run(app, host="127.0.0.1", port=int(line), log_level="error")
        os._exit(0)
    print(child, flush=True)
"""


class MlflowServer:
    """The server over a SQLite file in `folder`."""

    def __init__(self, folder: Path) -> None:
        with socket.socket() as place:
            place.bind(("127.0.0.1", 0))
            self.port = place.getsockname()[1]
        self.uri = f"http://127.0.0.1:{self.port}"
        self.artifacts = folder / "artifacts"
        self.database = f"sqlite:///{folder / 'mlflow.db'}"
        environment = os.environ | {
            "_MLFLOW_SERVER_FILE_STORE": self.database,
            "_MLFLOW_SERVER_REGISTRY_STORE": self.database,
            "_MLFLOW_SERVER_ARTIFACT_ROOT": "mlflow-artifacts:/",
            "_MLFLOW_SERVER_ARTIFACT_DESTINATION": str(self.artifacts),
            "_MLFLOW_SERVER_SERVE_ARTIFACTS": "true",
            "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
        }
        environment.pop("MLFLOW_TRACKING_URI", None)
        self._zygote = subprocess.Popen(
            [sys.executable, "-c", ZYGOTE], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )
        self._child = 0
        self._ready = False

    def start(self) -> None:
        """Start it, and wait until it answers."""
        assert self._zygote.stdin
        assert self._zygote.stdout
        if not self._ready:
            assert self._zygote.stdout.readline() == "ready\n"
            self._ready = True
        self._zygote.stdin.write(f"{self.port}\n")
        self._zygote.stdin.flush()
        self._child = int(self._zygote.stdout.readline())
        deadline = time.monotonic() + LIMIT_S
        while time.monotonic() < deadline:
            try:
                with urlopen(f"{self.uri}/health", timeout=10):
                    return
            except OSError:
                time.sleep(0.02)
        raise AssertionError("the MLflow server does not start")

    def start_warm(self) -> None:
        """The same, and wait for its first real answer, which takes longer than a client waits."""
        self.start()
        with urlopen(f"{self.uri}/api/2.0/mlflow/registered-models/search", timeout=LIMIT_S) as answer:
            assert answer.status == 200

    def kill(self) -> None:
        """As the kernel does when memory is short."""
        if self._child:
            os.kill(self._child, signal.SIGKILL)
            self._wait_until_gone()
            self._child = 0

    def _wait_until_gone(self) -> None:
        """Its port is free then; the process that forked it does not wait for it."""
        deadline = time.monotonic() + LIMIT_S
        while time.monotonic() < deadline:
            try:
                os.kill(self._child, 0)
            except ProcessLookupError:
                return
            time.sleep(0.01)
        raise AssertionError("the killed server is still there")

    def close(self) -> None:
        """End it for good."""
        self.kill()
        self._zygote.kill()
        self._zygote.wait(LIMIT_S)
