"""The gallery: one HTML page on which candidate and champion play side by side, prompt by prompt, with their scores."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from opensora.demo.shapes import held_out_scenes, parse_caption
from opensora.evaluation.champion import Champion
from opensora.evaluation.measuring import Findings
from opensora.evaluation.plots import averaged
from opensora.evaluation.prompts import describe_seeds
from opensora.evaluation.scores import DISTANCES, PARTS, Measured, better, primary
from opensora.gallery_clips import embed_clips
from opensora.gallery_look import SCRIPT, STYLE
from opensora.page import text, write_page

LABELS = {
    "prompt_following": "whole prompts right",
    "prompt_following_seen": "whole prompts right, seen in training",
    "prompt_following_held_out": "whole prompts right, held out",
    "colour": "colour right",
    "shape": "shape right",
    "direction": "direction right",
    "flicker": "flicker (1: none)",
    "caption_exact_match": "captions by LLaVA exactly right",
}
SHARES = {name for name in LABELS if name != "flicker"}
WIDTH, HEIGHT, LEFT, FOOT = 300, 120, 44, 18  # of a curve, and its margins, pixels
PAGE_MIB = 30.0  # of the page with its clips
SPARE = 1 << 16  # bytes of the page for what is not counted: its look, its script, a sentence
TINY = 128  # height of a clip that is enlarged without smoothing, pixels


def write_gallery(
    folder: Path,
    title: str,
    prompts: Sequence[str],
    seeds: Sequence[int],
    found: Findings,
    metrics: Mapping[str, object],
    curves: Mapping[str, Sequence[tuple[int, float]]],
) -> None:
    """Write `folder/gallery.html`, a page of up to 30 MiB that stands alone; the clips lie below `folder`.

    Where the clips are larger, the page holds previews; see `embed_clips`.

    Args:
        metrics: what metrics.json says.
        curves: (step, loss) by stage.
    """
    champion = found.champion
    other = champion.measured if champion and champion.measured is not found.candidate else None
    shown = [*found.stages.values(), *([other] if other else [])]
    files = [[measured.files[number] for measured in shown] for number in range(len(prompts))]

    def rows(sources: Mapping[str, str]) -> str:
        numbered = enumerate(zip(prompts, seeds, strict=True))
        return "".join(_prompt(sources, number, prompt, seed, found, other) for number, (prompt, seed) in numbered)

    drawn = [_curve(stage, averaged(points)) for stage, points in curves.items() if len(points) > 1]
    head = [
        f"<h1>{text(title)}: evaluation</h1>",
        _introduction(prompts, seeds, found, other),
        "<h2>Scores</h2>",
        _score_table(found, other, metrics),
        _notes(found, metrics),
        *(["<h2>Losses</h2><div class=curves>", *drawn, "</div>"] if drawn else []),
        "<h2>Clips</h2>",
    ]
    controls = _controls(list(found.candidate.scores[0]), other, prompts)
    room = int(PAGE_MIB * 2**20) - len("".join([*head, controls, rows({})]).encode()) - SPARE
    sources, previews = embed_clips(folder, files, room)
    absent = sum(not sources.keys() >= set(part) for part in files)
    body = [*head, _about_clips(previews, absent), controls, "<main>", rows(sources), "</main>"]
    write_page(folder / "gallery.html", title, "".join(body), STYLE, SCRIPT)


def _introduction(prompts: Sequence[str], seeds: Sequence[int], found: Findings, other: Measured | None) -> str:
    stages = ", ".join(text(stage) for stage in found.stages)
    said = [
        f"<p>{len(prompts)} prompt{'s' * (len(prompts) != 1)} with seeds {text(describe_seeds(seeds))}, "
        f"the same for every stage: {stages}.</p>"
    ]
    champion = found.champion
    if champion is None:
        said.append("<p>There is no champion yet to compare with.</p>")
    elif champion.unavailable:
        name = f"Champion version {champion.version}" if champion.version else "The champion"
        said.append(f"<p class=said><b>{text(name)} is not shown:</b> {text(champion.unavailable)}</p>")
    elif other:
        said.append(
            f"<p>Candidate is the last stage; {_name(champion)} is what users get now "
            f"(sha256 <code>{text(champion.sha256[:12])}</code>), on the same prompts and seeds. Differences are "
            "candidate less champion, <span class=good>green</span> where the candidate is better and "
            "<span class=bad>red</span> where it is worse.</p>"
        )
    else:
        said.append(f"<p>The last stage is the champion already: {_name(champion)}.</p>")
    return "".join(said)


def _about_clips(previews: int, absent: int) -> str:
    """What is not shown as it is; the clips themselves are in the step's folder."""
    said = []
    if previews:
        said.append(f"Large clips are shown as previews ({previews}): as they are, all would not fit into a page.")
    if absent:
        said.append(f"Of {absent} prompt{'s' * (absent != 1)} not all clips are shown.")
    return f"<p>{' '.join(said)} The clips themselves lie in <code>samples/</code>.</p>" if said else ""


