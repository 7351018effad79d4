"""The part of a Kubeflow Pipelines API that the command line talks to, over HTTP on loopback."""

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, urlparse

API = "/apis/v2beta1"


@dataclass
class FakeKfp:
    """Its experiments and runs, and what it was asked."""

    token: str = ""  # that it wants; empty: none
    experiments: dict[str, dict] = field(default_factory=dict)
    runs: dict[str, dict] = field(default_factory=dict)
    calls: list[str] = field(default_factory=list)
    tokens: set[str] = field(default_factory=set)  # Authorization headers that came

    def answer(self, method: str, path: str, query: dict[str, list[str]], body: dict) -> tuple[int, dict]:
        """Status and document."""
        if path == f"{API}/healthz":
            return 200, {"multi_user": True}
        if path == f"{API}/experiments" and method == "GET":
            wanted = json.loads(query["filter"][0])["predicates"][0]["stringValue"]
            found = [value for name, value in self.experiments.items() if name == wanted]
            return 200, {"experiments": found}
        if path == f"{API}/experiments":
            made = body | {"experiment_id": f"experiment-{len(self.experiments)}"}
            self.experiments[body["display_name"]] = made
            return 200, made
        if path == f"{API}/runs":
            made = body | {"run_id": f"run-{len(self.runs)}", "state": "RUNNING"}
            self.runs[made["run_id"]] = made
            return 200, made
        run_id, _, verb = path.removeprefix(f"{API}/runs/").partition(":")
        if run_id not in self.runs:
            return 404, {"error": "Not found", "message": f"Run {run_id} not found", "code": 5}
        if verb == "terminate":
            self.runs[run_id]["state"] = "CANCELING"
            return 200, {}
        return 200, self.runs[run_id]


@contextmanager
def serve_kfp(fake: FakeKfp) -> Iterator[str]:
    """The API's URL."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: object) -> None:
            pass

        def _handle(self) -> None:
            address = urlparse(self.path)
            body = json.loads(self.rfile.read(int(self.headers.get("Content-Length") or 0)) or b"{}")
            fake.calls.append(f"{self.command} {address.path}")
            fake.tokens.add(self.headers.get("Authorization", ""))
            if fake.token and self.headers.get("Authorization") != f"Bearer {fake.token}":
                status, said = 401, {"message": "unauthenticated"}
            else:
                status, said = fake.answer(self.command, address.path, parse_qs(address.query), body)
            data = json.dumps(said).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        do_GET = do_POST = _handle

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
