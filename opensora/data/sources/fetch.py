"""One file over HTTP: taken up where it broke, whole or not at all under its name, never from a private address."""

import errno
import ipaddress
import json
import os
import random
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit, urlunsplit

from opensora.config import DownloadConfig

BLOCK = 1 << 17  # bytes read at once
BACK_OFF_S = 0.5  # before the second try; doubles, and a random half of it is left out
MAX_BACK_OFF_S = 60.0
AGAIN = {408, 425, 429}  # the 4xx that another try may mend
VALIDATORS = ".http.json"  # beside a file: what its server said it was
SURE_S = 2.0  # between a file's change and its answer, for the change to tell versions apart
MIB = 1 << 20


class DownloadError(RuntimeError):
    """One file could not be brought; the message is the recorded reason."""


class _Again(Exception):
    """This try failed and another may not."""

    def __init__(self, message: str, wait_s: float = 0.0) -> None:
        super().__init__(message)
        self.wait_s = wait_s


@dataclass(frozen=True)
class _Version:
    """Which version of a file its server gave, by its ETag and Last-Modified."""

    etag: str = ""
    modified: str = ""

    @classmethod
    def read(cls, path: Path) -> "_Version":
        try:
            return cls(**json.loads(path.read_text()))
        except (OSError, ValueError, TypeError):
            return cls()

    @classmethod
    def of(cls, headers: Mapping[str, str]) -> "_Version":
        """From an answer; a Last-Modified of this very moment says nothing: the file may change in its second."""
        modified = headers.get("Last-Modified", "")
        if _time(headers.get("Date", "")) - _time(modified) < SURE_S:
            modified = ""
        return cls(headers.get("ETag", ""), modified)

    @property
    def strong(self) -> str:
        """What a range may be asked for with; a weak ETag does not promise the same bytes (RFC 9110, 13.1.5)."""
        return self.etag if self.etag and not self.etag.startswith("W/") else self.modified


def fetch(url: str, target: Path, config: DownloadConfig) -> bool:
    """Bring `url` to `target`; a file that is there is asked for anew only if it changed. Says whether it was brought.

    A cut connection is taken up where it broke (`.part`, Range, If-Range; RFC 9110), if the server can. A try that
    brings nothing new counts against `config.retries`; all of them together have `config.file_timeout_s`.

    Raises:
        DownloadError: "refused: …", "dead link: …", "too large: …" or "download failed: …".
        OSError: the disk is full.
    """
    deadline = time.monotonic() + config.file_timeout_s
    part = target.with_name(target.name + ".part")
    tries, most = 0, -1
    while True:
        try:
            return _try(url, target, part, config, deadline)
        except (OSError, _Again) as error:  # requests' own errors are OSErrors
            if isinstance(error, OSError) and error.errno == errno.ENOSPC:
                raise
            have = part.stat().st_size if part.is_file() else 0
            tries = 0 if have > most >= 0 else tries + 1
            most = max(most, have)
            wait = min(MAX_BACK_OFF_S, BACK_OFF_S * 2**tries) * random.uniform(0.5, 1.0)
            wait = max(wait, error.wait_s if isinstance(error, _Again) else 0.0)
            if tries > config.retries or time.monotonic() + wait > deadline:
                raise DownloadError(f"download failed: {without_secrets(str(error), url)}") from None
            time.sleep(wait)


def _try(url: str, target: Path, part: Path, config: DownloadConfig, deadline: float) -> bool:
    begun, done = part.with_name(part.name + VALIDATORS), target.with_name(target.name + VALIDATORS)
    have, headers = _what_to_ask(target, part, _Version.read(begun), _Version.read(done))
    with (
        open_session(config.allow_private_hosts) as session,
        session.get(url, headers=headers, stream=True, timeout=config.timeout_s) as answer,
    ):
        if answer.status_code == 304:
            return False
        if answer.status_code == 416:
            part.unlink(missing_ok=True)
            raise _Again("the server refused the range; starting over")
        _check_status(answer.status_code, answer.headers)
        if answer.status_code != 206:
            have = 0
        begun.write_text(json.dumps(asdict(_Version.of(answer.headers))))
        length = answer.headers.get("Content-Length", "")
        expected = have + int(length) if length.isdigit() else None
        if (expected or 0) > config.max_mib * MIB:
            raise DownloadError(f"too large: {(expected or 0) >> 20} MiB, the limit is {config.max_mib}")
        size = _receive(answer, part, have, config, deadline)
    if expected is not None and size != expected:
        raise _Again(f"the connection ended after {size} of {expected} bytes")
    part.replace(target)
    begun.replace(done)
    return True


