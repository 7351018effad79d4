"""Histograms show every value, whatever the range: constant, whole, skewed, with outliers, with a far threshold."""

import re
from xml.etree import ElementTree

import numpy as np
import pytest

from opensora.data.reporting.charts import BINS, HEIGHT, WIDTH, Limit, choose_axis, histogram

GENERATOR = np.random.default_rng(0)
SETS = {
    "constant": np.full(50, 0.3),
    "one": np.array([7.0]),
    "zeros": np.zeros(9),
    "whole": GENERATOR.integers(0, 65, 500).astype(float),
    "normal": GENERATOR.normal(110, 30, 500),
    "skewed": GENERATOR.lognormal(5, 2, 500),
    "outlier": np.append(GENERATOR.normal(1, 0.1, 500), 1e9),
    "negative": GENERATOR.normal(-5, 2, 100),
    "zero and skewed": np.append(GENERATOR.lognormal(3, 2, 900), np.zeros(3)),
}


def table_counts(figure: str) -> list[tuple[int, int]]:
    rows = re.findall(r"<td class=n>([\d,]+)<td class=n>([\d,]+)", figure)
    return [(int(kept.replace(",", "")), int(dropped.replace(",", ""))) for kept, dropped in rows]


@pytest.mark.parametrize("name", SETS)
@pytest.mark.parametrize("limits", [(), (Limit(0.2, "min 0.2"),), (Limit(-3.0, "min -3"), Limit(500.0, "max 500"))])
def test_no_value_is_lost(name: str, limits: tuple[Limit, ...]) -> None:
    values = SETS[name]
    figure = histogram("score", values, values[:3], limits=limits)
    counts = table_counts(figure)
    assert sum(kept for kept, _ in counts) == len(values)
    assert sum(dropped for _, dropped in counts) == len(values[:3])
    axis = choose_axis(values, limits)
    assert (np.diff(axis.edges) > 0).all()
    for limit in limits:
        assert limit.name in figure


@pytest.mark.parametrize("name", SETS)
def test_the_drawing_stays_inside(name: str) -> None:
    figure = histogram("score", SETS[name], np.array([]))
    for x, y, width, height in re.findall(r"x=([\d.-]+) y=([\d.-]+) width=([\d.]+) height=([\d.]+)", figure):
        assert -0.1 <= float(x) <= WIDTH
        assert float(x) + float(width) <= WIDTH + 1
        assert float(y) >= -2
        assert float(y) + float(height) <= HEIGHT + 0.2


def test_an_outlier_does_not_squeeze_the_rest() -> None:
    axis = choose_axis(SETS["outlier"], ())
    assert axis.edges[-1] < 3
    assert axis.above
    assert "and more" in histogram("score", SETS["outlier"], np.array([]))


def test_whole_numbers_have_a_bin_each_and_skewed_ones_a_logarithmic_axis() -> None:
    assert len(choose_axis(SETS["whole"], ()).edges) == 66
    axis = choose_axis(SETS["skewed"], ())
    assert axis.log
    assert len(axis.edges) == BINS + 1


def test_a_sample_is_scaled_to_what_it_stands_for() -> None:
    figure = histogram("score", np.full(10, 2.0), np.full(4, 2.0), (100.0, 2.5))
    assert table_counts(figure) == [(1000, 10)]


def test_it_reads_without_the_picture() -> None:
    figure = histogram("<b>", SETS["normal"], np.array([]), limits=(Limit(1.0, "<i>"),))
    svg = figure[figure.index("<svg") : figure.index("</svg>") + 6]
    quoted = re.sub(r"=([^'\s>/]+)", r"='\1'", re.sub(r"aria-label='[^']*'", "", svg))
    ElementTree.fromstring(quoted)  # well-formed
    assert "<i>" not in svg
    assert "aria-label='&lt;b&gt;, 5th percentile, median and 95th" in svg
    assert "<summary>values</summary>" in figure
