"""Which clips make a batch: buckets of one shape each, and a plan of batches that is a function of the seed.

Shapes: `T` frames of a sample, `N` clips.
"""

from bisect import bisect_right
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass

import numpy as np

from opensora.data.clip_table import ClipTable
from opensora.step import StepError, fingerprint

MAX_UPSCALE = 1.125  # 480 lines may fill 512, which hardly shows; a clip that needs more is too small for a bucket
SAME_ASPECT = 1e-6  # difference of logarithms
ORDER, BATCHES, CROP, POSTERIOR, NOISE = 1, 2, 3, 4, 5  # what a random number is for; no two uses share a seed


@dataclass(frozen=True)
class Bucket:
    """Samples of one shape, which can stand in one batch."""

    frames: int
    height: int  # pixels
    width: int  # pixels
    batch_size: int = 1  # samples a process
    interval: int = 1  # clip frames from one sampled frame to the next

    @property
    def span(self) -> int:
        """Frames of a clip that a sample stretches over."""
        return (self.frames - 1) * self.interval + 1

    def __str__(self) -> str:
        return f"{self.frames}x{self.height}x{self.width} at interval {self.interval}"


@dataclass(frozen=True)
class Draw:
    """One sample: a row of the clip table for a bucket, and the seed of all that is random in it."""

    row: int
    bucket: int
    seed: tuple[int, int, int, int]  # (seed, epoch, bucket, place in the bucket's epoch): no other draw has it

    def random(self, use: int) -> np.random.Generator:
        """Random numbers for one use; all bits of the seed count, so that no two draws meet by chance."""
        return np.random.default_rng((*self.seed, use))

    def crop(self, frames: int, bucket: Bucket) -> slice:
        """A random temporal crop of a clip of `frames` frames; every start is equally likely."""
        start = int(self.random(CROP).integers(frames - bucket.span + 1))
        return slice(start, start + bucket.span, bucket.interval)

    def posterior_noise(self, shape: Sequence[int]) -> np.ndarray:
        """Standard normal float32 that draws the latents [T, C, h, w] from their means and deviations."""
        return self.random(POSTERIOR).standard_normal(tuple(shape), np.float32)

    @property
    def noise_seed(self) -> int:
        """For the noise and the timestep of diffusion; torch's CPU generator reads 32 bits."""
        return draw_seed(*self.seed, NOISE)


def draw_seed(*parts: int) -> int:
    """A 32-bit seed mixed from numbers such as (seed, step, rank)."""
    return int(np.random.SeedSequence(parts).generate_state(1)[0])


def assign(buckets: Sequence[Bucket], clips: ClipTable) -> tuple[np.ndarray, Counter[str]]:
    """The bucket of each clip, int16 [N], −1 for none; and why clips are in none: {"too short": 3}.

    A clip fits a bucket that it is long enough for, and that it covers without being scaled up by more than
    `MAX_UPSCALE`. Of those it goes where least is cut away: to the closest aspect ratio (difference of logarithms),
    among equals to the largest frames × height × width, so that what a clip has is used; then to the first.
    """
    best = np.full(len(clips), -1, np.int16)
    least = np.full(len(clips), np.inf)
    long_enough = np.zeros(len(clips), bool)
    aspects = np.log(clips.widths / clips.heights)
    by_volume = sorted(range(len(buckets)), key=lambda n: (-_volume(buckets[n]), n))
    for index in by_volume:
        bucket = buckets[index]
        is_long = clips.frames >= bucket.span
        upscale = np.maximum(bucket.height / clips.heights, bucket.width / clips.widths)
        waste = np.abs(aspects - np.log(bucket.width / bucket.height))
        better = is_long & (upscale <= MAX_UPSCALE) & (waste < least - SAME_ASPECT)
        best[better], least[better] = index, waste[better]
        long_enough |= is_long
    without = best < 0
    small = int((without & long_enough).sum())
    return best, Counter({"too short": int(without.sum()) - small, "too small": small}) + Counter()


def _volume(bucket: Bucket) -> int:
    return bucket.frames * bucket.height * bucket.width