def _what_to_ask(target: Path, part: Path, begun: _Version, done: _Version) -> tuple[int, dict[str, str]]:
    """Bytes that need not come again, and the request's headers."""
    headers = {"Accept-Encoding": "identity"}
    have = part.stat().st_size if part.is_file() and begun.strong else 0
    if have:
        return have, headers | {"Range": f"bytes={have}-", "If-Range": begun.strong}
    if target.is_file():
        conditions = {"If-None-Match": done.etag, "If-Modified-Since": done.modified}
        headers |= {name: value for name, value in conditions.items() if value}
    return 0, headers


def _check_status(code: int, headers: Mapping[str, str]) -> None:
    if 400 <= code < 500 and code not in AGAIN:
        raise DownloadError(f"dead link: HTTP {code}")
    if code >= 400:
        raise _Again(f"HTTP {code}", _retry_after(headers.get("Retry-After", "")))


def _retry_after(value: str) -> float:
    """Seconds to wait: the header holds a number of them or a date."""
    return float(value) if value.isdigit() else max(0.0, _time(value) - time.time())


def _time(value: str) -> float:
    """Seconds since 1970 of a date as HTTP writes it; 0 for anything else."""
    try:
        return parsedate_to_datetime(value).timestamp()
    except (TypeError, ValueError):
        return 0.0


def _receive(answer: Any, part: Path, have: int, config: DownloadConfig, deadline: float) -> int:
    """Append the body to `part` and sync it; the bytes that it has now."""
    with part.open("ab" if have else "wb") as handle:
        for block in answer.iter_content(BLOCK):
            handle.write(block)
            if handle.tell() > config.max_mib * MIB:
                raise DownloadError(f"too large: more than {config.max_mib} MiB")
            if time.monotonic() > deadline:
                raise DownloadError(f"download failed: not done after {config.file_timeout_s:g} s")
        handle.flush()
        os.fsync(handle.fileno())
        return handle.tell()


def open_session(allow_private: bool) -> Any:
    """A session of requests that does not talk to private addresses, unless it may.

    The address is looked at when the connection stands, before a byte is sent: so every redirect is checked, and a
    name that resolves to another address the second time gains nothing. Through a proxy the proxy's address counts.
    """
    import requests
    from requests.adapters import HTTPAdapter

    session = requests.Session()
    if allow_private:
        return session

    class PublicOnly(HTTPAdapter):
        def init_poolmanager(self, *args: Any, **kwargs: Any) -> None:
            super().init_poolmanager(*args, **kwargs)
            self.poolmanager.pool_classes_by_scheme = _public_pools()

    for scheme in ("http://", "https://"):
        session.mount(scheme, PublicOnly())
    return session


def _public_pools() -> dict[str, Any]:
    """Pools of urllib3 whose connections refuse private addresses."""
    from urllib3 import HTTPConnectionPool, HTTPSConnectionPool
    from urllib3.connection import HTTPConnection, HTTPSConnection

    class Public(HTTPConnection):
        def _new_conn(self) -> Any:
            return _checked(super()._new_conn(), self.host)

    class PublicSecure(HTTPSConnection):
        def _new_conn(self) -> Any:
            return _checked(super()._new_conn(), self.host)

    plain = type("PublicPool", (HTTPConnectionPool,), {"ConnectionCls": Public})
    secure = type("PublicSecurePool", (HTTPSConnectionPool,), {"ConnectionCls": PublicSecure})
    return {"http": plain, "https": secure}


def _checked(connection: Any, host: str) -> Any:
    address = str(connection.getpeername()[0])
    if is_public(address):
        return connection
    connection.close()
    raise DownloadError(f"refused: {host} is a private address; set download.allow_private_hosts to allow it")


def is_public(address: str) -> bool:
    """Whether an IP address is one of the open internet; an IPv4 address inside an IPv6 one counts as itself."""
    parsed = ipaddress.ip_address(address.partition("%")[0])
    mapped = getattr(parsed, "ipv4_mapped", None)
    return (mapped or parsed).is_global and not parsed.is_multicast


def public_url(url: str) -> str:
    """A URL as it may stand in a manifest: without user and password, and without a signature in its query."""
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https"):
        return url
    query = "&".join(item for item in parts.query.split("&") if not _is_secret(item.partition("=")[0]))
    return urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, query, ""))


def _is_secret(name: str) -> bool:
    """Whether a query's field signs the request: S3's, Google's and Azure's ways, and the usual names."""
    name = name.lower()
    return name.startswith(("x-amz-", "x-goog-")) or name in {
        *("signature", "sig", "token", "access_token", "key", "api_key", "apikey", "awsaccesskeyid", "policy"),
        *("key-pair-id", "password", "auth"),
    }


def without_secrets(message: str, url: str) -> str:
    """An error's text with the URL in it as `public_url` gives it."""
    parts = urlsplit(url)
    hidden = message.replace(url, public_url(url))
    if parts.query:
        hidden = hidden.replace(f"{parts.path}?{parts.query}", urlsplit(public_url(url)).path)
    return hidden.replace(f"{parts.password}", "…") if parts.password else hidden
