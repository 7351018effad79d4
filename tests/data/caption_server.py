"""A captioning server with OpenAI's API on loopback: it says what it sees, or what a test's script says."""

import base64
import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from hashlib import sha256
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import cv2
import numpy as np

from opensora.demo.shapes import detect

PROBE_TOKENS = 1  # a trial request asks for so many


@dataclass(frozen=True)
class Request:
    """What the server was sent."""

    body: dict[str, Any]
    headers: dict[str, str]
    pictures: list[np.ndarray]  # uint8 [H, W, 3]
    number: int  # of all requests that are no trial, from 1

    @property
    def clip(self) -> str:
        """The same for the same pictures."""
        return sha256(b"".join(picture.tobytes() for picture in self.pictures)).hexdigest()

    @property
    def is_probe(self) -> bool:
        return self.body["max_tokens"] == PROBE_TOKENS


@dataclass(frozen=True)
class Reply:
    """What a script answers: a status, or a text with the reason why it ends; None hangs up."""

    status: int | None = 200
    text: str | None = ""
    finish: str = "stop"
    headers: dict[str, str] = field(default_factory=dict)
    raw: bytes | None = None  # instead of a chat completion

    def encode(self) -> bytes:
        if self.raw is not None:
            return self.raw
        if self.status != 200:
            return json.dumps({"error": {"message": self.text, "code": self.status}}).encode()
        message = {"role": "assistant", "content": self.text}
        return json.dumps({"choices": [{"index": 0, "message": message, "finish_reason": self.finish}]}).encode()


def see(request: Request) -> str:
    """The caption of what the pictures show, by the embedded world's detector."""
    seen = detect(np.stack(request.pictures))
    return f"a {seen.colour} {seen.shape} moving {seen.direction}"


Script = Callable[[Request], Reply | None]  # None: the server says what it sees


class CaptionServer:
    """Everything that the server saw; `url` is what caption.endpoint takes."""

    def __init__(self, script: Script) -> None:
        self.script = script
        self.requests: list[Request] = []
        self.probes = 0
        self.at_once = self.most_at_once = 0
        self._lock = threading.Lock()
        owner = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                owner._serve(self)

            def log_message(self, *args: object) -> None:
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.http.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.http.server_port}/v1"

    def _serve(self, handler: BaseHTTPRequestHandler) -> None:
        assert handler.path == "/v1/chat/completions"
        body = json.loads(handler.rfile.read(int(handler.headers["Content-Length"])))
        with self._lock:
            request = Request(body, dict(handler.headers), _pictures(body), len(self.requests) + 1)
            if request.is_probe:
                self.probes += 1
            else:
                self.requests.append(request)
                self.at_once += 1
                self.most_at_once = max(self.most_at_once, self.at_once)
        try:
            reply = self.script(request) or Reply(text="" if request.is_probe else see(request))
        finally:
            with self._lock:
                self.at_once -= not request.is_probe
        if reply.status is None:
            handler.close_connection = True
            return
        data = reply.encode()
        try:
            handler.send_response(reply.status)
            for name, value in reply.headers.items():
                handler.send_header(name, value)
            handler.send_header("Content-Length", str(len(data)))
            handler.end_headers()
            handler.wfile.write(data)
        except OSError:  # the client gave up
            handler.close_connection = True

    def asked(self) -> list[str]:
        """The clips of all requests, as often as they came."""
        return [request.clip for request in self.requests]


def _pictures(body: dict[str, Any]) -> list[np.ndarray]:
    """The frames of a request, which come before its text."""
    (message,) = body["messages"]
    *images, text = message["content"]
    assert text["type"] == "text"
    pictures = []
    for image in images:
        head, _, data = image["image_url"]["url"].partition(",")
        assert head == "data:image/jpeg;base64"
        decoded = cv2.imdecode(np.frombuffer(base64.b64decode(data), np.uint8), cv2.IMREAD_COLOR)
        pictures.append(cv2.cvtColor(decoded, cv2.COLOR_BGR2RGB))
    return pictures


@contextmanager
def caption_server(script: Script = lambda request: None) -> Iterator[CaptionServer]:
    """A running server."""
    server = CaptionServer(script)
    thread = threading.Thread(target=server.http.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.http.shutdown()
        server.http.server_close()
        thread.join()
