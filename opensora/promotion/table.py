"""The registry of one model as a table and as JSON: versions, aliases, scores, lineage, what was taken back and why."""

import json
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

from opensora.config import Gate
from opensora.promotion.evidence import damage_of
from opensora.promotion.gate import CODE, DATA
from opensora.tracking.registry import (
    CHECKPOINT_SHA256,
    CHECKPOINT_URI,
    METRICS_TAG,
    PREVIOUS,
    RESTORED,
    ROLLED_BACK,
    Version,
    versions,
)
from opensora.tracking.version_files import find_here, is_uploaded

if TYPE_CHECKING:
    from rich.table import Table

LINEAGE = (*CODE, "git_dirty", *DATA)


def list_versions(root: Path, model: str, verify: bool = False) -> list[dict[str, object]]:
    """A record a version, newest first.

    Args:
        verify: read every file of every version that is on this machine; otherwise only look for its folder.
    """
    return [_record(version, _problem(root, model, version, verify)) for version in versions(root, model)]


def _problem(root: Path, model: str, version: Version, verify: bool) -> str:
    """What is wrong with a version's files; nothing is fetched to find out."""
    if find_here(root, model, version):
        return damage_of(root, model, version, fetch=False) if verify else ""
    if is_uploaded(root, version):
        return "not verified: in the server's store and not on this machine" if verify else ""
    return f"nothing at {version.tags.get(CHECKPOINT_URI, '?')}"


def _record(version: Version, problem: str) -> dict[str, object]:
    tags = version.tags
    return {
        "version": version.version,
        "aliases": list(version.aliases),
        "registered": datetime.fromtimestamp(version.created / 1000, UTC).isoformat(timespec="seconds"),
        "stage": tags.get("stage", ""),
        "metrics": _json(tags.get(METRICS_TAG)),
        "lineage": {name: tags[name] for name in LINEAGE if name in tags},
        "sha256": tags.get(CHECKPOINT_SHA256, ""),
        "checkpoint": tags.get(CHECKPOINT_URI, ""),
        "problem": problem,
        "previous_champion": tags.get(PREVIOUS, ""),
        "rolled_back": _json(tags.get(ROLLED_BACK)),
        "restored": _json(tags.get(RESTORED)),
    }


def _json(text: str | None) -> dict:
    """A tag's value; empty where it holds none, as in a version that somebody else registered."""
    try:
        value = json.loads(text or "{}")
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}


def make_table(model: str, records: Sequence[dict], gates: Sequence[Gate]) -> "Table":
    """What a terminal shows: of the metrics those that the profile's gates name."""
    from rich import box
    from rich.table import Table

    table = Table(title=model, box=box.SIMPLE_HEAD, title_justify="left", title_style="bold", padding=(0, 1))
    for name in ("version", "registered", "scores", "lineage", "said of it"):
        table.add_column(name, overflow="fold", vertical="top")
    for record in records:
        table.add_row(
            "\n".join([record["version"], *record["aliases"]]),
            "\n".join([*record["registered"].removesuffix("+00:00").split("T"), record["stage"]]),
            "\n".join(_scores(record["metrics"], gates)),
            "\n".join([*_lineage(record["lineage"]), f"sha256 {record['sha256'][:12]}"]),
            "\n".join(_remarks(record)),
        )
    return table


def _scores(metrics: dict, gates: Sequence[Gate]) -> list[str]:
    known = [(gate.metric, metrics.get(gate.metric)) for gate in gates]
    return [f"{value:.4g} {name}" for name, value in known if isinstance(value, int | float)]


def _lineage(values: dict[str, str]) -> list[str]:
    """The commit, a plus where files differed from it, and what says which data."""
    dirty = "+" if values.get("git_dirty") == "true" else ""
    shown = {name: value for name, value in values.items() if name != "git_dirty"}
    return [f"{name} {value[:12]}{dirty if name == 'git_commit' else ''}" for name, value in shown.items()]


def _remarks(record: dict) -> list[str]:
    remarks = (
        [f"after version {record['previous_champion']}"] if record["previous_champion"] not in ("", "none") else []
    )
    for key, verb, way in (("rolled_back", "taken back for", "to"), ("restored", "brought back after", "from")):
        if event := record[key]:
            why = f": {event['reason']}" if event.get("reason") else ""
            remarks.append(f"{verb} version {event.get(way)} by {event.get('by')}, {event.get('at')}{why}")
    return [*remarks, record["problem"]] if record["problem"] else remarks
