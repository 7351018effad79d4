"""Private addresses: refused at every hop, and behind a proxy too."""

import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from opensora.config import DownloadConfig
from opensora.data.sources.addresses import RefusedError, is_public, open_session
from opensora.data.sources.fetch import fetch
from opensora.data.sources.partial import DownloadError
from tests.data.file_server import FileServer, file_server

PUBLIC = "93.184.215.14"


@pytest.fixture
def server() -> Iterator[FileServer]:
    with file_server() as running:
        running.files["/a.mp4"] = b"data"
        yield running


@pytest.mark.parametrize(
    ("address", "public"),
    [
        ("8.8.8.8", True),
        ("10.0.0.1", False),
        ("127.0.0.1", False),
        ("169.254.169.254", False),
        ("::1", False),
        ("::ffff:10.0.0.1", False),
        ("2606:4700:4700::1111", True),
        ("fe80::1%eth0", False),
        ("224.0.0.1", False),
        ("0.0.0.0", False),
        ("100.64.0.1", False),
    ],
)
def test_which_addresses_are_public(address: str, public: bool) -> None:
    assert is_public(address) == public


def test_every_hop_is_checked(server: FileServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One host counts as public here, and sends on to one that is private: the second is not asked."""
    with file_server() as private:
        private.files["/secret"] = b"secret"
        server.redirects["/away"] = f"{private.url}/secret"
        port = int(server.url.rpartition(":")[2])
        monkeypatch.setattr("opensora.data.sources.addresses._checked", _pass(port))
        config = DownloadConfig(retries=0, timeout_s=30)
        assert fetch(f"{server.url}/a.mp4", tmp_path / "a", config)
        with pytest.raises(DownloadError, match=r"^refused: 127\.0\.0\.1 is a private address"):
            fetch(f"{server.url}/away", tmp_path / "b", config)
        assert len(server.asked("/away")) == 1
        assert private.log == []


def _pass(port: int) -> object:
    from opensora.data.sources import addresses

    check = addresses._checked

    def passing(connection: socket.socket, host: str) -> socket.socket:
        return connection if connection.getpeername()[1] == port else check(connection, host)

    return passing


def test_private_addresses_are_refused_before_a_byte_is_sent(server: FileServer, tmp_path: Path) -> None:
    for url in (server.url, server.url.replace("127.0.0.1", "localhost"), server.url.replace("127.0.0.1", "0x7f.1")):
        with pytest.raises(DownloadError, match=r"^refused: "):
            fetch(f"{url}/a.mp4", tmp_path / "a", DownloadConfig(retries=0, timeout_s=30))
    assert server.log == []
    assert fetch(f"{server.url}/a.mp4", tmp_path / "a", DownloadConfig(allow_private_hosts=True))


@pytest.fixture
def proxy(server: FileServer, monkeypatch: pytest.MonkeyPatch) -> FileServer:
    """The environment names the server as a proxy: it is asked for whole URLs."""
    for name in ("http_proxy", "https_proxy", "all_proxy", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    monkeypatch.setenv("http_proxy", server.url)
    return server


def test_a_proxy_of_the_environment_does_not_get_round_the_check(
    proxy: FileServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = {"public.example": PUBLIC, "private.example": "10.1.2.3"}

    def resolve(host: str, *rest: object, **more: object) -> list:
        if host in names:
            return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (names[host], 0))]
        if host == "unknown.example":
            raise socket.gaierror(-2, "Name or service not known")
        return original(host, *rest, **more)

    original = socket.getaddrinfo
    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    proxy.files["http://public.example/a.mp4"] = b"by proxy"
    proxy.redirects["http://public.example/away"] = "http://169.254.169.254/latest"
    with open_session(False) as session:
        assert session.get("http://public.example/a.mp4", timeout=30).content == b"by proxy"
        for url in ("http://10.0.0.1/a", "http://private.example/a", "http://public.example/away"):
            with pytest.raises(RefusedError, match="is a private address"):
                session.get(url, timeout=30)
        with pytest.raises(RefusedError, match="leave the check to the proxy"):
            session.get("http://unknown.example/a", timeout=30)
    assert [request.path for request in proxy.log] == ["http://public.example/a.mp4", "http://public.example/away"]
    with open_session(True) as session:
        assert session.get("http://private.example/a", timeout=30).status_code == 404