def _name(champion: Champion) -> str:
    return f"champion version {text(champion.version)}"


def _score_table(found: Findings, other: Measured | None, metrics: Mapping[str, object]) -> str:
    heads = [f"<th class=n>{text(stage)}</th>" for stage in found.stages]
    if other and found.champion:
        heads += [f"<th class=n>{_name(found.champion)}</th><th class=n>difference</th>"]
    rows = ["<div class=wide><table><tr><th></th>", *heads, "</tr>"]
    columns = [measured.metrics for measured in found.stages.values()]
    names = dict.fromkeys(name for values in [*columns, *([other.metrics] if other else [])] for name in values)
    order = list(LABELS)
    for name in sorted(names, key=lambda name: (order.index(name) if name in order else len(order), name)):
        cells = "".join(f"<td class=n>{_number(name, values.get(name))}</td>" for values in columns)
        if other:
            cells += f"<td class=n>{_number(name, other.metrics.get(name))}</td>"
            cells += _difference(name, columns[-1].get(name), other.metrics.get(name))
        rows.append(f"<tr><td>{_label(name)}</td>{cells}</tr>")
    if isinstance(match := metrics.get("caption_exact_match"), float):
        name = "caption_exact_match"
        rows.append(f"<tr><td>{_label(name)}</td><td class=n colspan={len(columns)}>{_number(name, match)}</td></tr>")
    return "".join(rows) + "</table></div>"


def _notes(found: Findings, metrics: Mapping[str, object]) -> str:
    """What the distances are measured to, and what is not measured."""
    clips = found.candidate.real_clips
    said = f"<p><small>Features by {text(metrics.get('extractors', '?'))}"
    said += f"; distances to {clips} real clips ({text(metrics.get('reference', '?'))})" if clips else ""
    said += ".</small></p>"
    if found.absent:
        items = "".join(f"<li>{text(name)}: {text(reason)}</li>" for name, reason in sorted(found.absent.items()))
        said += f"<details><summary>Not measured</summary><ul>{items}</ul></details>"
    return said


def _controls(names: Sequence[str], other: Measured | None, prompts: Sequence[str]) -> str:
    """Shown by the script: without it they would do nothing."""
    shows = [("", "all prompts")]
    if any(parse_caption(prompt) for prompt in prompts):
        shows += [("held-out", "held out"), ("wrong", "not followed")]
    if other:
        measure = _label(primary(names))
        shows += [
            ("better", f"better than the champion ({measure})"),
            ("worse", f"worse than the champion ({measure})"),
        ]
    orders = [("number 1", "number")]
    for name in names:
        orders.append(
            (f"{_key('v', name)} {better(name) or 1}", f"{_label(name)}, {'worst' if better(name) else 'lowest'} first")
        )
        if other:
            orders.append((f"{_key('d', name)} 1", f"{_label(name)}, most lost to the champion first"))
            orders.append((f"{_key('d', name)} -1", f"{_label(name)}, most won first"))
    return (
        "<form hidden><label>Find <input name=find type=search></label>"
        f"<label>Show <select name=show>{_options(shows)}</select></label>"
        f"<label>Order <select name=order>{_options(orders)}</select></label><output name=count></output></form>"
    )


def _options(pairs: Sequence[tuple[str, str]]) -> str:
    return "".join(f"<option value='{text(value)}'>{label}</option>" for value, label in pairs)


def _key(kind: str, name: str) -> str:
    """Name of a value in the script's data set: `data-v-clip-score` is `vClipScore` there."""
    return kind + "".join(part.capitalize() for part in name.split("_"))


def _prompt(
    sources: Mapping[str, str], number: int, prompt: str, seed: int, found: Findings, other: Measured | None
) -> str:
    scores = found.candidate.scores[number]
    theirs = other.scores[number] if other else {}
    values = {f"v-{name}": value for name, value in scores.items()}
    values |= {f"d-{name}": _gain(name, scores[name], theirs[name]) for name in scores if name in theirs}
    marks = _marks(prompt, scores, theirs)
    data = "".join(f" data-{name.replace('_', '-')}='{value:.6g}'" for name, value in values.items())
    tag = "<span class=tag>held out</span> " if "held-out" in marks else ""
    clips = [
        _figure(sources, stage, prompt, number, measured)
        for stage, measured in found.stages.items()
        if not other or measured is not found.candidate
    ]
    if other and found.champion:
        pair = _figure(sources, f"candidate: {found.last}", prompt, number, found.candidate)
        pair += _figure(sources, f"champion version {found.champion.version}", prompt, number, other)
        clips.append(f"<div class=pair>{pair}</div>")
    return (
        f"<article data-number={number} data-text='{text(prompt.lower())}' data-is='{' '.join(marks)}'{data}>"
        f"<div><h3>{text(prompt)}</h3>{tag}<small>seed {seed}</small>{_prompt_table(scores, theirs)}</div>"
        f"<div class=clips>{''.join(clips)}</div></article>"
    )


