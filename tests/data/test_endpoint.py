"""The endpoint backend against a server on loopback that decodes the pictures, and that fails as servers do."""

import threading
import time
from collections import Counter
from collections.abc import Iterator

import numpy as np
import pytest

from opensora.config import CaptionConfig
from opensora.data import endpoint
from opensora.data.answers import Answer
from opensora.data.endpoint import API_KEY, Endpoint, ServerError, encode_jpeg
from opensora.demo.shapes import all_scenes, render_clip
from tests.data.caption_server import CaptionServer, Reply, Request, Script, caption_server, see

SCENES = all_scenes()[::4]  # twelve
KEY = "sk-secret-key"


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(endpoint, "FIRST_PAUSE_S", 0.01)
    monkeypatch.setenv(API_KEY, KEY)


def questions() -> Iterator[tuple[str, np.ndarray]]:
    rng = np.random.default_rng(0)
    for scene in SCENES:
        yield scene.caption, render_clip(scene, 3, 64, rng)


def config(server: CaptionServer, **changes: object) -> CaptionConfig:
    values = {"backend": "endpoint", "endpoint": server.url, "model": "seer", "prompt": "what", "concurrency": 3}
    return CaptionConfig(**values | {"retries": 2} | changes)


def ask(settings: CaptionConfig, attempt: int = 0) -> dict[str, Answer]:
    answers: dict[str, Answer] = {}
    Endpoint(settings).ask(questions(), attempt, answers.__setitem__)
    return answers


def first_time_per_clip(reply: Reply) -> Script:
    """Every clip's first request is answered by `reply`."""
    seen: Counter[str] = Counter()

    def script(request: Request) -> Reply | None:
        seen[request.clip] += 1
        return reply if seen[request.clip] == 1 and not request.is_probe else None

    return script


def test_every_clip_gets_its_own_caption_by_the_protocol() -> None:
    with caption_server() as server:
        answers = ask(config(server))
    assert {name: answer.text for name, answer in answers.items()} == {name: name for name in answers}
    assert len(answers) == len(SCENES) == len(server.requests)
    assert server.probes == 1
    for request in server.requests:
        assert request.headers["Authorization"] == f"Bearer {KEY}"
        assert [picture.shape for picture in request.pictures] == [(64, 64, 3)] * 3
        assert request.body["messages"][0]["content"][-1] == {"type": "text", "text": "what"}
        rest = {name: value for name, value in request.body.items() if name != "messages"}
        assert rest == {"model": "seer", "max_tokens": 256, "temperature": 0.0}


