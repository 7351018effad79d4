"""Near duplicates among any number of 64-bit hashes: exact, and without comparing every pair.

Two hashes that differ in at most `d` bits agree in at least `k` of any `d + k` blocks of their bits. So for every
choice of `k` blocks the hashes are sorted by those bits, and only the ones that agree in all of them are compared.
With k = 1 this is multi-index hashing (Norouzi et al. 2012); more blocks make more sorts of longer keys (Manku et al.
2007), which pays where there are many hashes or bits.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import combinations

import numpy as np

BITS = 64
MAX_PAIRS = 10_000_000  # held at once
SORT_COST = 4.0  # of one hash in one sort, in comparisons of two hashes; measured for a million


@dataclass(frozen=True)
class Duplicates:
    """Hashes to drop, in order: row i of each array belongs to the same one."""

    index: np.ndarray  # int64 [D], ascending places in the given order
    original: np.ndarray  # int64 [D], the earlier hash, itself not dropped, that is near
    distance: np.ndarray  # int64 [D], bits between the two


def find_duplicates(hashes: np.ndarray, max_distance: int) -> Duplicates:
    """Walk over `hashes` in order; one is a duplicate if it is near an earlier one that is none itself.

    The original named is the nearest of the earlier ones, of equally near ones the first. In a crowd of more than
    MAX_PAIRS pairs it may be another near one. A hash given before has the original that it had then.

    Args:
        hashes: uint64 [N].
        max_distance: bits, 0…63; up to about 8 is fast for many millions.
    """
    values, first, group = np.unique(hashes, return_index=True, return_inverse=True)
    order = np.argsort(first)  # the different hashes, as they come up
    original, distance = _walk(values[order], max_distance)
    rank = np.empty_like(order)
    rank[order] = np.arange(len(order))
    ranks = rank[group]  # of every given hash, its place in `original`
    named = first[order][original[ranks]]
    index = np.flatnonzero(named != np.arange(len(hashes)))
    return Duplicates(index, named[index], distance[ranks[index]])


def _walk(hashes: np.ndarray, max_distance: int) -> tuple[np.ndarray, np.ndarray]:
    """Of each of these different hashes: its original, itself where it is no duplicate, and the bits between."""
    original, distance = np.arange(len(hashes)), np.zeros(len(hashes), np.int64)
    if max_distance == 0 or len(hashes) < 2:
        return original, distance
    pairs = _near_pairs(hashes, max_distance)
    if pairs is not None:
        for early, late, apart in zip(*(column.tolist() for column in pairs), strict=True):
            if original[late] == late and original[early] == early:
                original[late], distance[late] = early, apart
        return original, distance
    # A crowd: few of the first half are left when it is walked, and they take most of the second half away.
    half = len(hashes) // 2
    original[:half], distance[:half] = _walk(hashes[:half], max_distance)
    kept = np.flatnonzero(original[:half] == np.arange(half))
    nearest, apart = _find_nearest(hashes[kept], hashes[half:], max_distance)
    late = half + np.flatnonzero(apart <= max_distance)
    original[late], distance[late] = kept[nearest[late - half]], apart[late - half]
    rest = half + np.flatnonzero(apart > max_distance)
    among, apart = _walk(hashes[rest], max_distance)
    original[rest], distance[rest] = rest[among], apart
    return original, distance


def _near_pairs(hashes: np.ndarray, max_distance: int) -> tuple[np.ndarray, np.ndarray, np.ndarray] | None:
    """All pairs (earlier, later, bits apart), by later, then by bits, then by earlier; None if they are too many."""
    found, count = [np.empty((2, 0), np.int64)], 0
    for mask in _masks(len(hashes), max_distance):
        for pairs in _pairs_that_agree(hashes, mask, max_distance):
            found.append(pairs)
            count += pairs.shape[1]
            if count > MAX_PAIRS:
                return None
    early, late = np.concatenate(found, axis=1)
    _, once = np.unique(late * len(hashes) + early, return_index=True)  # a pair may agree in several choices of blocks
    early, late = early[once], late[once]
    bits = np.bitwise_count(hashes[early] ^ hashes[late])
    order = np.lexsort((early, bits, late))
    return early[order], late[order], bits[order]


def _pairs_that_agree(hashes: np.ndarray, mask: np.uint64, max_distance: int) -> Iterator[np.ndarray]:
    """int64 [2, P]: pairs (earlier, later) that are near and equal under `mask`; sorting brings them together."""
    order = np.argsort(hashes & mask)
    ranked = hashes[order]
    left = np.arange(len(ranked))
    for step in range(1, len(ranked)):
        left = left[: np.searchsorted(left, len(ranked) - step)]
        apart = ranked[left] ^ ranked[left + step]
        same = (apart & mask) == 0  # the run goes on
        left = left[same]
        if not len(left):
            return
        near = left[np.bitwise_count(apart[same]) <= max_distance]
        yield np.sort(np.stack([order[near], order[near + step]]), axis=0)


def _find_nearest(known: np.ndarray, hashes: np.ndarray, max_distance: int) -> tuple[np.ndarray, np.ndarray]:
    """Of each of `hashes` the nearest of `known`, the first of equally near ones, and the bits between; BITS: none."""
    nearest, apart = np.zeros(len(hashes), np.int64), np.full(len(hashes), BITS)
    for mask in _masks(len(known) + len(hashes), max_distance):
        order = np.argsort(known & mask)
        keys = (known & mask)[order]
        place = np.searchsorted(keys, hashes & mask, side="left")
        end = np.searchsorted(keys, hashes & mask, side="right")
        left = np.flatnonzero(place < end)
        while len(left):
            here = order[place[left]]
            bits = np.bitwise_count(known[here] ^ hashes[left])
            better = (bits < apart[left]) | ((bits == apart[left]) & (here < nearest[left]))
            nearest[left[better]], apart[left[better]] = here[better], bits[better]
            place[left] += 1
            left = left[place[left] < end[left]]
    return nearest, apart


def _masks(count: int, max_distance: int) -> Iterator[np.uint64]:
    """The bits of every choice of blocks; how many blocks a choice has depends on how many hashes there are."""

    def cost(chosen: int) -> float:
        blocks = max_distance + chosen
        run = count / 2.0 ** (BITS * chosen / blocks)
        return math.comb(blocks, chosen) * (SORT_COST + run / 2)

    chosen = min(range(1, BITS - max_distance + 1), key=cost)
    blocks = max_distance + chosen
    # Every block takes bits from all over the hash, as bits beside each other often agree.
    masks = [sum(1 << bit for bit in range(block, BITS, blocks)) for block in range(blocks)]
    for choice in combinations(masks, chosen):
        yield np.uint64(sum(choice))
