"""The part of a Kubernetes API that a launcher talks to, over HTTP on loopback, with a story that it plays."""

import json
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlparse

JOBS = re.compile(r"/apis/trainer\.kubeflow\.org/v1alpha1/namespaces/opensora/trainjobs(?:/(.+))?$")
PODS = re.compile(r"/api/v1/namespaces/opensora/pods(?:/(.+)/log)?$")
GPU = "nvidia.com/gpu"
START = datetime(2026, 1, 1, tzinfo=UTC)


@dataclass
class FakeCluster:
    """Its jobs and pods; `steps` are called, one at each reading of a job, and change what is read."""

    quota: dict[str, str] = field(default_factory=lambda: {"cpu": "10k", "memory": "100Ti", GPU: "64"})
    requests: dict[str, str] = field(default_factory=lambda: {"cpu": "88", "memory": "1400Gi", GPU: "8"})  # of a pod
    workload: dict[str, Any] = field(default_factory=dict)  # conditions of every job's Workload: type → message, False
    events: list[dict] = field(default_factory=list)
    jobs: dict[str, dict] = field(default_factory=dict)
    pods: list[dict] = field(default_factory=list)
    logs: dict[str, list[tuple[str, str]]] = field(default_factory=dict)
    steps: list[Callable[["FakeCluster"], None]] = field(default_factory=list)
    calls: list[str] = field(default_factory=list)
    failures: list[int] = field(default_factory=list)  # statuses to answer with first; 0 cuts the connection
    created: datetime = START  # of jobs
    refuse: tuple[int, str] | None = None  # whatever would change something

    def condition(self, kind: str, message: str = "", status: str = "True") -> None:
        """Set a condition of all jobs."""
        for job in self.jobs.values():
            conditions = job.setdefault("status", {}).setdefault("conditions", [])
            conditions[:] = [item for item in conditions if item["type"] != kind]
            conditions.append({"type": kind, "status": status, "reason": kind, "message": message})

    def warn(self, name: str, reason: str, message: str, age_s: int = 0) -> None:
        """Let a controller warn of an object of that name."""
        at = (datetime.now(UTC) - timedelta(seconds=age_s)).isoformat()
        about = {"name": name, "namespace": "opensora"}
        self.events.append({"metadata": {"name": f"{name}.{len(self.events)}"}, "involvedObject": about})
        self.events[-1] |= {"type": "Warning", "reason": reason, "message": message, "lastTimestamp": at}

    def unplaced(self, node: int, message: str) -> None:
        """Add the pod of a node that the scheduler finds no place for."""
        self.pod(node)
        status = self.pods[-1]["status"] = {"phase": "Pending"}
        status["conditions"] = [
            {"type": "PodScheduled", "status": "False", "reason": "Unschedulable", "message": message}
        ]

    def pod(self, node: int, state: dict[str, Any] | None = None) -> None:
        """Add or change the pod of a node."""
        name = f"job-node-0-{node}"
        self.pods[:] = [pod for pod in self.pods if pod["metadata"]["name"] != name]
        self.pods.append(
            {
                "metadata": {
                    "name": name,
                    "creationTimestamp": START.isoformat(),
                    "labels": {"batch.kubernetes.io/job-completion-index": str(node)},
                },
                "spec": {"containers": [{"name": "node"}]},
                "status": {
                    "phase": "Running",
                    "containerStatuses": [
                        {
                            "name": "node",
                            "image": "",
                            "imageID": "",
                            "ready": True,
                            "restartCount": 0,
                            "state": state or {"running": {}},
                        }
                    ],
                },
            }
        )

    def log(self, node: int, *lines: str) -> None:
        """Append to a pod's log, a second a line."""
        log = self.logs.setdefault(f"job-node-0-{node}", [])
        for line in lines:
            stamp = (START + timedelta(seconds=len(log))).strftime("%Y-%m-%dT%H:%M:%S.%f000Z")
            log.append((stamp, line))


def kubeconfig(folder: Path, url: str) -> Path:
    """A file by which the `kubernetes` package finds the API."""
    account = {
        "apiVersion": "v1",
        "kind": "Config",
        "current-context": "fake",
        "clusters": [{"name": "fake", "cluster": {"server": url}}],
        "users": [{"name": "fake", "user": {"token": "secret"}}],
        "contexts": [{"name": "fake", "context": {"cluster": "fake", "user": "fake"}}],
    }
    path = folder / "kubeconfig"
    path.write_text(json.dumps(account))
    return path


def exited(code: int, second: int = 0, reason: str = "Error") -> dict[str, Any]:
    """State of a container that ended."""
    finished = (START + timedelta(seconds=second)).isoformat()
    return {"terminated": {"exitCode": code, "reason": reason, "finishedAt": finished}}