def test_later_attempts_are_drawn_each_in_its_own_way(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(API_KEY)
    with caption_server() as server:
        ask(config(server, retry_temperature=0.5), attempt=2)
    assert {(request.body["temperature"], request.body["seed"]) for request in server.requests} == {(0.5, 2)}
    assert not any("Authorization" in request.headers for request in server.requests)


def test_requests_wait_together_but_never_too_many() -> None:
    together = threading.Barrier(3)
    taken = 0

    def count() -> Iterator[tuple[str, np.ndarray]]:
        nonlocal taken
        for question in questions():
            taken += 1
            yield question

    def script(request: Request) -> None:
        if not request.is_probe:
            together.wait(60)  # passes when three are there
            assert taken <= request.number + 3  # no clip is read long before its turn

    with caption_server(script) as server:
        answers: dict[str, Answer] = {}
        Endpoint(config(server, concurrency=3)).ask(count(), 0, answers.__setitem__)
    assert len(answers) == 12
    assert all(answer == Answer(name) for name, answer in answers.items())
    assert server.most_at_once == 3


@pytest.mark.parametrize(
    "reply",
    [
        Reply(429, "slow down", headers={"Retry-After": "0"}),
        Reply(500, "oops"),
        Reply(503, raw=b"<html>starting</html>"),
        Reply(None),
        Reply(raw=b"<html>hello</html>"),
        Reply(raw=b'{"choices": []}'),
    ],
    ids=["busy", "500", "503", "hang-up", "page", "no choice"],
)
def test_trouble_that_passes_costs_no_clip(reply: Reply) -> None:
    with caption_server(first_time_per_clip(reply)) as server:
        answers = ask(config(server))
    assert {answer.text for answer in answers.values()} == {scene.caption for scene in SCENES}
    assert set(Counter(server.asked()).values()) == {2}


def test_a_slow_answer_is_asked_for_again() -> None:
    slow = first_time_per_clip(Reply())

    def script(request: Request) -> None:
        if slow(request) and request.number == 1:
            time.sleep(8)

    with caption_server(script) as server:
        answers = ask(config(server, request_timeout_s=4, concurrency=1))
    assert all(answer == Answer(name) for name, answer in answers.items())
    assert len(server.requests) == len(SCENES) + 1


def test_a_refused_request_is_that_clips_own_and_not_repeated() -> None:
    def script(request: Request) -> Reply | None:
        return Reply(400, "bad picture") if not request.is_probe and see(request) == SCENES[4].caption else None

    with caption_server(script) as server:
        answers = ask(config(server))
    assert answers[SCENES[4].caption] == Answer("caption failed: HTTP 400 bad picture", "failed")
    assert sum(answer.finish == "stop" for answer in answers.values()) == 11
    assert len(server.requests) == 12


@pytest.mark.parametrize("reply", [Reply(500, "cannot"), Reply(None)], ids=["500", "hang-up"])
def test_a_clip_that_always_fails_does_not_stop_a_server_that_is_well(reply: Reply) -> None:
    def script(request: Request) -> Reply | None:
        return reply if not request.is_probe and see(request) == SCENES[4].caption else None

    with caption_server(script) as server:
        answers = ask(config(server))
    failed = answers.pop(SCENES[4].caption)
    assert (failed.finish, failed.text[:16]) == ("failed", "caption failed: ")
    assert all(answer == Answer(name) for name, answer in answers.items())
    assert len(server.requests) == 11 + 3
    assert server.probes == 2


def test_a_server_that_dies_stops_the_work_and_answers_so_far_count() -> None:
    def script(request: Request) -> Reply | None:
        return Reply(None) if len(server.requests) > 5 else None

    answers: dict[str, Answer] = {}
    with caption_server(script) as server:
        backend = Endpoint(config(server))
        with pytest.raises(ServerError, match=r"answers no more .*what it said is kept"):
            backend.ask(questions(), 0, answers.__setitem__)
        assert len(server.requests) <= 5 + 3 * 3
    assert sum(answer == Answer(name) for name, answer in answers.items()) == 5


def test_a_server_that_stays_busy_drops_no_clip() -> None:
    def script(request: Request) -> Reply | None:
        return None if request.is_probe else Reply(429, "quota", headers={"Retry-After": "0"})

    with caption_server(script) as server, pytest.raises(ServerError, match=r"too busy .*lower caption\.concurrency"):
        ask(config(server, retries=1))


def test_a_dead_server_is_found_out_at_once() -> None:
    with caption_server() as server:
        pass
    with pytest.raises(ServerError, match=r"after 3 tries .*Connection refused.*start it"):
        Endpoint(config(server))


@pytest.mark.parametrize(
    ("reply", "words"),
    [
        (Reply(401, f"Incorrect API key provided: {KEY}"), "HTTP 401 Incorrect API key provided: …; check"),
        (Reply(404, "The model `seer` does not exist."), "HTTP 404 The model `seer` does not exist"),
        (Reply(307, headers={"Location": "http://elsewhere/"}), "HTTP 307"),
        (Reply(400, "At most 1 image(s) may be provided"), "3 pictures .*At most 1 image.*limit-mm-per-prompt"),
    ],
    ids=["key", "model", "redirect", "pictures"],
)
def test_what_would_fail_for_every_clip_fails_once(reply: Reply, words: str) -> None:
    with caption_server(lambda request: reply) as server, pytest.raises(ServerError, match=words) as caught:
        ask(config(server))
    assert KEY not in str(caught.value)
    assert (server.probes, server.requests) == (1, [])


def test_a_key_that_expires_stops_the_work() -> None:
    with caption_server(lambda request: Reply(403, "expired") if request.number > 4 else None) as server:
        with pytest.raises(ServerError, match="HTTP 403 expired"):
            ask(config(server))
        assert len(server.requests) <= 4 + 3


def test_trouble_in_reading_stops_the_work_after_what_was_asked() -> None:
    def torn() -> Iterator[tuple[str, np.ndarray]]:
        for index, question in enumerate(questions()):
            if index == 5:
                raise FileNotFoundError("shard")
            yield question

    answers: dict[str, Answer] = {}
    with caption_server() as server:
        with pytest.raises(FileNotFoundError):
            Endpoint(config(server)).ask(torn(), 0, answers.__setitem__)
        assert len(answers) == len(server.requests) == 5


@pytest.mark.parametrize(
    ("reply", "answer"),
    [
        (Reply(text="A man", finish="length"), Answer("A man", "length")),
        (Reply(text=None, finish="content_filter"), Answer("", "filtered")),
        (Reply(text=None), Answer("")),
        (Reply(raw=b'{"choices": [{"message": {"content": null, "refusal": "no"}}]}'), Answer("", "filtered")),
    ],
)
def test_how_an_answer_ends(reply: Reply, answer: Answer) -> None:
    with caption_server(lambda request: None if request.is_probe else reply) as server:
        assert set(ask(config(server)).values()) == {answer}


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("ftp://host/v1", "expected an address like"),
        ("localhost:8000/v1", "expected an address like"),
        (f"http://me:{KEY}@host/v1", "give the key in OPENAI_API_KEY"),
    ],
)
def test_addresses_are_checked(url: str, words: str) -> None:
    with pytest.raises(ServerError, match=words) as caught:
        Endpoint(CaptionConfig(backend="endpoint", endpoint=url))
    assert KEY not in str(caught.value)


def test_pauses_grow_differ_and_follow_the_server() -> None:
    first = [endpoint._pause_s(tries, None) for tries in range(20)]
    assert all(0.5 * 0.01 * 2**tries <= pause <= 0.01 * 2**tries for tries, pause in enumerate(first[:12]))
    assert max(first) <= endpoint.LONGEST_PAUSE_S
    assert len({endpoint._pause_s(3, None) for _ in range(9)}) == 9
    assert 7 <= endpoint._pause_s(0, 7.0) <= 7.1
    assert endpoint._pause_s(0, 99999999.0) <= endpoint.LONGEST_RETRY_AFTER_S + 0.1


def test_large_frames_are_made_smaller_and_colours_stay() -> None:
    import cv2

    frame = np.zeros((300, 600, 3), np.uint8)
    frame[:, :, 0] = 200
    decoded = cv2.imdecode(np.frombuffer(encode_jpeg(frame, 100), np.uint8), cv2.IMREAD_COLOR)
    assert decoded.shape == (50, 100, 3)
    assert np.abs(decoded.mean((0, 1)) - [0, 0, 200]).max() < 6  # OpenCV's order
    assert cv2.imdecode(np.frombuffer(encode_jpeg(frame, 600), np.uint8), cv2.IMREAD_COLOR).shape == frame.shape
