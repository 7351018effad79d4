"""Fragments of the report's page: its style, tables, bars, and numbers as words."""

import math
from collections.abc import Sequence

from opensora.page import text

STYLE = """
:root { --soft: #8881; --kept: #3b82f6; --dropped: #e0851b; }
* { box-sizing: border-box; }
h1 { font-size: 1.5rem; margin: 0; } h2 { font-size: 1.15rem; margin: 2.6rem 0 .6rem; }
h3 { font-size: 1rem; margin: 1.6rem 0 .5rem; } p { margin: .4rem 0; max-width: 46rem; }
small, .quiet { opacity: .75; } nav { margin: .8rem 0; display: flex; flex-wrap: wrap; gap: .2rem 1rem; }
a { color: inherit; text-underline-offset: .2em; text-decoration-color: var(--line); }
.note { border-left: 3px solid var(--dropped); padding: .3rem .8rem; background: var(--soft); }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(9.5rem, 1fr)); gap: .8rem; margin: 1.2rem 0; }
.tile { background: var(--soft); border-radius: 10px; padding: .7rem 1rem; }
.tile b { display: block; font-size: 1.45rem; line-height: 1.3; font-variant-numeric: tabular-nums; }
.scroll { overflow-x: auto; } table { width: 100%; }
td, th { padding: .3rem .7rem .3rem 0; vertical-align: top; }
th { font-weight: 600; font-size: .85rem; opacity: .75; white-space: nowrap; }
td { overflow-wrap: break-word; max-width: 34rem; } td.n { white-space: nowrap; }
.bar { display: flex; width: min(11rem, 20vw); height: .8rem; margin-top: .35rem; border-radius: 3px; overflow: hidden;
background: var(--soft); } .bar i { min-width: 1px; }
i.kept, .key .kept { background: var(--kept); } i.dropped, .key .dropped { background: var(--dropped); }
.other { --dropped: #14a37f; } .two .chart { max-width: 340px; }
rect.kept { fill: var(--kept); } rect.dropped { fill: var(--dropped); }
.key i { display: inline-block; width: .8em; height: .8em; border-radius: 2px; margin: 0 .3em 0 1em; }
.charts { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 300px), 1fr)); gap: 1.6rem; }
.chart { margin: 0; min-width: 0; } .chart figcaption { font-weight: 600; }
.chart small { display: block; font-weight: 400; font-variant-numeric: tabular-nums; }
svg { width: 100%; height: auto; display: block; }
svg text { font: 10px system-ui, sans-serif; fill: currentColor; opacity: .8; }
.base { stroke: currentColor; opacity: .4; } .limit line { stroke: currentColor; stroke-dasharray: 3 3; }
.limit text { opacity: 1; font-weight: 600; } g:hover rect { filter: brightness(1.25); }
details { font-size: .85rem; } summary { cursor: pointer; opacity: .75; }
.clips { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 440px), 1fr)); gap: 1.6rem; }
.clip { margin: 0; break-inside: avoid; min-width: 0; font-size: .85rem; }
.clip img { display: block; max-width: 100%; max-height: 120px; border-radius: 8px; }
.clip figcaption > * { display: block; margin-top: .25rem; overflow-wrap: anywhere; }
.clip code { font-size: .75rem; opacity: .75; } .why { color: var(--bad); font-weight: 600; }
.words { display: flex; flex-wrap: wrap; gap: .3rem .9rem; } .two { display: grid; gap: 0 2.5rem;
grid-template-columns: repeat(auto-fit, minmax(min(100%, 26rem), 1fr)); } .two .bar { width: min(6.5rem, 20vw); }
@media (prefers-color-scheme: dark) { :root { --kept: #60a5fa; --dropped: #f0a13c; --bad: #ff8a7a; } }
@media print { html { font-size: 11px; } body { font-size: 11px; margin: 0; max-width: none; }
nav, details { display: none !important; } * { print-color-adjust: exact; }
.chart, .tile, tr { break-inside: avoid; } h2, h3, .key { break-after: avoid; }
.charts { grid-template-columns: repeat(3, 1fr); } .clips, .two { grid-template-columns: repeat(2, 1fr); } }
"""
KEY = "<p class=key><small><i class=kept></i>{} <i class=dropped></i>{}</small></p>"


def key(first: str = "kept", second: str = "dropped") -> str:
    """What the two colours of bars and histograms mean."""
    return KEY.format(text(first), text(second))


def number(value: float) -> str:
    """ "12,345", "0.0312"."""
    if math.isfinite(value) and (abs(value) >= 1000 or value == round(value)):
        return f"{value:,.0f}"
    return f"{value:.3g}"


def share(part: float, whole: float) -> str:
    """ "4.2 %"."""
    return f"{100 * part / whole:.1f} %" if whole else "–"


def length(seconds: float) -> str:
    """ "3.2 h", "4 min 10 s", "1.5 s"."""
    if seconds >= 36000:
        return f"{seconds / 3600:,.0f} h"
    if seconds >= 3600:
        return f"{seconds / 3600:.1f} h"
    if seconds >= 60:
        return f"{seconds // 60:.0f} min {seconds % 60:.0f} s"
    return f"{seconds:.1f} s"


def size(count: float) -> str:
    """ "1.4 GiB" of a number of bytes."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" or count >= 10 else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:,.1f} TiB"


def table(head: Sequence[str], rows: Sequence[Sequence[str]], words: Sequence[int] = (0,)) -> str:
    """A table of HTML fragments; the columns `words` are aligned left, the others are numbers."""
    names = [f"<th scope=col{_numeric(place, words)}>{name}" for place, name in enumerate(head)]
    lines = ["<tr>" + "".join(f"<td{_numeric(place, words)}>{cell}" for place, cell in enumerate(row)) for row in rows]
    return f"<div class=scroll><table><thead><tr>{''.join(names)}<tbody>{''.join(lines)}</table></div>"


def _numeric(place: int, words: Sequence[int]) -> str:
    return "" if place in words else " class=n"


def bar(kept: float, dropped: float, whole: float) -> str:
    """A bar of kept and dropped parts of `whole`; the numbers stand beside it, so it is hidden from readers."""
    parts = "".join(
        f"<i class={name} style='width:{100 * part / whole:.2f}%'></i>"
        for name, part in (("kept", kept), ("dropped", dropped))
        if part and whole
    )
    return f"<span class=bar aria-hidden=true>{parts}</span>"
