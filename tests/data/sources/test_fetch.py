"""One file over HTTP: resumed where it broke, whole or absent, and never from a private address."""

import errno
import os
import threading
from collections.abc import Iterator
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from opensora.config import DownloadConfig
from opensora.data.sources import fetch as module
from opensora.data.sources.fetch import fetch
from opensora.data.sources.partial import DownloadError, Partial
from tests.small_disk import small_disk

CONTENT = bytes(range(256)) * 4000
CONFIG = DownloadConfig(allow_private_hosts=True, retries=2, timeout_s=5)


class Cutting(BaseHTTPRequestHandler):
    """Ends every connection after 300,000 bytes; honours ranges when `ranges` is set."""

    requests: list[str | None] = []  # noqa: RUF012 (one server a test)
    ranges = True
    etag = '"one"'
    busy = 0  # answers of 429 before the first of 200
    shift = 0  # bytes by which a range starts too early
    closing = threading.Event()
    drop = 1  # bytes that drip at once

    def do_GET(self) -> None:
        if self.path == "/missing":
            self.send_error(404)
            return
        if self.path == "/drip":
            self.drip()
            return
        wanted = self.headers.get("Range")
        self.requests.append(wanted)
        if Cutting.busy:
            Cutting.busy -= 1
            self.send_response(429)
            self.send_header("Retry-After", "0")
            self.end_headers()
            return
        if self.headers.get("If-None-Match") == self.etag:
            self.send_response(304)
            self.end_headers()
            return
        resumes = wanted and self.ranges and self.headers.get("If-Range") == self.etag
        start = int(str(wanted).removeprefix("bytes=").rstrip("-")) if resumes else 0
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(CONTENT) - start))
        self.send_header("ETag", self.etag)
        if start:
            self.send_header("Content-Range", f"bytes {start - self.shift}-{len(CONTENT) - 1}/{len(CONTENT)}")
        self.end_headers()
        self.wfile.write(CONTENT[start : start + 300_000])

    def drip(self) -> None:
        """A byte now and then, without end and without saying how many: none of the pauses is a timeout."""
        self.send_response(200)
        self.end_headers()
        with suppress(OSError):
            while not Cutting.closing.wait(0.02):
                self.wfile.write(b"x" * Cutting.drop)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.setattr(module, "BACK_OFF_S", 0.0)
    Cutting.requests, Cutting.ranges, Cutting.etag, Cutting.busy, Cutting.shift = [], True, '"one"', 0, 0
    Cutting.closing.clear()
    server = ThreadingHTTPServer(("127.0.0.1", 0), Cutting)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    Cutting.closing.set()
    server.shutdown()


def test_a_cut_connection_goes_on_where_it_broke(server: str, tmp_path: Path) -> None:
    assert fetch(f"{server}/x", tmp_path / "x", CONFIG)
    assert (tmp_path / "x").read_bytes() == CONTENT
    starts = [int(wanted[6:-1]) for wanted in Cutting.requests[1:] if wanted]
    assert Cutting.requests[0] is None
    assert len(starts) >= 3  # more than the retries: a try that brings something costs none
    assert starts == sorted(set(starts))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["x", "x.version.json"]


def test_what_is_there_and_unchanged_is_not_brought_again(server: str, tmp_path: Path) -> None:
    fetch(f"{server}/x", tmp_path / "x", CONFIG)
    assert not fetch(f"{server}/x", tmp_path / "x", CONFIG)
    Cutting.etag = '"two"'
    assert fetch(f"{server}/x", tmp_path / "x", CONFIG)


def test_a_part_of_another_version_is_started_over(server: str, tmp_path: Path) -> None:
    (tmp_path / "x.part").write_bytes(b"old" * 1000)
    (tmp_path / "x.part.version.json").write_text('{"etag": "\\"zero\\"", "modified": ""}')
    fetch(f"{server}/x", tmp_path / "x", CONFIG)
    assert (tmp_path / "x").read_bytes() == CONTENT


def test_without_ranges_nothing_half_stands_under_the_name(server: str, tmp_path: Path) -> None:
    Cutting.ranges = False
    with pytest.raises(DownloadError, match="download failed"):
        fetch(f"{server}/x", tmp_path / "x", CONFIG)
    assert not (tmp_path / "x").exists()


def test_a_busy_server_is_asked_again_and_a_dead_link_is_not(server: str, tmp_path: Path) -> None:
    Cutting.busy = 2
    fetch(f"{server}/x", tmp_path / "x", CONFIG)
    with pytest.raises(DownloadError, match="dead link: HTTP 404"):
        fetch(f"{server}/missing", tmp_path / "y", CONFIG)


def test_a_dead_server_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "BACK_OFF_S", 0.0)
    with pytest.raises(DownloadError, match="download failed"):
        fetch("http://127.0.0.1:9/x", tmp_path / "x", CONFIG)


def test_a_server_that_drips_does_not_outlast_the_limit(server: str, tmp_path: Path) -> None:
    with pytest.raises(DownloadError, match=r"^download failed: not done after 1 s"):
        fetch(f"{server}/drip", tmp_path / "x", CONFIG.model_copy(update={"file_timeout_s": 1.0}))
    assert (tmp_path / "x.part").stat().st_size < 10_000
    assert not (tmp_path / "x").exists()


def test_a_file_without_end_is_left_at_the_limit(server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Cutting, "drop", 200_000)
    with pytest.raises(DownloadError, match=r"^too large: more than 1 MiB"):
        fetch(f"{server}/drip", tmp_path / "x", CONFIG.model_copy(update={"max_mib": 1}))
    assert (tmp_path / "x.part").stat().st_size < (1 << 20) + 400_000


def test_bytes_of_another_place_are_not_taken(server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A server that answers with another range than the one asked for: start over, and never mix."""
    monkeypatch.setattr(Cutting, "shift", 7)
    with pytest.raises(DownloadError, match=r"sent bytes 299993-.* for the bytes from 300000; starting over"):
        fetch(f"{server}/x", tmp_path / "x", CONFIG.model_copy(update={"retries": 1}))
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EROFS])
def test_a_disk_that_takes_nothing_is_no_bad_download(
    number: int, server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(Partial, "append", refuse)
    with pytest.raises(OSError, match=os.strerror(number)) as caught:
        fetch(f"{server}/x", tmp_path / "x", CONFIG)
    assert caught.value.errno == number
    assert len(Cutting.requests) == 1  # no other try


def test_a_full_disk_is_told_and_what_came_stays(server: str, tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", "128k") as disk:
        with pytest.raises(OSError, match="No space left") as caught:
            fetch(f"{server}/x", disk / "x", CONFIG)
        assert caught.value.errno == errno.ENOSPC
        assert not (disk / "x").exists()
