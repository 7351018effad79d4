"""What a finished chain reached, in the few lines that a user wants to see first."""

import json
import os
import shlex
import shutil
import sys
from pathlib import Path

from opensora.config import TRAIN_STEPS, Config
from opensora.step import StepError
from opensora.tracking.store import store_name

PROMPT = "a red circle moving left"  # of the embedded world


def describe(config: Config, root: Path) -> str:
    """Scores by stage, registry version and alias, and where to look.

    Raises:
        StepError: the chain has not finished.
    """
    base = root / config.profile
    try:
        metrics = json.loads((base / "evaluate" / "metrics.json").read_text())
        gate = json.loads((base / "promote" / "gate.json").read_text())
    except FileNotFoundError as error:
        raise StepError(f"the chain has not finished: {error.filename} is missing; `opensora run` goes on") from error
    lines = []
    for stage in TRAIN_STEPS:
        seen, held = (metrics.get(f"{stage}_prompt_following_{part}") for part in ("seen", "held_out"))
        if seen is not None:
            score = f"{seen:.0%} of seen prompts" + (f", {held:.0%} of held-out ones" if held is not None else "")
        else:
            score = "prompt-following is measured on the embedded world only"
        lines.append(f"{stage:<14} {score}")
    if gate["verdict"] == "promoted":
        lines.append(f"registry       {gate['model']} version {gate['version']}, alias {gate['alias']}")
    else:
        failed = [check["reason"] for check in gate["checks"] if not check["passed"]]
        lines.append("registry       not promoted: " + "; ".join(failed))
    lines.append(f"gallery        {base / 'evaluate' / 'gallery.html'}")
    lines.append(f"checkpoint     {base / TRAIN_STEPS[-1] / 'checkpoints'}")
    prompt = (list(config.evaluate.prompts) or [PROMPT])[0]
    generate = f"generate --checkpoint {base / TRAIN_STEPS[-1]} --prompt {shlex.quote(prompt)}"
    lines.append(f"generate       {_command('opensora')} {generate}")
    store = store_name(root)
    page = f"{_command('mlflow')} ui --host 127.0.0.1 --backend-store-uri {store}"
    lines.append(f"runs           {page if store.startswith('sqlite:') else store}")
    return "\n".join(lines)


def _command(name: str) -> str:
    """How to call a program of this environment from here."""
    return name if shutil.which(name) else os.path.relpath(Path(sys.executable).parent / name)
