"""The report of a data set: one HTML page that stands alone, with counts, histograms and thumbnails."""

import base64
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from opensora.config import ScoreConfig
from opensora.data.reporting.charts import Limit, histogram
from opensora.data.reporting.markup import STYLE, bar, key, length, number, share, size, table
from opensora.data.reporting.survey import GENERATED_WORDS, GIVEN_WORDS, Count, Survey, list_files, survey
from opensora.data.reporting.thumbnails import make_strips
from opensora.manifest import GIVEN, Clip
from opensora.page import text, write_page

KEPT_SHOWN, DROPPED_SHOWN = 12, 6  # clips with pictures: of the kept, and of each reason
LINES = 12  # rows of a table, the rest is summed
WORDS = 36
IMAGE_BYTES = 3_500_000  # of all pictures together; base64 makes them a third larger
COMMON = (
    " a an and are as at be by for from has he her his in into is it its of on or she that the their them there they "
    "this to was while who with "
)
NAMES = {
    "duration_s": "Duration, seconds",
    "short_side": "Shorter side, pixels",
    "black": "Black, share of pixels",
    "brightness": "Brightness, 0…255",
    "frame_difference": "Change between frames, 0…255",
    "sharpness": "Sharpness, variance of the Laplacian",
    "motion": "Motion, share of the diagonal a second",
    "aesthetic": "Aesthetic score",
    "text_match": "Match of frames and caption, cosine",
}


@dataclass(frozen=True)
class Written:
    """A finished page and what it says in short."""

    path: Path
    summary: str  # lines for a terminal


def write_report(path: Path, base: Path, config: ScoreConfig, workers: int = 1) -> Written:
    """Write the page on the data steps that have finished below `base`.

    Args:
        config: its thresholds are drawn into the histograms.
        workers: processes that decode clips for the pictures.

    Raises:
        StepError: no data step has finished.
        ManifestError: a part of the last step's manifest is damaged or foreign.
    """
    facts = survey(base, max(KEPT_SHOWN, DROPPED_SHOWN))
    dropped = {reason: sample.items()[:DROPPED_SHOWN] for reason, sample in facts.dropped_clips.items()}
    groups = [facts.kept_clips.items()[:KEPT_SHOWN], *dropped.values()]
    # The first of every group come first: a page that is full has some of each.
    order = [group[place] for place in range(KEPT_SHOWN) for group in groups if place < len(group)]
    strips = make_strips(base / "split", [clip for clip in order if clip.shard], workers, IMAGE_BYTES)
    parts = {
        "": _head(base.name, facts),
        "Steps": _steps(facts),
        "Why rows were dropped": _reasons(facts),
        "Scores": _scores(facts, config),
        "Sizes and rates": _sizes(facts),
        "Captions": _captions(facts),
        "Kept clips": f"<div class=clips>{''.join(_card(clip, strips) for clip in groups[0])}</div>",
        "Dropped clips": _dropped_clips(facts, dropped, strips),
        "Licences and sources": _origins(facts),
        "Files": _files(base),
    }
    parts = {title: part for title, part in parts.items() if part}
    links = "".join(f"<a href='#{_anchor(title)}'>{title}</a>" for title in parts if title)
    body = parts.pop("") + f"<nav>{links}</nav>"
    body += "".join(f"<section><h2 id='{_anchor(title)}'>{title}</h2>{part}</section>" for title, part in parts.items())
    write_page(path, f"Data report · {base.name}", body, STYLE)
    return Written(path, _summary(facts))


def _anchor(title: str) -> str:
    return title.lower().replace(" ", "-")


def _summary(facts: Survey) -> str:
    whole = facts.whole
    lines = [f"{facts.last.name}: {whole.kept:,} of {whole.total:,} rows kept, {length(whole.kept_s)} of video"]
    for reason, count in sorted(facts.reasons.items(), key=lambda item: -item[1].dropped):
        lines.append(f"  {reason:<24} {count.dropped:>9,}  {share(count.dropped, whole.total):>7}")
    return "\n".join([*lines, *(f"note: {note}" for note in _notes(facts))])


def _notes(facts: Survey) -> list[str]:
    return [
        f"{name} finished after the steps that read it; if it ran again since, run those again too"
        for name in facts.stale
    ]


