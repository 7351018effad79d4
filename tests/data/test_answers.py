"""Answers: which are captions, and a record that survives kills, other limits and other shards."""

import json
from pathlib import Path

import pytest

from opensora.data.answers import Answer, AnswerLog, clean_text, find_fault
from opensora.manifest import Clip

PROSE = (
    "A woman in a red coat walks along a snowy street while the camera follows her from behind. Cars pass on her left, "
    "and a dog runs ahead of her. She stops at a corner, looks to both sides and crosses the street. The picture is "
    "grey and grainy, like an old documentary."
)
CLIP = Clip("a" * 64, "video", source_sha256="5" * 64)


@pytest.mark.parametrize(
    ("answer", "fault"),
    [
        (Answer(PROSE), ""),
        (Answer("a red circle moving left"), ""),
        (Answer("Sorry-looking dogs wait in the rain."), ""),
        (Answer("I am the title of a poster that a man hangs on a wall."), ""),
        (Answer("No, no, no, a man shouts, no, no."), ""),
        (Answer(" \n "), "caption empty"),
        (Answer("", "length"), "caption empty"),
        (Answer("A man walks along", "length"), "caption cut off: raise caption.max_new_tokens"),
        (Answer("I'm sorry, but I cannot help."), "caption refused: I'm sorry, but I cannot help."),
        (Answer("I’m sorry, I can’t describe people."), "caption refused: I’m sorry, I can’t describe people."),
        (Answer("Unfortunately, I am unable to see."), "caption refused: Unfortunately, I am unable to see."),
        (Answer('"As an AI language model, I do not watch."'), 'caption refused: "As an AI language model, I do'),
        (Answer("I cannot assist with that.", "length"), "caption refused: I cannot assist with that."),
        (Answer("", "filtered"), "caption refused: withheld by the server's filter"),
        (Answer("The man walks. " * 20, "length"), "caption repeats itself: The man walks. The man"),
        (Answer("A man sits down and eats. " + "He eats it. " * 20), "caption repeats itself: A man sits down"),
        (Answer("好" * 60), "caption repeats itself: 好"),
        (Answer("caption failed: HTTP 400 bad picture", "failed"), "caption failed: HTTP 400 bad picture"),
    ],
)
def test_faults(answer: Answer, fault: str) -> None:
    found = find_fault(answer)
    assert found.startswith(fault)
    assert bool(found) == bool(fault)


def test_text_becomes_one_line_that_utf8_can_hold() -> None:
    assert clean_text(" A man\n\n walks.\t\ud800 ") == "A man walks. ?"


def test_answers_come_back_in_order_and_a_torn_line_harms_no_other(tmp_path: Path) -> None:
    log = AnswerLog(tmp_path, 50)
    assert log.read([CLIP]) == {CLIP.clip_id: []}
    answers = [Answer(""), Answer("ein Bär"), Answer("x", "length")]
    log.append(CLIP, answers[0])
    log.append(CLIP, answers[1])
    (path,) = tmp_path.rglob("*.jsonl")
    with path.open("a") as handle:
        handle.write('{"clip_id": "a')
    assert log.read([CLIP]) == {CLIP.clip_id: answers[:2]}
    log.append(CLIP, answers[2])
    assert log.read([CLIP]) == {CLIP.clip_id: answers}
    assert [json.loads(line)["text"] for line in path.read_text().splitlines() if line.endswith("}")] == [
        "",
        "ein Bär",
        "x",
    ]


def test_a_higher_limit_asks_what_was_cut_off_again(tmp_path: Path) -> None:
    log = AnswerLog(tmp_path, 50)
    other = Clip("b" * 64, "video", source_sha256=CLIP.source_sha256)
    log.append(CLIP, Answer("A man who", "length"))
    log.append(other, Answer("A dog."))
    clips = [CLIP, other]
    assert log.read(clips) == {CLIP.clip_id: [Answer("A man who", "length")], other.clip_id: [Answer("A dog.")]}
    assert AnswerLog(tmp_path, 51).read(clips) == {CLIP.clip_id: [], other.clip_id: [Answer("A dog.")]}


def test_what_says_nothing_of_the_clip_is_not_kept(tmp_path: Path) -> None:
    AnswerLog(tmp_path, 50).append(CLIP, Answer("caption failed: HTTP 500", "failed"))
    assert not list(tmp_path.iterdir())
