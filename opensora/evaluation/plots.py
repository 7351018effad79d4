"""Tables for `dvc plots`: losses, scores by stage, scores by prompt; dvc.yaml says how they are drawn."""

import csv
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from opensora.evaluation.scores import DISTANCES, Measured, primary

MAX_POINTS = 60  # of a curve, each the mean of as many steps
Curve = Sequence[tuple[int, float]]  # step, loss


def write_plots(
    folder: Path,
    prompts: Sequence[str],
    stages: Mapping[str, Measured],
    curves: Mapping[str, Curve],
) -> None:
    """Write the tables into `folder`.

    Args:
        stages: in order; single prompts are shown of the last one.
        curves: losses by stage.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for stage, curve in curves.items():
        _write(folder / f"loss_{stage}.csv", ("step", "loss"), averaged(curve))
    named = [
        (f"{name}, {stage}", name, value) for stage, found in stages.items() for name, value in found.metrics.items()
    ]
    rows = [(title, value) for title, name, value in named if not name.startswith(DISTANCES)]
    _write(folder / "scores.csv", ("score", "value"), sorted(rows))
    rows = [(title, value) for title, name, value in named if name.startswith(DISTANCES)]
    _write(folder / "distances.csv", ("distance", "value"), sorted(rows))
    last = list(stages.values())[-1].scores
    measure = primary(last[0])
    lines = [(prompt, measure, row[measure]) for prompt, row in zip(prompts, last, strict=True) if measure in row]
    _write(folder / "prompts.csv", ("prompt", "measure", "value"), lines)


def averaged(curve: Curve) -> list[tuple[int, float]]:
    """Means over equal runs of steps: single steps of a diffusion loss are mostly noise."""
    size = max(1, len(curve) // MAX_POINTS)
    runs = [curve[start : start + size] for start in range(0, len(curve), size)]
    return [(run[-1][0], sum(loss for _, loss in run) / len(run)) for run in runs]


def _write(path: Path, head: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    with path.open("w", newline="", encoding="utf-8") as handle:
        writer = csv.writer(handle)
        writer.writerow(head)
        writer.writerows(rows)
