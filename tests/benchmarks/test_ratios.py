"""The operations that the benchmark divides by are those that the formulas give."""

import pytest

from benchmarks.measure import alternate
from benchmarks.stdit import CAPTION, DEPTH, SIDE, TOKENS_OF_TEXT, WIDTH, products, step_flops


@pytest.mark.parametrize("frames", [1, 16])
def test_operations_of_a_training_step(frames: int) -> None:
    space, text, width = (SIDE // 2) ** 2, TOKENS_OF_TEXT, WIDTH
    tokens = frames * space
    # One frame needs the values of temporal attention alone.
    temporal = 4 * width**2 if frames > 1 else 2 * width**2
    linear = 2 * tokens * (4 * width**2 + temporal + 2 * width**2 + 8 * width**2) + 2 * text * 2 * width**2
    attention = 4 * tokens * width * (space + (frames if frames > 1 else 0) + text)
    ends = 2 * tokens * width * 32 + 2 * (256 * width + width**2 + 6 * width**2) + 2 * text * width**2
    first = 2 * tokens * width * 16 + 2 * text * CAPTION * width  # no gradient of the inputs is asked for
    expected = 3 * (DEPTH * (linear + attention) + ends) + 2 * first
    assert step_flops(frames) == pytest.approx(expected, rel=5e-3)


def test_products_count_what_they_do() -> None:
    run, flops = products(4)
    run()
    assert flops == 3 * 2 * 4 * 18 * WIDTH**2  # per token 6 + 4 + 8 widths squared


def test_calls_take_turns() -> None:
    order: list[str] = []
    alternate({"a": lambda: order.append("a"), "b": lambda: order.append("b")}, rounds=2)
    assert order == ["a", "b"] * 3
