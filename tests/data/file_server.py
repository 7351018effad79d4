"""A server of files on loopback: ranges and ETags as RFC 9110 has them, redirects, a hold in the middle, and a log."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from hashlib import sha256
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote


@dataclass
class Asked:
    """One request and what it was answered."""

    path: str
    headers: dict[str, str]  # by lower-case name
    status: int = 0
    sent: int = 0  # bytes of the body


@dataclass
class FileServer:
    """What the server gives, which a test may change, and what it was asked."""

    files: dict[str, bytes] = field(default_factory=dict)  # by path, as in "/a.mp4"
    redirects: dict[str, str] = field(default_factory=dict)  # path to location
    hold: dict[str, int] = field(default_factory=dict)  # at this byte of the file it waits for `go_on`
    go_on: threading.Event = field(default_factory=threading.Event)
    log: list[Asked] = field(default_factory=list)
    url: str = ""

    def asked(self, path: str) -> list[Asked]:
        """The requests for a path."""
        return [request for request in self.log if request.path == path]


def etag(data: bytes) -> str:
    """The ETag that the server gives to a content."""
    return f'"{sha256(data).hexdigest()[:16]}"'


@contextmanager
def file_server() -> Iterator[FileServer]:
    """A running server."""
    state = FileServer()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            path = unquote(self.path)
            asked = Asked(path, {name.lower(): value for name, value in self.headers.items()})
            state.log.append(asked)
            if path in state.redirects:
                self.answer(asked, 302, {"Location": state.redirects[path]})
            elif path not in state.files:
                self.answer(asked, 404, {})
            else:
                self.give(asked, state.files[path])

        do_HEAD = do_GET

        def give(self, asked: Asked, data: bytes) -> None:
            tag, start = etag(data), 0
            if self.headers.get("If-None-Match") == tag:
                self.answer(asked, 304, {"ETag": tag})
                return
            wanted = self.headers.get("Range", "")
            if wanted and self.headers.get("If-Range", tag) == tag:
                start = int(wanted.removeprefix("bytes=").partition("-")[0])
            if start >= len(data) > 0:
                self.answer(asked, 416, {})
                return
            head = {"ETag": tag, "Accept-Ranges": "bytes"}
            if start:
                head["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
            self.answer(asked, 206 if start else 200, head, data[start:], start)

        def answer(self, asked: Asked, status: int, headers: dict[str, str], body: bytes = b"", start: int = 0) -> None:
            asked.status = status
            self.send_response(status)
            for name, value in (headers | {"Content-Length": str(len(body))}).items():
                self.send_header(name, value)
            self.end_headers()
            if self.command == "HEAD":
                return
            stop = max(0, state.hold.get(asked.path, start + len(body)) - start)
            try:
                self.wfile.write(body[:stop])
                self.wfile.flush()
                asked.sent = len(body[:stop])
                if stop < len(body):
                    state.go_on.wait(120)
                    self.wfile.write(body[stop:])
                    asked.sent = len(body)
            except OSError:  # the client is gone
                self.close_connection = True

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    state.url = f"http://127.0.0.1:{server.server_address[1]}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield state
    finally:
        state.go_on.set()
        server.shutdown()
        server.server_close()
