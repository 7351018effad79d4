"""MLflow's server, started as its manifest starts it, from a folder that cannot be written, as in a container."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import requests
import yaml

from tests.conftest import ROOT

READ_ONLY = "/proc"  # not even root makes a file there
SECRET = {
    "POSTGRES_PASSWORD": "not used by SQLite",
    "MLFLOW_AUTH_ADMIN_PASSWORD": "an admin's password",
    "MLFLOW_FLASK_SERVER_SECRET_KEY": "any long random text",
}
LIMIT_S = 150.0

documents = list(yaml.safe_load_all((ROOT / "k8s" / "base" / "mlflow.yaml").read_text()))
by_kind = {document["kind"]: document for document in documents}
pod = by_kind["Deployment"]["spec"]["template"]["spec"]
(container,) = pod["containers"]
values = {item["name"]: item.get("value") for item in container["env"]}
settings = by_kind["ConfigMap"]["data"]["basic_auth.ini"]
database = values["MLFLOW_BACKEND_STORE_URI"]


def test_users_lie_in_the_database_of_the_runs_by_the_driver_that_the_image_has() -> None:
    assert f"database_uri = {database}\n" in settings
    assert database.startswith("postgresql+psycopg2://")
    requirements = (ROOT / "components" / "images" / "requirements" / "evaluate.txt").read_text()
    assert "psycopg2-binary" in requirements
    assert "@postgres:5432/" in database
    assert ":" not in database.partition("://")[2].partition("@")[0]  # no password: PGPASSWORD holds it
    (secret,) = (item["valueFrom"]["secretKeyRef"] for item in container["env"] if item["name"] == "PGPASSWORD")
    assert secret == {"name": "mlflow", "key": "POSTGRES_PASSWORD"}


def environment(folder: Path) -> dict[str, str]:
    """The container's: its own values, and those of its secret; in `folder` lie its file of settings and a database."""
    here = f"sqlite:///{folder / 'mlflow.db'}"
    path = Path(values["MLFLOW_AUTH_CONFIG_PATH"])
    (mount,) = (mount for mount in container["volumeMounts"] if mount["mountPath"] == str(path.parent))
    (volume,) = (volume for volume in pod["volumes"] if volume["name"] == mount["name"])
    assert volume["configMap"]["name"] == by_kind["ConfigMap"]["metadata"]["name"]
    (folder / path.name).write_text(settings.replace(database, here))
    env = {name: value for name, value in os.environ.items() if not name.startswith("MLFLOW_")}
    env |= {name: value for name, value in values.items() if value is not None} | SECRET
    return env | {
        "MLFLOW_AUTH_CONFIG_PATH": str(folder / path.name),
        "MLFLOW_BACKEND_STORE_URI": here,
        "HOME": str(folder),
    }


def free_port() -> int:
    with socket.socket() as place:
        place.bind(("127.0.0.1", 0))
        return place.getsockname()[1]


def wait_for(address: str, process: subprocess.Popen, log: Path) -> None:
    """Until the server is healthy for one that asks as the kubelet does, by the pod's own address."""
    until = time.monotonic() + LIMIT_S
    while time.monotonic() < until:
        assert process.poll() is None, log.read_text()[-4000:]
        try:
            if requests.get(f"{address}/health", headers={"Host": "10.1.2.3:5000"}, timeout=10).ok:
                return
        except requests.RequestException:
            time.sleep(0.2)
    raise AssertionError(f"not healthy after {LIMIT_S:.0f} s: {log.read_text()[-4000:]}")


def test_the_server_starts_with_a_read_only_root_and_lets_in_who_it_should(tmp_path: Path) -> None:
    pytest.importorskip("flask_wtf", reason="MLflow's basic-auth needs it: make setup")
    port = free_port()
    # One worker, for time: the command itself makes the tables and the admin before any worker starts.
    other = {"--port=5000": f"--port={port}", "--workers=2": "--workers=1", "--host=0.0.0.0": "--host=127.0.0.1"}
    assert set(other) <= set(container["args"])
    assert container["command"] == ["mlflow", "server"]
    assert container["securityContext"]["readOnlyRootFilesystem"]
    command = [sys.executable, "-m", "mlflow", "server", *(other.get(arg, arg) for arg in container["args"])]
    address, log = f"http://127.0.0.1:{port}", tmp_path / "log"
    with log.open("w") as out:
        process = subprocess.Popen(
            command,
            env=environment(tmp_path),
            cwd=READ_ONLY,
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        wait_for(address, process, log)

        def ask(host: str, login: tuple[str, str] | None, call: str = "experiments/search", **body: object) -> int:
            url, headers = f"{address}/api/2.0/mlflow/{call}", {"Host": host}
            return requests.post(
                url, json=body or {"max_results": 1}, auth=login, headers=headers, timeout=60
            ).status_code

        admin = ("admin", SECRET["MLFLOW_AUTH_ADMIN_PASSWORD"])
        steps = ("opensora", "a step's password")
        for host in ("mlflow.opensora-mlflow:5000", "mlflow.opensora-mlflow.svc.cluster.local:5000", "localhost:5000"):
            assert ask(host, admin) == 200, host
        assert ask("elsewhere.example:5000", admin) == 403
        assert ask("localhost:5000", None) == 401
        assert ask("localhost:5000", steps) == 401
        assert ask("localhost:5000", admin, "users/create", username=steps[0], password=steps[1]) == 200
        assert ask("localhost:5000", steps, "experiments/create", name="opensora") == 200
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait(timeout=60)
