"""Is a step fit to change the weights? Losses and gradient norms that are not, and what follows from them.

Pure logic: the loop asks every process for its verdict, all take the one that any process found, and all tell theirs to
`Health`, which so holds the same in each of them.
"""

import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from opensora.config import TrainConfig
from opensora.step import StepError

BAD_STEPS = "bad_steps.jsonl"
WARM_UP = 50  # good steps before a norm is called a spike
MEMORY = 100  # good steps that the running mean and deviation look back over
NEVER_A_SPIKE = 3.0  # growth of the norm above its mean that is always accepted
WINSORIZED = 3.0  # deviations at which an accepted norm is cut before it counts: one outlier hides no other
DEVIATION = math.sqrt(math.pi / 2)  # standard deviations a mean absolute deviation, of normal numbers
TINY = 1e-30  # norms below, as of a step without gradients, count as this


class Health:
    """Judges steps, records the bad ones, and says when to go back to a checkpoint and which data to pass over.

    A step is bad when loss or gradient norm are not finite, or when the logarithm of the norm lies more than
    `spike_deviations` above its running mean. Norms of training are about log-normal, and over a run they change by
    orders of magnitude: in deviations of the norm itself a good step of a small batch can look like a spike.

    `bad_steps.jsonl` is only ever appended to, a line an event, each on disk before the run goes on: a bad step with
    its clips, or a rollback with the data positions that are passed over from then on. A run that is killed and started
    again reads them there, also when its newest checkpoint is older. Steps that are done again are written again.

    Attributes:
        skip: positions in the data that are passed over.
        rollbacks: how often the run went back.
    """

    def __init__(self, config: TrainConfig, folder: Path, rank: int = 0) -> None:
        """Read what `folder` holds of an earlier start; only rank 0 writes there."""
        self.config, self.rank = config, rank
        self.path = folder / BAD_STEPS
        self._mean = self._deviation = 0.0  # of the logarithm of the norm; the deviation is the mean absolute one
        self._good = 0
        self._streak: list[tuple[int, int]] = []  # (step, position) of the bad steps since the last good one
        lines = [line for line in _read_lines(self.path) if "rollback" in line]
        self.rollbacks = len(lines)
        self.skip = frozenset(position for line in lines for position in line["positions"])

    def judge(self, loss: float, norm: float) -> Literal["ok", "skip"]:
        """What this process thinks of a step; changes nothing.

        Args:
            loss: of this process.
            norm: of the gradients, before they were clipped; over all processes.
        """
        return "skip" if not (math.isfinite(loss) and math.isfinite(norm)) or norm > self.limit else "ok"

    @property
    def limit(self) -> float:
        """The largest norm that is no spike; infinite while there is none to compare with."""
        if self.config.spike_deviations is None or self._good < WARM_UP:
            return math.inf
        above = max(self.config.spike_deviations * DEVIATION * self._deviation, math.log(NEVER_A_SPIKE))
        return math.exp(min(self._mean + above, 700.0))

    def good(self, norm: float) -> None:
        """A step changed the weights."""
        self._streak.clear()
        self._good += 1
        value, share = math.log(max(norm, TINY)), 1 / min(self._good, MEMORY)
        distance = value - self._mean
        if self._good > WARM_UP:
            cut = WINSORIZED * DEVIATION * self._deviation
            distance = min(max(distance, -cut), cut) if cut else distance
        self._mean += share * distance
        if self._good > 1:
            self._deviation += (abs(distance) - self._deviation) / min(self._good - 1, MEMORY)

    def bad(self, step: int, position: int, clip_ids: Sequence[str], loss: float, norm: float) -> None:
        """A step was skipped.

        Args:
            step: number of steps done before it.
            position: of its samples in the data.
            clip_ids: of all processes.
        """
        self._streak.append((step, position))
        values = {"loss": loss, "gradient_norm": norm, "largest_norm": self.limit}
        numbers = {name: value if math.isfinite(value) else str(value) for name, value in values.items()}
        self._append({"step": step, "position": position, **numbers, "clip_ids": list(clip_ids)})

    @property
    def must_roll_back(self) -> bool:
        """Whether `max_bad_steps` steps in a row were bad."""
        return len(self._streak) >= self.config.max_bad_steps

    @property
    def first_bad_step(self) -> int:
        """The step at which the bad ones began: a checkpoint of more steps than these is no good one.

        Raises:
            IndexError: the last step was not bad.
        """
        return self._streak[0][0]

    def roll_back(self, step: int) -> None:
        """Pass over the data of the last bad steps from now on; called before the checkpoint is loaded.

        Args:
            step: the one that the run goes back to.

        Raises:
            StepError: the run went back `max_rollbacks` times before.
        """
        steps = [bad for bad, _ in self._streak]
        if self.rollbacks >= self.config.max_rollbacks:
            raise StepError(
                f"steps {steps[0]} to {steps[-1]} were bad, and the run has gone back {self.rollbacks} times "
                f"(max_rollbacks={self.config.max_rollbacks}); lower lr, look at the clips in {self.path}, or set "
                "spike_deviations to null where their norms are as they should be"
            )
        positions = [position for _, position in self._streak]
        self.rollbacks += 1
        self.skip |= frozenset(positions)
        self._streak.clear()
        self._append({"rollback": self.rollbacks, "to_step": step, "bad_steps": steps, "positions": positions})

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps, JSON; positions to pass over stand in the file instead, as they outlive it.

        Steps that follow do not change it: it is written while they are trained.
        """
        return {"mean": self._mean, "deviation": self._deviation, "good": self._good, "streak": list(self._streak)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what a checkpoint kept."""
        self._mean, self._deviation, self._good = state["mean"], state["deviation"], state["good"]
        self._streak = [(step, position) for step, position in state["streak"]]

    def _append(self, line: Mapping[str, object]) -> None:
        if self.rank:
            return
        with self.path.open("a+b") as handle:
            torn = handle.seek(0, os.SEEK_END) and _last_byte(handle.fileno()) != b"\n"
            handle.write(b"\n" * bool(torn) + json.dumps(line).encode() + b"\n")
            handle.flush()
            os.fsync(handle.fileno())


def _last_byte(descriptor: int) -> bytes:
    return os.pread(descriptor, 1, os.fstat(descriptor).st_size - 1)


def _read_lines(path: Path) -> list[dict[str, Any]]:
    """The lines of the file, but for one that a kill has torn."""
    if not path.is_file():
        return []
    found = []
    for text in path.read_text().splitlines():
        try:
            found.append(json.loads(text))
        except json.JSONDecodeError:
            continue
    return found
