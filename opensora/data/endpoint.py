"""Captions from a server with OpenAI's API, such as vLLM: many requests at once, and back-off when it is in trouble."""

import base64
import os
import random
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from opensora.config import CaptionConfig
from opensora.data.answers import Answer
from opensora.data.retry_after import read_retry_after
from opensora.step import StepError

if TYPE_CHECKING:
    import numpy as np
    import requests

    from opensora.data.answers import Question

API_KEY = "OPENAI_API_KEY"  # environment variable
CONNECT_S = 10.0
FIRST_PAUSE_S, LONGEST_PAUSE_S = 1.0, 60.0  # the pause doubles from try to try
LONGEST_RETRY_AFTER_S = 600.0  # a server that asks for more is taken at this
JPEG_QUALITY = 90
PROBE_SIDE = 64  # pixels


class ServerError(StepError):
    """The server cannot caption any clip: it is down, or the address, the key or the model is wrong."""


class _Trouble(Exception):
    """A try failed in a way that may pass."""

    def __init__(self, message: str, pause_s: float | None = None, busy: bool = False) -> None:
        super().__init__(message)
        self.pause_s = pause_s  # that the server asked for
        self.busy = busy  # it lives, but has too much to do


class _Rejected(Exception):
    """The server does not take this request, and never will."""


class Endpoint:
    """A captioning server at `caption.endpoint`; the key, if it wants one, is in the environment alone.

    The protocol is that of OpenAI's chat completions with pictures (platform.openai.com/docs/guides/images-vision).

    Raises:
        ServerError: no answer to a trial request.
    """

    def __init__(self, config: CaptionConfig) -> None:
        self.config = config
        self.ahead = 2 * config.threads
        self.url = _check_url(config.endpoint) + "/chat/completions"
        self._key = os.environ.get(API_KEY, "")
        self._local = threading.local()  # sessions are not made for several threads
        self._stopped = threading.Event()
        self._check_server()

    def ask(self, questions: "Iterable[Question]", attempt: int, record: Callable[[str, Answer], None]) -> None:
        """Ask with `caption.concurrency` requests at once; see `answers.Backend`."""
        source, pulling = iter(questions), threading.Lock()
        failures: list[BaseException] = []
        self._stopped.clear()

        def work() -> None:
            try:
                while not self._stopped.is_set():
                    with pulling:
                        question = next(source, None)
                    if question is None:
                        return
                    record(question[0], self._ask_one(question[1], attempt))
            except Exception as error:
                failures.append(error)
                self._stopped.set()  # the others finish what they have asked, and end

        with ThreadPoolExecutor(self.config.concurrency) as pool:
            try:
                for done in [pool.submit(work) for _ in range(self.config.concurrency)]:
                    done.result()
            finally:
                self._stopped.set()
        if failures:
            raise failures[0]

    def _ask_one(self, frames: "np.ndarray", attempt: int) -> Answer:
        try:
            return self._insist(self._body(frames, attempt, self.config.max_new_tokens))
        except _Rejected as error:
            return Answer(f"caption failed: {error}", "failed")
        except _Trouble as error:
            self._blame(error)
            return Answer(f"caption failed: {error}", "failed")

    def _blame(self, trouble: _Trouble) -> None:
        """Return if the server is well and so the clip is to blame for what even the last try met."""
        if trouble.busy:
            raise ServerError(f"{self.url} is too busy ({trouble}); lower caption.concurrency or raise caption.retries")
        try:
            self._post(self._probe())
        except (_Trouble, _Rejected) as error:
            raise ServerError(
                f"{self.url} answers no more ({error}); look at the server, then start again: what it said is kept"
            ) from None

    def _check_server(self) -> None:
        """A request like those to come, so that what would fail for every clip fails once."""
        try:
            self._insist(self._probe())
        except _Rejected as error:
            raise ServerError(
                f"{self.url} takes no request with {len(self.config.frame_positions)} pictures ({error}); check "
                "caption.model, and let the server take as many (vLLM: --limit-mm-per-prompt)"
            ) from None
        except _Trouble as error:
            raise ServerError(
                f"no captioning server answers at {self.url} after {self.config.retries + 1} tries ({error}); "
                "start it, or set caption.endpoint"
            ) from None

    def _probe(self) -> dict[str, Any]:
        import numpy as np

        grey = np.full((len(self.config.frame_positions), PROBE_SIDE, PROBE_SIDE, 3), 128, np.uint8)
        return self._body(grey, 0, 1)

    def _body(self, frames: "np.ndarray", attempt: int, max_tokens: int) -> dict[str, Any]:
        pictures = [encode_jpeg(frame, self.config.max_side) for frame in frames]
        urls = [f"data:image/jpeg;base64,{base64.b64encode(picture).decode()}" for picture in pictures]
        content: list[dict[str, Any]] = [{"type": "image_url", "image_url": {"url": url}} for url in urls]
        content.append({"type": "text", "text": self.config.prompt})
        body = {
            "model": self.config.model,
            "messages": [{"role": "user", "content": content}],
            "max_tokens": max_tokens,
            "temperature": self.config.retry_temperature if attempt else 0.0,
        }
        return body | {"seed": attempt} if attempt else body

    def _insist(self, body: dict[str, Any]) -> Answer:
        """Try until there is an answer, at most 1 + `caption.retries` times."""
        for tries in range(self.config.retries + 1):
            try:
                return self._post(body)
            except _Trouble as error:
                trouble = error
            if tries == self.config.retries or self._stopped.wait(_pause_s(tries, trouble.pause_s)):
                break
        raise trouble

    def _post(self, body: dict[str, Any]) -> Answer:
        import requests

        timeout = (CONNECT_S, self.config.request_timeout_s)
        try:
            reply = self._session().post(self.url, json=body, timeout=timeout, allow_redirects=False)
        except requests.ConnectTimeout:
            raise _Trouble(f"no connection in {CONNECT_S:g} s") from None
        except requests.Timeout:
            raise _Trouble(f"no answer in {self.config.request_timeout_s:g} s") from None
        except requests.RequestException as error:
            raise _Trouble(str(error).rsplit(": ", 1)[-1].strip("'\")")) from None
        status = reply.status_code
        if status == 200:
            return _read_answer(reply)
        message = f"HTTP {status} {self._detail(reply)}".strip()
        if status in (408, 429) or status >= 500:
            raise _Trouble(message, read_retry_after(reply.headers.get("Retry-After", "")), busy=status == 429)
        if status < 400 or status in (401, 403, 404):
            raise ServerError(f"{self.url}: {message}; check caption.endpoint, caption.model and the key in {API_KEY}")
        raise _Rejected(message)

    def _session(self) -> "requests.Session":
        """This thread's connection; `auth` also keeps .netrc out, which would replace the key."""
        import requests

        if not hasattr(self._local, "session"):
            self._local.session = requests.Session()
            self._local.session.auth = self._authorise
        return self._local.session

    def _authorise(self, request: "requests.PreparedRequest") -> "requests.PreparedRequest":
        if self._key:
            request.headers["Authorization"] = f"Bearer {self._key}"
        return request

    def _detail(self, reply: "requests.Response") -> str:
        """What the server said of an error, the key left out."""
        try:
            value = reply.json()
            error = value.get("error", value)
            said = str(error.get("message") or error) if isinstance(error, dict) else str(error)
        except (ValueError, AttributeError):
            said = reply.text
        said = " ".join(said.split())[:200]
        return said.replace(self._key, "…") if self._key else said


