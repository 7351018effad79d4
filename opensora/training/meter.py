"""What a run reports about itself: throughput, memory, and when it will be done."""

import resource
import time
from dataclasses import dataclass, field


@dataclass
class Meter:
    """Counts from one log line to the next."""

    total_steps: int
    tokens_per_sample: int
    step: int = 0
    samples: int = 0
    losses: float = 0.0
    since: float = field(default_factory=time.monotonic)

    def update(self, samples: int, loss: float) -> None:
        """One more step with that many samples, over all processes."""
        self.samples += samples
        self.losses += loss
        self.step += 1

    def read(self, remaining: int) -> dict[str, float]:
        """Mean loss and rates since the last reading, and the seconds that `remaining` steps take; starts anew."""
        now = time.monotonic()
        elapsed = max(now - self.since, 1e-9)
        rates = {
            "loss": self.losses / max(self.step, 1),
            "samples_per_second": self.samples / elapsed,
            "tokens_per_second": self.samples * self.tokens_per_sample / elapsed,
            "seconds_per_step": elapsed / max(self.step, 1),
            "peak_memory_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
            "eta_seconds": elapsed / max(self.step, 1) * remaining,
        }
        self.since, self.samples, self.step, self.losses = now, 0, 0, 0.0
        return rates
