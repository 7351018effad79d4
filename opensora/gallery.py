"""The gallery: one self-contained HTML page with the playing clips of every stage, scores and loss curves."""

import base64
from collections.abc import Mapping, Sequence
from pathlib import Path

from opensora.demo.shapes import held_out_scenes, parse_caption
from opensora.page import text, write_page

STYLE = """
:root { --good: #1a8f4c; }
h1 { font-size: 1.5rem; margin-bottom: .2rem; } h2 { font-size: 1.1rem; margin-top: 2rem; }
td, th { padding: .35rem .8rem; vertical-align: middle; }
video, .clip { width: 128px; height: 128px; image-rendering: pixelated; border-radius: 6px; display: block; }
.tag { font-size: .75rem; border: 1px solid var(--line); border-radius: 9px; padding: 0 .5em; margin-left: .4em; }
.good { color: var(--good); } .bad { color: var(--bad); } .curves { display: flex; flex-wrap: wrap; gap: 1.5rem; }
.curves figure { margin: 0; } polyline { fill: none; stroke: #3b82f6; stroke-width: 1.5; } figcaption { opacity: .8; }
"""
SCORES = {
    "prompt_following_seen": "whole prompts right (seen)",
    "prompt_following_held_out": "whole prompts right (held out)",
    "colour": "colour right",
    "shape": "shape right",
    "direction": "direction right",
    "fd_randconv": "Fréchet distance (randconv)",
    "flicker": "flicker (1: none)",
    "dynamic_degree": "dynamic degree",
    "motion_smoothness": "motion smoothness",
}
SHARES = {"prompt_following_seen", "prompt_following_held_out", "colour", "shape", "direction"}
WIDTH, HEIGHT = 300, 120  # of a curve
MAX_POINTS = 60  # each the mean of as many steps


def write_gallery(
    path: Path,
    prompts: Sequence[str],
    results: Mapping[str, Sequence[dict]],
    metrics: Mapping[str, float],
    curves: Mapping[str, Sequence[tuple[int, float]]],
    folder: Path,
) -> None:
    """Write the page.

    Args:
        results: rows of `evaluate` by stage, in the prompts' order; their files lie below `folder`.
        metrics: flat, `<stage>_<metric>`.
        curves: (step, loss) by stage.
    """
    stages = list(results)
    body = [
        "<h1>What each stage makes of the same prompts</h1>",
        f"<p>{len(prompts)} prompts, {len(stages)} stages, the same seeds.</p>",
        _score_table(stages, metrics),
        "<h2>Losses</h2><div class=curves>",
        *(_curve(stage, points) for stage, points in curves.items() if len(points) > 1),
        "</div><h2>Clips</h2><table><tr><th>prompt</th>",
        *(f"<th>{text(stage)}</th>" for stage in stages),
        "</tr>",
    ]
    held_out = {scene.caption for scene in held_out_scenes()}
    for index, prompt in enumerate(prompts):
        tag = "<span class=tag>held out</span>" if prompt in held_out else ""
        cells = "".join(f"<td>{_clip(folder, prompt, results[stage][index])}</td>" for stage in stages)
        body.append(f"<tr><td>{text(prompt)}{tag}</td>{cells}</tr>")
    body.append("</table>")
    write_page(path, "Gallery", "".join(body), STYLE)


def _score_table(stages: Sequence[str], metrics: Mapping[str, float]) -> str:
    rows = ["<table><tr><th></th>" + "".join(f"<th>{text(stage)}</th>" for stage in stages) + "</tr>"]
    for name, label in SCORES.items():
        values = [metrics.get(f"{stage}_{name}") for stage in stages]
        if all(value is None for value in values):
            continue
        cells = "".join(f"<td class=n>{_number(name, value)}</td>" for value in values)
        rows.append(f"<tr><td>{label}</td>{cells}</tr>")
    if "caption_exact_match" in metrics:
        share = f"{metrics['caption_exact_match']:.0%}"
        rows.append(f"<tr><td>captions by LLaVA exactly right</td><td class=n colspan={len(stages)}>{share}</td></tr>")
    return "".join(rows) + "</table>"


def _number(name: str, value: float | None) -> str:
    if value is None:
        return "–"
    return f"{value:.0%}" if name in SHARES else f"{value:.3f}"


def _curve(stage: str, points: Sequence[tuple[int, float]]) -> str:
    points = _averaged(points)
    last, top = points[-1][0], max(loss for _, loss in points)
    line = " ".join(f"{step / last * WIDTH:.1f},{HEIGHT - loss / top * HEIGHT:.1f}" for step, loss in points)
    caption = f"{text(stage)}: {points[0][1]:.3f} → {points[-1][1]:.3f} after {last} steps"
    return (
        f"<figure><svg width={WIDTH} height={HEIGHT} viewBox='0 0 {WIDTH} {HEIGHT}'><polyline points='{line}'/></svg>"
        f"<figcaption>{caption}</figcaption></figure>"
    )


def _averaged(points: Sequence[tuple[int, float]]) -> list[tuple[int, float]]:
    """Means over equal runs of steps: single steps of a diffusion loss are mostly noise."""
    size = max(1, len(points) // MAX_POINTS)
    runs = [points[start : start + size] for start in range(0, len(points), size)]
    return [(run[-1][0], sum(loss for _, loss in run) / len(run)) for run in runs]


def _clip(folder: Path, prompt: str, row: dict) -> str:
    data = base64.b64encode((folder / row["file"]).read_bytes()).decode()
    if row["file"].endswith(".png"):
        shown = f"<img class=clip alt='{text(prompt)}' src='data:image/png;base64,{data}'>"
    else:
        shown = f"<video autoplay loop muted playsinline src='data:video/mp4;base64,{data}'></video>"
    return shown + _verdict(prompt, row)


def _verdict(prompt: str, row: dict) -> str:
    """What the detector saw, green where it is what the prompt asked for."""
    scene = parse_caption(prompt)
    if scene is None or not row["seen"]:
        return ""
    parts = ["colour", "shape"] + (["direction"] if row["frames"] > 1 else [])
    words = [
        f"<span class={'good' if seen == getattr(scene, part) else 'bad'}>{seen or '?'}</span>"
        for part, seen in ((part, row["seen"][part]) for part in parts)
    ]
    return "<small>" + " ".join(words) + "</small>"