def _check_url(text: str) -> str:
    parts = urlsplit(text)
    if parts.username or parts.password:
        raise ServerError(f"caption.endpoint holds a name or password; give the key in {API_KEY} instead")
    if parts.scheme not in ("http", "https") or not parts.netloc:
        raise ServerError(f"caption.endpoint is {text!r}, expected an address like http://localhost:8000/v1")
    return text.rstrip("/")


def _read_answer(reply: "requests.Response") -> Answer:
    try:
        choice = reply.json()["choices"][0]
        message = choice["message"]
        text = message.get("content") or ""
        if not isinstance(text, str):
            raise TypeError
    except (ValueError, KeyError, IndexError, TypeError, AttributeError):
        raise _Trouble("the answer is no chat completion") from None
    if choice.get("finish_reason") == "content_filter" or message.get("refusal"):
        return Answer(text, "filtered")
    return Answer(text, "length" if choice.get("finish_reason") == "length" else "stop")


def _pause_s(tries: int, asked_s: float | None) -> float:
    """Seconds before the next try: what the server asked for, or a doubling pause; never the same for two requests."""
    if asked_s is not None:
        return min(asked_s, LONGEST_RETRY_AFTER_S) + random.uniform(0, FIRST_PAUSE_S)
    return min(LONGEST_PAUSE_S, FIRST_PAUSE_S * 2**tries) * random.uniform(0.5, 1)


def encode_jpeg(frame: "np.ndarray", max_side: int) -> bytes:
    """A frame uint8 [H, W, 3] as JPEG, its longer side at most `max_side` pixels."""
    import cv2

    scale = max_side / max(frame.shape[:2])
    if scale < 1:
        frame = cv2.resize(frame, None, fx=scale, fy=scale, interpolation=cv2.INTER_AREA)
    options = [cv2.IMWRITE_JPEG_QUALITY, JPEG_QUALITY]
    return cv2.imencode(".jpg", cv2.cvtColor(frame, cv2.COLOR_RGB2BGR), options)[1].tobytes()