def _head(profile: str, facts: Survey) -> str:
    whole, last = facts.whole, facts.last
    when = time.strftime("%Y-%m-%d %H:%M", time.localtime(last.finished))
    tiles = {
        "rows kept" if last.name == "download" else "clips kept": number(whole.kept),
        "of video": length(whole.kept_s),
        "of all rows": share(whole.kept, whole.total),
        "videos listed": number(facts.steps[0].report.total),
        "with a caption": share(sum(count.kept for count in facts.models.values()), whole.kept),
    }
    shown = "".join(f"<div class=tile><b>{value}</b>{name}</div>" for name, value in tiles.items())
    notes = "".join(f"<p class=note>{text(note)}</p>" for note in _notes(facts))
    said = f"After the step <b>{last.name}</b>, finished {when}."
    return f"<h1>Data report · {text(profile)}</h1><p class=quiet>{said}</p>{notes}<div class=tiles>{shown}</div>"


def _steps(facts: Survey) -> str:
    most = max(step.hours for step in facts.steps)
    rows = []
    for step in facts.steps:
        report = step.report
        kind = "videos" if step.name == "download" else "clips"
        reasons = ", ".join(f"{number(count)} {text(reason)}" for reason, count in sorted(step.dropped.items()))
        rows.append(
            [
                step.name,
                f"{number(report.kept)} {kind}",
                bar(step.hours, 0, most),
                length(step.hours * 3600),
                reasons or "–",
                length(report.seconds),
                f"{report.peak_memory_mib:,.0f} MiB",
            ]
        )
    head = ["step", "kept", "<span class=quiet>share of hours</span>", "video", "dropped here", "took", "peak memory"]
    return table(head, rows, words=(0, 2, 4))


def _reasons(facts: Survey) -> str:
    if not facts.reasons:
        return "<p>Nothing was dropped.</p>"
    ordered = sorted(facts.reasons.items(), key=lambda item: -item[1].dropped)
    top = ordered[0][1].dropped
    steps = {reason: [step.name for step in facts.steps if reason in step.dropped] for reason, _ in ordered}
    rows = [
        [
            f"<a href='#dropped-{index}'>{text(reason)}</a>",
            ", ".join(steps[reason]),
            bar(0, count.dropped, top),
            number(count.dropped),
            share(count.dropped, facts.whole.total),
            length(count.dropped_s),
        ]
        for index, (reason, count) in enumerate(ordered)
    ]
    return table(["reason", "step", "", "rows", "of all", "video"], rows, words=(0, 1, 2))


def _limits(name: str, config: ScoreConfig) -> list[Limit]:
    """Thresholds are named after their score: `min_motion` and `max_motion` are those of `motion`."""
    limits = [(kind, getattr(config, f"{kind}_{name}", None)) for kind in ("min", "max")]
    return [Limit(float(value), f"{kind} {value:g}") for kind, value in limits if value is not None]


def _scores(facts: Survey, config: ScoreConfig) -> str:
    kept, dropped = facts.values[True], facts.values[False]
    rows = kept.items(), dropped.items()
    weights = (kept.seen / max(1, len(rows[0])), dropped.seen / max(1, len(rows[1])))
    names = list(dict.fromkeys(name for row in (*rows[0], *rows[1]) for name in row))
    charts = []
    for name in names:
        if name not in (GIVEN_WORDS, GENERATED_WORDS):
            first, second = (_column(part, name) for part in rows)
            if len(first) or len(second):
                charts.append(histogram(NAMES.get(name, name), first, second, weights, _limits(name, config)))
    if not charts:
        return ""
    said = "Under each name: 5th percentile, median, 95th. Dashed: the thresholds of params.yaml."
    if max(weights) > 1:
        said += f" Bars are drawn from a sample of {len(rows[0]):,} kept and {len(rows[1]):,} dropped rows."
    return f"<p class=quiet>{said}</p>{key()}<div class=charts>{''.join(charts)}</div>"


def _column(rows: Sequence[Mapping[str, float]], name: str) -> np.ndarray:
    values = np.array([row[name] for row in rows if name in row])
    return values[np.isfinite(values)]


def _counts(title: str, counts: Mapping[str, Count]) -> str:
    """The most frequent entries, kept and dropped."""
    ordered = sorted(counts.items(), key=lambda item: (-item[1].total, item[0]))
    shown, rest = ordered[:LINES], ordered[LINES:]
    if rest:
        summed = Count(*(sum(getattr(count, part) for _, count in rest) for part in Count.__dataclass_fields__))
        shown.append((f"{len(rest):,} others", summed))
    top = max((count.total for _, count in shown), default=0)
    rows = [
        [
            text(name),
            bar(count.kept, count.dropped, top),
            number(count.kept),
            number(count.dropped),
            length(count.kept_s),
        ]
        for name, count in shown
    ]
    return table([title, "", "kept", "dropped", "video kept"], rows, words=(0, 1))


