"""Which clips make a batch: buckets of one shape each, and a plan of batches that is a function of the seed.

Shapes: `T` frames of a sample, `N` clips.
"""

from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import count
from typing import cast

import numpy as np

from opensora.config import ConfigError, TrainConfig
from opensora.data.clip_table import ClipTable
from opensora.step import StepError

MAX_UPSCALE = 1.125  # 480 lines may fill 512, which hardly shows; a clip that needs more is too small for a bucket
SAME_ASPECT = 1e-6  # difference of logarithms
SHARE_PERIOD = 10_000  # steps: a share of images is taken as a fraction with a denominator up to this
ORDER, BATCHES, CROP, POSTERIOR, NOISE, IMAGES, KINDS = range(1, 8)  # what a random number is for: a seed for each use
_WORDS = {"clips": "list of clips", "buckets": "list of buckets"}  # for an error


@dataclass(frozen=True)
class Bucket:
    """Samples of one shape, which can stand in one batch."""

    frames: int
    height: int  # pixels
    width: int  # pixels
    batch_size: int = 1  # samples a process and micro-batch
    interval: int = 1  # clip frames from one sampled frame to the next

    @property
    def span(self) -> int:
        """Frames of a clip that a sample stretches over."""
        return (self.frames - 1) * self.interval + 1

    def __str__(self) -> str:
        return f"{self.frames}x{self.height}x{self.width} at interval {self.interval}"

    @property
    def volume(self) -> int:
        """Pixels of a sample."""
        return self.frames * self.height * self.width


def stage_buckets(train: TrainConfig) -> list[Bucket]:
    """The shapes of a stage: its own, those of `buckets`, and single frames of each size for its `image_share`.

    Raises:
        ConfigError: a shape is there twice, or the stage has no video beside its single frames.
    """
    main = Bucket(train.frames, train.height, train.width, train.batch_size, train.frame_interval)
    buckets = [main, *(Bucket(b.frames, b.height, b.width, b.batch_size, b.frame_interval) for b in train.buckets)]
    if train.image_share:
        if any(bucket.frames == 1 for bucket in buckets):
            raise ConfigError(
                f"image_share {train.image_share:g} mixes single frames into videos, but the stage has a shape of one "
                "frame already; leave that shape out, or set image_share to 0"
            )
        sizes = dict.fromkeys((bucket.height, bucket.width) for bucket in buckets)
        buckets += [Bucket(1, *size, train.image_batch_size) for size in sizes]
    names = [str(bucket) for bucket in buckets]
    twice = [name for name, times in Counter(names).items() if times > 1]
    if twice:
        raise ConfigError(f"the shape {twice[0]} is twice among the stage's own and those of buckets; leave one out")
    return buckets


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
    by_volume = sorted(range(len(buckets)), key=lambda n: (-buckets[n].volume, n))
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


@dataclass(frozen=True)
class Batch:
    """The draws of one process for one micro-batch; all micro-batches of a step have the same position."""

    position: int
    draws: list[Draw]


