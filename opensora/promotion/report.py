"""A verdict as the Markdown page that lies beside gate.json and in the run."""

from collections.abc import Mapping
from typing import Any


def describe(verdict: Mapping[str, Any]) -> str:
    """What was decided, what became of the alias, and every check with its reason."""
    tried, champion = verdict.get("dry_run", False), verdict["champion"]
    outcome = f"would be {verdict['verdict']} (dry run)" if tried else verdict["verdict"]
    lines = [f"# {verdict['model']}: {outcome}", ""]
    if verdict["version"]:
        lines += [f"Version {verdict['version']} carries the alias `{verdict['alias']}`."]
    if verdict["verdict"] != "promoted" or tried:
        kept = f"version {champion} stays the champion" if champion else "there is no champion"
        lines += [f"Nothing was changed: {kept}."]
    elif champion and champion != verdict["version"]:
        lines += [f"It was on version {champion} before; `opensora rollback` brings that back."]
    lines += [f"{note}." for note in verdict.get("notes", [])]
    lines += ["", "| | check | | reason |", "|---|---|---|---|"]
    for number, check in enumerate(verdict["checks"], 1):
        name = f"{check['kind']} {_code(check['metric'])}".strip()
        mark = "passed" if check["passed"] else "**failed**"
        lines.append(f"| {number} | {name} | {mark} | {_cell(check['reason'])} |")
    return "\n".join([*lines, "", f"Checkpoint `{verdict['checkpoint']}`, sha256 `{verdict['sha256']}`.", ""])


def _code(text: str) -> str:
    return f"`{text}`" if text else ""


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")
