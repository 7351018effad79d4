"""One file over HTTP: taken up where it broke, whole or not at all under its name, never from a private address."""

import random
import re
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from opensora.config import DownloadConfig
from opensora.data.retry_after import read_date, read_retry_after
from opensora.data.sources.addresses import RefusedError, open_session
from opensora.data.sources.partial import BLOCK, DownloadError, Partial, Version, check_size
from opensora.data.sources.uri import without_secrets
from opensora.step import UNWRITABLE

BACK_OFF_S = 0.5  # before the second try; doubles, and a random half of it is left out
MAX_BACK_OFF_S = 60.0
AGAIN = {408, 425, 429}  # the 4xx that another try may mend
SURE_S = 2.0  # between a file's change and its answer, for the change to tell versions apart
CONTENT_RANGE = re.compile(r"bytes (\d+)-")


class _Again(Exception):
    """This try failed and another may not."""

    def __init__(self, message: str, wait_s: float = 0.0) -> None:
        super().__init__(message)
        self.wait_s = wait_s


def fetch(
    url: str,
    target: Path,
    config: DownloadConfig,
    stopped: threading.Event | None = None,
    headers: Mapping[str, str] | None = None,
) -> bool:
    """Bring `url` to `target`; a file that is there is asked for anew only if it changed. Says whether it was brought.

    A cut connection is taken up where it broke (`.part`, Range, If-Range; RFC 9110), if the server can. A try that
    brings nothing new counts against `config.retries`; all of them together have `config.file_timeout_s`.

    Args:
        stopped: set by another thread to end this one early, with what is here left for the next run.
        headers: more of them, such as Authorization, which a redirect to another host does not get.

    Raises:
        DownloadError: "refused: …", "dead link: …", "too large: …" or "download failed: …".
        OSError: nothing can be written any more (`step.UNWRITABLE`).
    """
    from urllib3.exceptions import HTTPError

    deadline = time.monotonic() + config.file_timeout_s
    file = Partial(target, stopped)
    tries, most = 0, -1
    while True:
        try:
            return _try(url, file, config, headers or {}, deadline)
        except RefusedError as error:
            raise DownloadError(f"refused: {error}") from None
        except (OSError, HTTPError, _Again) as error:  # requests' own errors are OSErrors
            if isinstance(error, OSError) and error.errno in UNWRITABLE:
                raise
            tries = 0 if file.size > most >= 0 else tries + 1
            most = max(most, file.size)
            wait = min(MAX_BACK_OFF_S, BACK_OFF_S * 2**tries) * random.uniform(0.5, 1.0)
            wait = max(wait, error.wait_s if isinstance(error, _Again) else 0.0)
            late = time.monotonic() + wait > deadline
            if tries > config.retries or late or file.stopped.wait(wait):
                raise DownloadError(f"download failed: {without_secrets(str(error), url)}") from None


def _try(url: str, file: Partial, config: DownloadConfig, headers: Mapping[str, str], deadline: float) -> bool:
    have = file.size if _strong(file.version) else 0
    asked = {"Accept-Encoding": "identity"} | dict(headers) | _conditions(file, have)
    with (
        open_session(config.allow_private_hosts) as session,
        session.get(url, headers=asked, stream=True, timeout=config.timeout_s) as answer,
    ):
        if answer.status_code == 304:
            return False
        _check_status(answer.status_code, answer.headers, file)
        if answer.status_code == 206:
            _check_range(answer.headers.get("Content-Range", ""), have, file)
        else:
            have = 0
            file.begin(_version(answer.headers))
        length = answer.headers.get("Content-Length", "")
        expected = have + int(length) if length.isdigit() else None
        check_size(expected or 0, config)
        file.append(_blocks(answer.raw), config, deadline)
    if expected is not None and file.size != expected:
        raise _Again(f"the connection ended after {file.size} of {expected} bytes")
    file.finish()
    return True


def _blocks(raw: Any) -> Iterator[bytes]:
    """The body as it was sent, block by block as it comes: a server that drips must not outlast the time limit."""
    while block := raw.read1(BLOCK, decode_content=False):
        yield block


def _conditions(file: Partial, have: int) -> dict[str, str]:
    """The headers by which only bytes come that are not here yet."""
    if have:
        return {"Range": f"bytes={have}-", "If-Range": _strong(file.version)}
    conditions = {"If-None-Match": file.whole.etag, "If-Modified-Since": file.whole.modified}
    return {name: value for name, value in conditions.items() if value}


def _strong(version: Version) -> str:
    """What a range may be asked for with; a weak ETag does not promise the same bytes (RFC 9110, 13.1.5)."""
    return version.etag if version.etag and not version.etag.startswith("W/") else version.modified


def _version(headers: Mapping[str, str]) -> Version:
    """Of an answer; a Last-Modified of this very moment says nothing: the file may change in its second."""
    modified = headers.get("Last-Modified", "")
    if (read_date(headers.get("Date", "")) or 0.0) - (read_date(modified) or 0.0) < SURE_S:
        modified = ""
    return Version(headers.get("ETag", ""), modified)


def _check_status(code: int, headers: Mapping[str, str], file: Partial) -> None:
    if code == 416:
        file.drop()
        raise _Again("the server refused the range; starting over")
    if 400 <= code < 500 and code not in AGAIN:
        raise DownloadError(f"dead link: HTTP {code}")
    if code >= 400:
        raise _Again(f"HTTP {code}", read_retry_after(headers.get("Retry-After", "")) or 0.0)


def _check_range(content_range: str, have: int, file: Partial) -> None:
    """The bytes must be those after the ones that are here."""
    match = CONTENT_RANGE.match(content_range)
    if match is None or int(match[1]) != have:
        file.drop()
        raise _Again(f"the server sent {content_range or 'no range'} for the bytes from {have}; starting over")
