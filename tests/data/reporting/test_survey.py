"""The facts of a data set: exact counts, and samples that no order of the rows changes."""

import random
from dataclasses import replace
from pathlib import Path

import pytest

from opensora.data.repeats import key_number
from opensora.data.reporting.survey import Sample, place, survey
from opensora.step import StepError
from tests.manifests import clip, finish


def test_a_sample_is_uniform_bounded_and_the_same_in_any_order() -> None:
    names = [f"{number:x}" for number in range(5000)]
    shuffled = random.Random(0).sample(names, len(names))
    samples = []
    for order in (names, shuffled):
        sample: Sample[str] = Sample(500)
        for name in order:
            sample.add(key_number(name), name)
            assert len(sample._rows) <= 2 * sample.size + 1
        assert sample.seen == 5000
        samples.append(sample.items())
    assert samples[0] == samples[1]
    assert len(samples[0]) == 500
    mean = sum(int(name, 16) for name in samples[0]) / 500
    assert abs(mean - 2500) < 4 * 5000 / (12 * 500) ** 0.5  # four standard errors


def test_a_small_set_is_its_own_sample() -> None:
    sample: Sample[int] = Sample(10)
    for number in range(7):
        sample.add(key_number(str(number)), number)
    assert sorted(sample.items()) == list(range(7))


def test_counts_hours_and_the_step_of_every_reason(tmp_path: Path) -> None:
    video = clip(1, shard="", path="videos/1.mp4", end_s=4.0)
    lost = clip(2, shard="", width=0, end_s=0.0, kept=False, reason="dead link: HTTP 404")
    copy = clip(3, shard="", path="", end_s=0.0, kept=False, reason="duplicate: the same file came before")
    finish(tmp_path, "download", [[video, lost], [copy]])
    first, second, third = clip(11), clip(12, end_s=1.0), clip(13, end_s=1.0)
    finish(tmp_path, "split", [[first, second, third, lost], [copy]])
    near = replace(second, kept=False, reason="duplicate: 0 bits from another clip")
    still = replace(third, kept=False, reason="still: motion 0.1 < 0.2")
    first = replace(first, scores={"motion": 0.5}, licence="CC0-1.0")
    finish(tmp_path, "score", [[first, near, still, lost], [copy]])

    facts = survey(tmp_path, 4)

    assert [step.name for step in facts.steps] == ["download", "split", "score"]
    assert [step.hours * 3600 for step in facts.steps] == pytest.approx([4.0, 4.0, 2.0])
    assert facts.steps[0].dropped == {"dead link": 1, "duplicate": 1}
    assert facts.steps[1].dropped == {}
    assert facts.steps[2].dropped == {"duplicate": 1, "still": 1}  # the copy is not told twice
    assert (facts.whole.kept, facts.whole.dropped, facts.whole.kept_s, facts.whole.dropped_s) == (1, 4, 2.0, 2.0)
    assert {reason: count.dropped for reason, count in facts.reasons.items()} == {
        "dead link": 1,
        "duplicate": 2,
        "still": 1,
    }
    assert facts.licences["CC0-1.0"].kept == 1
    assert facts.places["example.org"].total == 5
    assert [row["motion"] for row in facts.values[True].items()] == [0.5]
    assert facts.kept_clips.items() == [first]


def test_a_step_that_ran_again_since_is_named(tmp_path: Path) -> None:
    import os

    for step in ("download", "split", "score"):
        finish(tmp_path, step, [[clip(1)]])
        os.utime(tmp_path / step / "report.json", (1000, 1000))
    assert survey(tmp_path, 1).stale == []
    os.utime(tmp_path / "split" / "report.json", (2000, 2000))
    assert survey(tmp_path, 1).stale == ["split"]


def test_no_finished_step_says_what_to_run(tmp_path: Path) -> None:
    with pytest.raises(StepError, match="opensora download"):
        survey(tmp_path, 1)


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("https://user@Videos.example.org:8080/a/b.mp4?x=1", "videos.example.org"),
        ("s3://bucket/a/b.mp4", "s3://bucket"),
        ("/data/films/b.mp4", "/data/films"),
        ("films/b.mp4", "films"),
    ],
)
def test_where_a_video_came_from(source: str, expected: str) -> None:
    assert place(source) == expected
