"""Which run a step logs to: a chain is a parent run with a child a step, whatever processes and pods run it.

`WORKDIR/<profile>/.mlflow/current.json` names the chain at work and the newest run of each step. All processes and pods
of a pipeline see that folder, and take turns in changing the file.
"""

import json
import uuid
from pathlib import Path
from typing import Any

from opensora.step import write_json
from opensora.tracking.spool import LOCK, alone

CURRENT = "current.json"
MARK = "tracking.json"  # in a step's folder: the run that made it


def join_chain(base: Path, step: str, folder: Path) -> tuple[Path, bool]:
    """The spool's folder of the run that `step` is to log to, and whether that run goes on.

    A stopped step whose work folder is still there goes on in its own run, even if another chain has begun meanwhile.
    Otherwise a chain has one run a step: a step that it has already begins the next chain.

    Args:
        base: `WORKDIR/<profile>/.mlflow`.
        folder: where the step works.
    """
    base.mkdir(parents=True, exist_ok=True)
    with alone(base / LOCK):
        state = _read(base)
        newest = state["steps"].get(step)
        goes_on = newest is not None and newest["status"] == "open" and _marked(folder) == (newest["chain"], step)
        if goes_on:
            chain = newest["chain"]
        else:
            if not state["chain"] or (newest and newest["chain"] == state["chain"]):
                state["chain"] = new_chain()
            chain = state["chain"]
        state["steps"][step] = {"chain": chain, "status": "open"}
        write_json(base / CURRENT, state)
    write_json(folder / MARK, {"chain": chain, "step": step})
    place = base / chain / step
    place.mkdir(parents=True, exist_ok=True)
    return place, goes_on


def new_chain() -> str:
    """A name for a parent run and its folder."""
    return uuid.uuid4().hex[:12]


def finish_step(place: Path) -> None:
    """Remember that the run of that spool is done."""
    base, chain, step = place.parent.parent, place.parent.name, place.name
    with alone(base / LOCK):
        state = _read(base)
        if state["steps"].get(step, {}).get("chain") == chain:  # else somebody has begun it anew
            state["steps"][step]["status"] = "finished"
            write_json(base / CURRENT, state)


def _read(base: Path) -> dict[str, Any]:
    try:
        state = json.loads((base / CURRENT).read_text())
        steps = {name: {"chain": item["chain"], "status": item["status"]} for name, item in state["steps"].items()}
        return {"chain": state["chain"], "steps": steps}
    except (FileNotFoundError, ValueError, KeyError, TypeError, AttributeError):  # none yet, or of another version
        return {"chain": "", "steps": {}}


def _marked(folder: Path) -> tuple[str, str] | None:
    try:
        mark = json.loads((folder / MARK).read_text())
        return mark["chain"], mark["step"]
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return None