def _sizes(facts: Survey) -> str:
    if not facts.sizes:
        return ""
    sizes = _counts("width × height", facts.sizes)
    return f"{key()}<div class=two>{sizes}{_counts('frames a second', facts.rates)}</div>"


def _captions(facts: Survey) -> str:
    if not facts.models:
        return ""
    sample = facts.values[True]
    rows = sample.items()
    weight = sample.seen / max(1, len(rows))
    given, generated = (_column(rows, name) for name in (GIVEN_WORDS, GENERATED_WORDS))
    legend = ("given with the video", "generated")
    chart = histogram("Words a caption", given, generated, (weight, weight), legend=legend)
    models = sorted(facts.models.items(), key=lambda item: -item[1].kept)
    by_model = table(
        ["written by", "clips", "of kept"],
        [
            [
                "given with the video" if name == GIVEN else text(name),
                number(count.kept),
                share(count.kept, facts.whole.kept),
            ]
            for name, count in models
        ],
    )
    words = _words(facts.captions.items())
    return f"<div class=other>{key(*legend)}<div class=two>{chart}<div>{by_model}</div></div></div>{words}"


def _words(captions: Sequence[str]) -> str:
    """The words that most captions hold."""
    counts = Counter(
        word
        for caption in captions
        for word in {part.strip(".,;:!?\"'()").lower() for part in caption.split()}
        if word and f" {word} " not in COMMON
    )
    shown = "".join(
        f"<span>{text(word)} <small>{share(count, len(captions))}</small></span>"
        for word, count in counts.most_common(WORDS)
    )
    return f"<h3>Most common words, by the share of captions that hold them</h3><div class=words>{shown}</div>"


def _card(clip: Clip, strips: Mapping[str, bytes]) -> str:
    picture = ""
    if clip.clip_id in strips:
        data = base64.b64encode(strips[clip.clip_id]).decode()
        said = f"start, middle and end of clip {clip.clip_id}" + (f": {clip.caption}" if clip.caption else "")
        picture = f"<img loading=lazy alt='{text(said)}' src='data:image/webp;base64,{data}'>"
    why = "" if clip.kept else f"<span class=why>{text(clip.reason)}</span>"
    caption = f"<span>{text(clip.caption)}</span>" if clip.caption else ""
    about = f"{clip.start_s:.2f}–{clip.end_s:.2f} s · {clip.width}×{clip.height} · {clip.fps:.4g} fps · {clip.licence}"
    scores = " · ".join(f"{name.replace('_', ' ')} {number(value)}" for name, value in clip.scores.items())
    scores = f"<details><summary>scores</summary>{text(scores)}</details>" if scores else ""
    origin = f"<small title='{text(clip.source)}'>{text(_short(clip.source))} · {text(about)}</small>"
    name = f"<code>{text(clip.clip_id)}</code>"
    return f"<figure class=clip>{picture}<figcaption>{why}{caption}{origin}{scores}{name}</figcaption></figure>"


def _short(source: str, most: int = 90) -> str:
    """The end of a long address tells more than its start."""
    return source if len(source) <= most else "…" + source[-most:]


def _dropped_clips(facts: Survey, groups: Mapping[str, Sequence[Clip]], strips: Mapping[str, bytes]) -> str:
    ordered = sorted(facts.reasons.items(), key=lambda item: -item[1].dropped)
    parts = []
    for index, (reason, count) in enumerate(ordered):
        clips = [clip for clip in groups[reason] if clip.clip_id in strips]
        rest = [clip for clip in groups[reason] if clip.clip_id not in strips]
        parts.append(f"<h3 id='dropped-{index}'>{text(reason)} <small>{number(count.dropped)}</small></h3>")
        if clips:
            parts.append(f"<div class=clips>{''.join(_card(clip, strips) for clip in clips)}</div>")
        if rest:
            rows = [[text(clip.source), text(clip.reason)] for clip in rest]
            parts.append(table(["source", "reason"], rows, words=(0, 1)))
    return "".join(parts)


def _origins(facts: Survey) -> str:
    licences, places = _counts("licence", facts.licences), _counts("host or folder", facts.places)
    return f"{key()}<div class=two>{licences}{places}</div>"


def _files(base: Path) -> str:
    rows = [
        [
            text(files.kind),
            number(len(files.sizes)),
            size(sum(files.sizes)),
            f"{size(min(files.sizes))} – {size(max(files.sizes))}",
        ]
        for files in list_files(base)
        if files.sizes
    ]
    return table(["kind", "files", "in all", "a file"], rows)