class Stream:
    """Global batches of some buckets, without end, in an order that is a function of the seed.

    A bucket's clips form an endless row: epoch after epoch, each in a random order of its own. It is cut into batches,
    so every batch is full, nothing is padded, and no clip comes again before all others have; what an epoch leaves over
    starts the next one's first batch. An epoch's batches are those that end in it, shuffled over all buckets.

    Where a batch begins follows from its number in closed form, so any is found without drawing what lies before it, at
    the cost of the permutations of one or two epochs (8 bytes a clip each).

    Attributes:
        rows: clips of each bucket that has enough for a batch.
    """

    def __init__(self, rows: Mapping[int, np.ndarray], sizes: Sequence[int], seed: int, use: int) -> None:
        """Take the clips `rows` of each bucket and the `sizes` of the batches of all buckets."""
        self.rows = {index: found for index, found in rows.items() if len(found) >= sizes[index]}
        self.sizes, self.seed, self.use = sizes, seed, use
        self._orders: dict[tuple[int, int], np.ndarray] = {}
        self._epoch: tuple[int, np.ndarray] = (-1, np.empty(0))

    def batches_before(self, epoch: int) -> int:
        """Batches in the epochs before `epoch`."""
        return sum(epoch * len(rows) // self.sizes[index] for index, rows in self.rows.items())

    def epoch_of(self, number: int) -> int:
        """The epoch that a batch belongs to."""
        return bisect_right(range(number + 2), number, key=self.batches_before) - 1

    def batch(self, number: int) -> tuple[int, int]:
        """The bucket of a batch, and its number in the bucket's row."""
        epoch, batches = self._epoch
        if epoch < 0 or not 0 <= number - self.batches_before(epoch) < len(batches):
            self._epoch = epoch, batches = self.epoch_of(number), self._batches(self.epoch_of(number))
        index, place = batches[number - self.batches_before(epoch)]
        return int(index), int(place)

    def draw(self, index: int, position: int) -> Draw:
        """The sample at a position of a bucket's row."""
        rows = self.rows[index]
        epoch, place = divmod(position, len(rows))
        return Draw(int(rows[self._order(index, epoch)[place]]), index, (self.seed, epoch, index, place))

    def _batches(self, epoch: int) -> np.ndarray:
        """(bucket, number in the bucket's row) of an epoch's batches, int64 [·, 2]."""
        parts = []
        for index, rows in self.rows.items():
            first, end = ((e * len(rows)) // self.sizes[index] for e in (epoch, epoch + 1))
            numbers = np.arange(first, end)
            parts.append(np.stack([np.full_like(numbers, index), numbers], axis=1))
        return np.random.default_rng((self.seed, epoch, self.use)).permutation(np.concatenate(parts))

    def _order(self, index: int, epoch: int) -> np.ndarray:
        if (index, epoch) not in self._orders:
            old = [key for key in self._orders if key[0] == index and abs(key[1] - epoch) > 1]
            for key in old:
                del self._orders[key]
            random = np.random.default_rng((self.seed, epoch, index, ORDER))
            self._orders[index, epoch] = random.permutation(len(self.rows[index]))
        return self._orders[index, epoch]


class Plan:
    """All batches of a run, in order, as a function of (clips, buckets, share of images, seed, global batch sizes).

    A position is what one step of all processes trains on: a global batch of batch size × processes × micro-batches
    samples of one bucket, of which every process takes an equal share. So all are in the same bucket in every step:
    equal work, and none waits in a collective that another does not enter. Videos are one `Stream`, single frames of
    joint training another; a share of 0.3 gives single frames 3 of every 10 positions, at random places of the 10.

    The seed of a draw is (seed, epoch, bucket, place in the bucket's epoch). Neither rank nor worker is part of it,
    because no place is given to two of them: no two draws of a run are the same, and, which seeds by rank and worker
    would not give, the samples of a step do not depend on how many processes, micro-batches or loader workers share it.

    Attributes:
        excluded: clips that no batch takes, by reason.
    """

    def __init__(
        self,
        clips: ClipTable,
        buckets: Sequence[Bucket],
        seed: int,
        world_size: int,
        accumulate: int = 1,
        image_share: float = 0.0,
    ) -> None:
        """Assign the clips to buckets.

        Args:
            world_size: processes that read samples of their own.
            accumulate: micro-batches a step and process.
            image_share: share of the positions that take the buckets of one frame, which no other position takes then.

        Raises:
            StepError: no bucket of the videos, or none of the single frames, has the clips for one batch.
        """
        self.clips, self.buckets, self.seed = clips, tuple(buckets), seed
        self.world_size, self.accumulate = world_size, accumulate
        self.total = len(clips)
        self._sizes = [bucket.batch_size * world_size * accumulate for bucket in buckets]
        least = Fraction(bool(image_share), SHARE_PERIOD)
        self._share = max(Fraction(image_share).limit_denominator(SHARE_PERIOD), least)
        self._kinds: tuple[int, np.ndarray] = (-1, np.empty(0))
        apart = [index for index, bucket in enumerate(buckets) if self._share and bucket.frames == 1]
        self._used = np.zeros(len(clips), bool)
        self._videos = self._stream([index for index in range(len(buckets)) if index not in apart], BATCHES)
        self._images = self._stream(apart, IMAGES) if apart else None

    def _stream(self, indices: Sequence[int], use: int) -> Stream:
        bucket_of, reasons = assign([self.buckets[index] for index in indices], self.clips)
        rows = {index: np.flatnonzero(bucket_of == number) for number, index in enumerate(indices)}
        stream = Stream(rows, self._sizes, self.seed, use)
        for found in stream.rows.values():
            self._used[found] = True
        # A clip that is too short or too small for single frames is so for videos: the last stream's reasons hold.
        few = int((~self._used).sum()) - reasons.total()
        self.excluded = reasons + Counter({"too few for a batch": few})
        if not stream.rows:
            raise StepError(self._nothing({index: len(found) for index, found in rows.items()}))
        return stream

    def __len__(self) -> int:
        """Clips that are trained on."""
        return int(self._used.sum())

    def batches(self, rank: int, start: int = 0, skip: Container[int] = ()) -> Iterator[Batch]:
        """The batches of a process from position `start` on, without end: `accumulate` of them a position.

        Args:
            rank: number of the process among `world_size`.
            skip: positions that are passed over, the same on all processes.
        """
        for position in count(start):
            if position in skip:
                continue
            index, draws = self._draws(position)
            size = self.buckets[index].batch_size
            for micro in range(rank * self.accumulate, (rank + 1) * self.accumulate):
                yield Batch(position, [draws(place) for place in range(micro * size, (micro + 1) * size)])

    def clip_ids(self, position: int) -> list[str]:
        """The clips of a global batch, over all processes."""
        index, draws = self._draws(position)
        return [self.clips.text("clip_id", draws(place).row) for place in range(self._sizes[index])]

    def _draws(self, position: int) -> tuple[int, Callable[[int], Draw]]:
        """The bucket of a global batch, and its draws by place."""
        stream, number = self._locate(position)
        index, batch = stream.batch(number)
        first = batch * self._sizes[index]
        return index, lambda place: stream.draw(index, first + place)

    def _locate(self, position: int) -> tuple[Stream, int]:
        """The stream that a position takes from, and the number of its batch there."""
        if self._images is None:
            return self._videos, position
        images, period = self._share.numerator, self._share.denominator
        block, place = divmod(position, period)
        if self._kinds[0] != block:
            order = np.random.default_rng((self.seed, block, KINDS)).permutation(period)
            self._kinds = block, order < images
        before = block * images + int(self._kinds[1][:place].sum())
        return (self._images, before) if self._kinds[1][place] else (self._videos, position - before)

    def state_dict(self, position: int) -> dict[str, object]:
        """A position, the next one to be trained on, and what it is a position in; JSON."""
        return {
            "position": position,
            "global_batches": self._sizes,
            "clips": self.clips.identity,
            "buckets": [str(bucket) for bucket in self.buckets],
            "image_share": str(self._share),
            "seed": self.seed,
        }

    def load_state_dict(self, state: Mapping[str, object]) -> int:
        """The position to go on from, also with other numbers of processes and micro-batches that share each batch.

        Raises:
            StepError: the position is one in another plan.
        """
        own = self.state_dict(0)
        for name in ("clips", "buckets", "image_share", "seed"):
            if state.get(name) != own[name]:
                raise StepError(
                    f"the saved position is one with another {_WORDS.get(name, name)}: {state.get(name)}, and this run "
                    f"has {own[name]} ({self.clips.folder}); go on with the same, or start the stage anew"
                )
        if state["global_batches"] != self._sizes:
            old, new = (", ".join(map(str, sizes)) for sizes in (cast(list[int], state["global_batches"]), self._sizes))
            raise StepError(
                f"the saved position is one in global batches of {old} samples, and this run has {new}: batch_size x "
                f"{self.world_size} processes x {self.accumulate} micro-batches; choose them so that the product is "
                f"{old} again, or start the stage anew"
            )
        return int(str(state["position"]))

    def _nothing(self, counts: Mapping[int, int]) -> str:
        batch = f"{self.world_size} processes" + f" x {self.accumulate} micro-batches" * (self.accumulate > 1)
        had = "; ".join(
            f"{self.buckets[index]} has {count} clips of {self.buckets[index].span} frames or more, and a batch takes "
            f"{self.buckets[index].batch_size} x {batch}"
            for index, count in counts.items()
        )
        why = ", ".join(f"{count} {reason}" for reason, count in self.excluded.items())
        return (
            f"no batch can be filled from the {self.total} clips of {self.clips.folder} ({why}): {had}; "
            "lower frames, frame_interval, height and width, batch_size or processes, or add longer or larger videos"
        )
