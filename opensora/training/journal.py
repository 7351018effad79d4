"""The loss of every step in losses.jsonl: a line a step, cut to the checkpoint that a run resumes from."""

import json
import math
from pathlib import Path

LOSSES = "losses.jsonl"


class Journal:
    """losses.jsonl in `folder`; lines are flushed, so that a killed process has written all of its steps."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / LOSSES
        self._file = self.path.open("a", buffering=1)

    def record(self, step: int, loss: float, skipped: bool = False) -> None:
        """One more step; a loss that is not finite is null, as JSON has no NaN."""
        line: dict[str, object] = {"step": step, "loss": loss if math.isfinite(loss) else None}
        self._file.write(json.dumps(line | ({"skipped": True} if skipped else {})) + "\n")

    def cut(self, step: int) -> None:
        """Forget what was recorded past `step`: those steps come again."""
        self._file.close()
        lines = self.path.read_text().splitlines()[:step]  # one a step; only the last can be torn
        part = self.path.with_name(LOSSES + ".part")
        part.write_text("".join(line + "\n" for line in lines))
        part.replace(self.path)
        self._file = self.path.open("a", buffering=1)

    def close(self) -> None:
        """Write no more."""
        self._file.close()
