"""The gate: floors, champions, and every reason in words."""

import math

import pytest

from opensora.config import Gate
from opensora.promote import describe, judge

HIGHER = Gate(metric="score", floor=0.5, tolerance=0.1)
LOWER = Gate(metric="fd", direction="lower", floor=10.0, tolerance=1.0)


def test_first_model_is_judged_by_floors_and_says_so() -> None:
    (check,) = judge([HIGHER], {"score": 0.6}, None)
    assert check.passed
    assert "no champion yet" in check.reason
    (check,) = judge([HIGHER], {"score": 0.4}, None)
    assert not check.passed
    assert "0.4 < 0.5" in check.reason


@pytest.mark.parametrize("value", [None, math.nan, math.inf, "0.9"])
def test_what_is_no_number_fails(value: object) -> None:
    (check,) = judge([HIGHER], {"score": value}, None)
    assert not check.passed
    assert "number was expected" in check.reason


@pytest.mark.parametrize(("value", "passed"), [(0.75, True), (0.69, False), (0.95, True)])
def test_tolerance_against_the_champion(value: float, passed: bool) -> None:
    (check,) = judge([HIGHER], {"score": value}, {"score": 0.8})
    assert check.passed == passed
    assert check.champion == 0.8


@pytest.mark.parametrize(("value", "passed"), [(9.0, True), (11.0, False), (4.0, True), (9.5, False)])
def test_lower_is_better(value: float, passed: bool) -> None:
    champion = {"fd": 8.2} if value != 11.0 else {"fd": 20.0}
    (check,) = judge([LOWER], {"fd": value}, champion)
    assert check.passed == passed


def test_metrics_of_another_extractor_or_number_are_not_compared() -> None:
    now = {"score": 0.9, "fd_extractor": "randconv", "samples_per_stage": 48}
    checks = judge([HIGHER], now, {**now, "samples_per_stage": 64})
    assert [check.metric for check in checks if not check.passed] == ["samples_per_stage"]


def test_a_champion_without_the_metric_is_no_free_pass() -> None:
    (check,) = judge([HIGHER], {"score": 0.9}, {})
    assert not check.passed


def test_no_gates_promote_nothing() -> None:
    assert [check.passed for check in judge([], {"score": 1.0}, None)] == [False]


def test_the_report_names_every_check() -> None:
    checks = [vars(check) for check in judge([HIGHER, LOWER], {"score": 0.6, "fd": 3.0}, None)]
    verdict = {"model": "m", "verdict": "promoted", "version": "1", "alias": "champion", "checks": checks}
    text = describe(verdict | {"checkpoint": "c", "sha256": "s"})
    assert "score 0.6 ≥ 0.5" in text
    assert "fd 3 ≤ 10" in text