class Plan:
    """All batches of a run, in order, as a function of (clips, buckets, seed, number of processes).

    A bucket's clips form an endless row: epoch after epoch, each in a random order of its own. It is cut into global
    batches of batch size × processes, so every batch is full, nothing is padded, and no clip comes again before all
    others have; what an epoch leaves over starts the next one's first batch. An epoch's batches are those that end in
    it, shuffled over all buckets. All processes take their share of the same global batch, so they are in the same
    bucket in every step: equal work, and no process waits in a collective that another does not enter.

    The seed of a draw is (seed, epoch, bucket, place in the epoch). Neither rank nor worker is part of it, because no
    place is given to two of them: no two draws of a run are the same, and, which seeds by rank and worker would not
    give, the samples do not depend on how many processes or loader workers there are.

    Where a step's batches begin follows from its number in closed form, so any position is restored exactly without
    drawing what lies before it, at the cost of the permutations of one or two epochs (8 bytes a clip each).

    Attributes:
        excluded: clips that no batch takes, by reason.
    """

    def __init__(self, clips: ClipTable, buckets: Sequence[Bucket], seed: int, world_size: int) -> None:
        """Assign the clips to buckets.

        Raises:
            StepError: no bucket has the clips for one batch.
        """
        self.buckets, self.seed, self.world_size = tuple(buckets), seed, world_size
        self.total = len(clips)
        self.folder = clips.folder
        self.data = fingerprint(clips.identity, [asdict(bucket) for bucket in buckets])
        bucket_of, self.excluded = assign(buckets, clips)
        self._rows = [np.flatnonzero(bucket_of == index) for index in range(len(buckets))]
        counts = [len(rows) for rows in self._rows]
        self._sizes = [bucket.batch_size * world_size for bucket in buckets]
        self._used = [index for index, count in enumerate(counts) if count >= self._sizes[index]]
        few = sum(counts) - sum(counts[index] for index in self._used)
        self.excluded += Counter({"too few for a batch": few})
        if not self._used:
            raise StepError(self._nothing(counts))
        self._orders: dict[tuple[int, int], np.ndarray] = {}

    def __len__(self) -> int:
        """Clips that are trained on."""
        return sum(len(self._rows[index]) for index in self._used)

    def steps_before(self, epoch: int) -> int:
        """Batches of each process in the epochs before `epoch`."""
        return sum(epoch * len(self._rows[index]) // self._sizes[index] for index in self._used)

    def epoch_of(self, step: int) -> int:
        """The epoch that the batch of `step` belongs to."""
        return bisect_right(range(step + 2), step, key=self.steps_before) - 1

    def batches(self, rank: int, step: int = 0) -> Iterator[list[Draw]]:
        """The draws of a process's batches from `step` on, without end."""
        epoch = self.epoch_of(step)
        skipped = step - self.steps_before(epoch)
        while True:
            batches = self._epoch(epoch)
            for index, number in batches[skipped:]:
                yield self._batch(int(index), int(number), rank)
            epoch, skipped = epoch + 1, 0

    def state_dict(self, step: int) -> dict[str, object]:
        """The position after `step` batches, and what it is a position in; JSON."""
        return {"step": step, "data": self.data, "seed": self.seed, "world_size": self.world_size}

    def load_state_dict(self, state: Mapping[str, object]) -> int:
        """The step to go on from.

        Raises:
            StepError: the position is one in another plan.
        """
        own = self.state_dict(0)
        for name, words in (("data", "clips or buckets"), ("seed", "seed"), ("world_size", "number of processes")):
            if state.get(name) != own[name]:
                raise StepError(
                    f"the saved position is one with another {words}: {state.get(name)}, and this run has {own[name]} "
                    f"({self.folder}); go on with the same {words}, or start the stage anew"
                )
        return int(str(state["step"]))

    def _epoch(self, epoch: int) -> np.ndarray:
        """(bucket, number of the batch in the bucket's row) of an epoch's batches, int64 [·, 2]."""
        parts = []
        for index in self._used:
            first, end = ((e * len(self._rows[index])) // self._sizes[index] for e in (epoch, epoch + 1))
            numbers = np.arange(first, end)
            parts.append(np.stack([np.full_like(numbers, index), numbers], axis=1))
        batches = np.concatenate(parts)
        return np.random.default_rng((self.seed, epoch, BATCHES)).permutation(batches)

    def _batch(self, index: int, number: int, rank: int) -> list[Draw]:
        rows, size = self._rows[index], self.buckets[index].batch_size
        first = number * self._sizes[index] + rank * size
        draws = []
        for position in range(first, first + size):
            epoch, place = divmod(position, len(rows))
            row = int(rows[self._order(index, epoch)[place]])
            draws.append(Draw(row, index, (self.seed, epoch, index, place)))
        return draws

    def _order(self, index: int, epoch: int) -> np.ndarray:
        if (index, epoch) not in self._orders:
            old = [key for key in self._orders if key[0] == index and abs(key[1] - epoch) > 1]
            for key in old:
                del self._orders[key]
            random = np.random.default_rng((self.seed, epoch, index, ORDER))
            self._orders[index, epoch] = random.permutation(len(self._rows[index]))
        return self._orders[index, epoch]

    def _nothing(self, counts: Sequence[int]) -> str:
        had = "; ".join(
            f"{bucket} has {count} clips of {bucket.span} frames or more, and a batch takes {bucket.batch_size} x "
            f"{self.world_size} processes"
            for bucket, count in zip(self.buckets, counts, strict=True)
        )
        why = ", ".join(f"{count} {reason}" for reason, count in self.excluded.items())
        return (
            f"no batch can be filled from the {self.total} clips of {self.folder} ({why}): {had}; "
            "lower frames, frame_interval, height and width, batch_size or processes, or add longer or larger videos"
        )
