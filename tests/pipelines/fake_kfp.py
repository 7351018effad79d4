"""The part of a Kubeflow Pipelines API that the command line talks to, over HTTP on loopback."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from tests.json_server import Request, serve

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

    def answer(request: Request) -> tuple[int, dict]:
        fake.calls.append(f"{request.method} {request.path}")
        shown = request.headers.get("Authorization", "")
        fake.tokens.add(shown)
        if fake.token and shown != f"Bearer {fake.token}":
            return 401, {"message": "unauthenticated"}
        return fake.answer(request.method, request.path, request.query, request.body)

    with serve(answer) as url:
        yield url
