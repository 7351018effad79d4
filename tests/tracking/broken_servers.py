"""Servers with the troubles that networks and servers have: they hang, answer errors, or lose an answer."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.error import HTTPError
from urllib.parse import urlsplit
from urllib.request import Request, urlopen

LIMIT_S = 60.0


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    reply: Callable[["_Handler", bytes], None]

    def _answer(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        type(self).reply(self, body)

    do_GET = do_POST = do_PUT = do_PATCH = do_DELETE = _answer

    def send(self, status: int, body: bytes, kind: str = "application/json") -> None:
        """A whole answer."""
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


@contextmanager
def serve(reply: Callable[[_Handler, bytes], None]) -> Iterator[str]:
    """A server whose every request `reply` answers; yields its address."""
    handler = type("Handler", (_Handler,), {"reply": staticmethod(reply)})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()


@contextmanager
def answering(status: int) -> Iterator[str]:
    """A server that answers every request with that status and a page that is not JSON."""
    with serve(lambda handler, body: handler.send(status, b"<html>no</html>", "text/html")) as address:
        yield address


@contextmanager
def hanging() -> Iterator[str]:
    """A server that accepts and never answers."""
    released = threading.Event()

    def wait(handler: _Handler, body: bytes) -> None:
        released.wait(LIMIT_S)

    with serve(wait) as address:
        try:
            yield address
        finally:
            released.set()


@contextmanager
def losing_answers(behind: str, lost: list[str]) -> Iterator[str]:
    """A proxy of the server at `behind` that does what it is asked, and loses its first answer to each kind of change.

    Args:
        lost: receives the kinds, method and path without ids.
    """

    def reply(handler: _Handler, body: bytes) -> None:
        headers = {name: value for name, value in handler.headers.items() if name.lower() != "host"}
        request = Request(behind + handler.path, body or None, headers, method=handler.command)
        try:
            with urlopen(request, timeout=LIMIT_S) as answer:
                status, content, kind = answer.status, answer.read(), answer.headers.get("Content-Type", "")
        except HTTPError as error:
            status, content, kind = error.code, error.read(), error.headers.get("Content-Type", "")
        path = urlsplit(handler.path).path
        change = f"{handler.command} {path if 'artifacts/' not in path and '/m-' not in path else path[:30]}"
        if handler.command != "GET" and "search" not in path and change not in lost:
            lost.append(change)
            handler.close_connection = True  # nothing is sent
            return
        handler.send(status, content, kind)

    with serve(reply) as address:
        yield address