@contextmanager
def serve(cluster: FakeCluster) -> Iterator[str]:
    """The API's URL."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True  # header and body are sent apart: 40 ms an answer

        def log_message(self, *_: object) -> None:
            pass

        def _answer(self, status: int, body: object) -> None:
            data = body.encode() if isinstance(body, str) else json.dumps(body).encode()
            self.send_response(status)
            self.send_header("Content-Type", "text/plain" if isinstance(body, str) else "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def _refuse(self, status: int, message: str) -> None:
            self._answer(status, {"kind": "Status", "message": message, "code": status})

        def _fails(self) -> bool:
            if not cluster.failures:
                return False
            status = cluster.failures.pop(0)
            if status:
                self._refuse(status, "try later")
            else:
                self.close_connection = True
                self.connection.close()
            return True

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            if self._fails():
                return
            name = body["metadata"]["name"]
            cluster.calls.append(f"create {name}")
            if cluster.refuse:
                self._refuse(*cluster.refuse)
            elif name in cluster.jobs:
                self._refuse(409, f"trainjobs {name} already exists")
            else:
                body["metadata"] |= {"uid": f"uid of {name}", "creationTimestamp": cluster.created.isoformat()}
                cluster.jobs[name] = body
                self._answer(201, body)

        def do_PATCH(self) -> None:
            patch = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            assert self.headers["Content-Type"] == "application/merge-patch+json"
            name = JOBS.match(urlparse(self.path).path).group(1)
            cluster.calls.append(f"patch {name}")
            if cluster.refuse:
                self._refuse(*cluster.refuse)
                return
            cluster.jobs[name]["metadata"] |= patch["metadata"]
            self._answer(200, cluster.jobs[name])

        def do_DELETE(self) -> None:
            if length := int(self.headers.get("Content-Length") or 0):
                self.rfile.read(length)
            name = JOBS.match(urlparse(self.path).path).group(1)
            cluster.calls.append(f"delete {name}")
            if cluster.refuse:
                self._refuse(*cluster.refuse)
            elif cluster.jobs.pop(name, None) is None:
                self._refuse(404, f"{name} not found")
            else:
                self._answer(200, {"kind": "Status", "status": "Success"})

        def do_GET(self) -> None:
            if self._fails():
                return
            address = urlparse(self.path)
            query = {name: values[0] for name, values in parse_qs(address.query).items()}
            if (found := JOBS.match(address.path)) and found.group(1):
                if cluster.steps:
                    cluster.steps.pop(0)(cluster)
                job = cluster.jobs.get(found.group(1))
                self._answer(200, job) if job else self._refuse(404, "not found")
            elif found:
                label, _, value = query["labelSelector"].partition("=")
                jobs = [job for job in cluster.jobs.values() if job["metadata"]["labels"].get(label) == value]
                self._answer(200, {"items": jobs})
            elif found := PODS.match(address.path):
                if found.group(1):
                    lines = cluster.logs.get(found.group(1), [])[-int(query.get("tailLines", 0)) :]
                    self._answer(200, "".join(f"{stamp} {words}\n" for stamp, words in lines))
                else:
                    self._answer(200, {"kind": "PodList", "apiVersion": "v1", "items": cluster.pods})
            elif address.path.endswith("/namespaces/opensora/events"):
                chosen = dict(part.split("=") for part in query["fieldSelector"].split(","))
                events = [
                    event
                    for event in cluster.events
                    if (event["involvedObject"]["name"], event["type"])
                    == (chosen["involvedObject.name"], chosen["type"])
                ]
                self._answer(200, {"kind": "EventList", "apiVersion": "v1", "items": events})
            elif address.path.endswith("/namespaces/opensora/workloads"):
                uids = [job["metadata"].get("uid") for job in cluster.jobs.values()]
                there = query["labelSelector"].removeprefix("kueue.x-k8s.io/job-uid=") in uids
                conditions = [
                    {"type": kind, "status": "False", "message": message} for kind, message in cluster.workload.items()
                ]
                self._answer(200, {"items": [{"status": {"conditions": conditions}}] if there else []})
            elif address.path.endswith("/localqueues/opensora"):
                self._answer(200, {"spec": {"clusterQueue": "opensora"}})
            elif address.path.endswith("/clusterqueues/opensora"):
                small = {"name": "cpu", "resources": [{"name": name, "nominalQuota": "0"} for name in cluster.quota]}
                resources = [{"name": name, "nominalQuota": value} for name, value in cluster.quota.items()]
                flavors = [small, {"name": "h800", "resources": resources}]
                self._answer(200, {"spec": {"resourceGroups": [{"flavors": flavors}]}})
            elif address.path.endswith("/clustertrainingruntimes/opensora"):
                pod = {"spec": {"containers": [{"name": "node", "resources": {"limits": cluster.requests}}]}}
                jobs = [{"name": "node", "template": {"spec": {"template": pod}}}]
                self._answer(200, {"spec": {"template": {"spec": {"replicatedJobs": jobs}}}})
            else:
                self._refuse(404, f"no {address.path}")

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