def _marks(prompt: str, scores: Mapping[str, float], theirs: Mapping[str, float]) -> list[str]:
    """What the list of prompts can be narrowed to."""
    marks = ["held-out"] if prompt in {scene.caption for scene in held_out_scenes()} else []
    marks += ["wrong"] if scores.get("prompt_following") == 0 else []
    name = primary(scores)
    if name in scores and name in theirs:
        gain = _gain(name, scores[name], theirs[name])
        marks += ["better"] if gain > 0 else ["worse"] if gain < 0 else []
    return marks


def _gain(name: str, value: float, other: float) -> float:
    """By how much a value is better than the other one; the plain difference where neither is."""
    return (better(name) or 1) * (value - other)


def _prompt_table(scores: Mapping[str, float], theirs: Mapping[str, float]) -> str:
    head = "<tr><th></th><th class=n>candidate</th><th class=n>champion</th><th class=n>difference</th></tr>"
    rows = [head if theirs else ""]
    for name, value in scores.items():
        if name in PARTS:
            continue  # they stand under the clips, in words
        cells = f"<td class=n>{_number(name, value)}</td>"
        if theirs:
            cells += f"<td class=n>{_number(name, theirs.get(name))}</td>{_difference(name, value, theirs.get(name))}"
        rows.append(f"<tr><td>{_label(name)}</td>{cells}</tr>")
    return f"<table>{''.join(rows)}</table>"


def _label(name: str) -> str:
    if name.startswith(DISTANCES):
        kind, _, extractor = name.partition("_")
        return f"{kind.upper()} by {text(extractor)} (lower is better)"
    return LABELS.get(name) or text(name.replace("_", " "))


def _number(name: str, value: float | None) -> str:
    if value is None or not math.isfinite(value):
        return "–"
    return f"{value:.0%}" if name in SHARES else f"{value:.3f}"


def _difference(name: str, value: float | None, other: float | None) -> str:
    if value is None or other is None:
        return "<td class=n>–</td>"
    difference = value - other
    said = f"{difference:+.0%}" if name in SHARES else f"{difference:+.3f}"
    if not any(digit in said for digit in "123456789"):
        return "<td class=n>±0</td>"
    gain = better(name) * difference
    kind = " good" if gain > 0 else " bad" if gain < 0 else ""
    return f"<td class='n{kind}'>{said.replace('-', '−')}</td>"


def _curve(stage: str, points: Sequence[tuple[int, float]]) -> str:
    last, top = points[-1][0], max(loss for _, loss in points)
    top = top if top > 0 else 1.0
    line = " ".join(
        f"{LEFT + step / last * WIDTH:.1f},{HEIGHT - loss / top * (HEIGHT - 8):.1f}" for step, loss in points
    )
    axes = (
        f"<path d='M{LEFT},0V{HEIGHT}H{LEFT + WIDTH}'/><text x={LEFT - 4} y=12 text-anchor=end>{top:.3g}</text>"
        f"<text x={LEFT - 4} y={HEIGHT} text-anchor=end>0</text>"
        f"<text x={LEFT + WIDTH} y={HEIGHT + 14} text-anchor=end>{last} steps</text>"
    )
    caption = f"{text(stage)}: {points[0][1]:.3f} → {points[-1][1]:.3f} after {last} steps"
    size = f"width={LEFT + WIDTH} height={HEIGHT + FOOT}"
    return (
        f"<figure><figcaption>{caption}</figcaption><svg {size} role=img aria-label='{caption}'>{axes}"
        f"<polyline points='{line}'/></svg></figure>"
    )


def _figure(sources: Mapping[str, str], title: str, prompt: str, number: int, measured: Measured) -> str:
    """A playing clip; its name where the page has no place for it."""
    file = measured.files[number]
    source = sources.get(file)
    kind = "clip tiny" if measured.height < TINY else "clip"
    if source is None:
        shown = f"<code>{text(file)}</code>"
    elif file.endswith(".png"):
        shown = f"<img class='{kind}' alt='{text(prompt)}' src='{source}'>"
    else:
        shown = f"<video class='{kind}' autoplay loop muted playsinline src='{source}'></video>"
    return f"<figure><figcaption>{text(title)}</figcaption>{shown}{_verdict(prompt, number, measured)}</figure>"


def _verdict(prompt: str, number: int, measured: Measured) -> str:
    """The parts of a prompt of the embedded world, green where the clip shows them; else what was seen instead."""
    scene, scores = parse_caption(prompt), measured.scores[number]
    seen = (measured.seen[number] if measured.seen else None) or {}
    words = []
    for part in PARTS if scene else ():
        wanted = getattr(scene, part)
        if part not in scores:
            continue
        if scores[part]:
            words.append(f"<span class=good>{wanted}</span>")
        else:
            instead = f" {text(seen[part])}" if seen.get(part) else ""
            words.append(f"<span class=bad><s>{wanted}</s>{instead}</span>")
    return f"<span class=words>{' '.join(words)}</span>" if words else ""
