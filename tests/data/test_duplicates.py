"""Near duplicates: the same as comparing all pairs, in order, and quick where many hashes are equal."""

import numpy as np
import pytest

from opensora.data.duplicates import find_duplicates

Found = list[tuple[int, int, int]]


def by_all_pairs(hashes: np.ndarray, max_distance: int) -> Found:
    kept: list[int] = []
    seen: dict[int, tuple[int, int]] = {}  # what a hash is near to that was given before
    found = []
    for index, value in enumerate(hashes):
        bits = np.bitwise_count(hashes[kept] ^ value) if kept else np.array([99])
        nearest = int(bits.argmin())
        if bits[nearest] <= max_distance:
            found.append((index, *seen.setdefault(int(value), (kept[nearest], int(bits[nearest])))))
        else:
            kept.append(index)
    return found


def by_blocks(hashes: np.ndarray, max_distance: int) -> Found:
    found = find_duplicates(hashes, max_distance)
    return list(zip(found.index.tolist(), found.original.tolist(), found.distance.tolist(), strict=True))


def planted(count: int, seed: int) -> np.ndarray:
    """Random hashes, half of them changed copies of earlier ones, as copies of copies are."""
    rng = np.random.default_rng(seed)
    hashes = rng.integers(0, 2**64, count, dtype=np.uint64)
    for index in range(count // 2, count):
        value = int(hashes[rng.integers(max(1, index))])
        for bit in rng.choice(64, rng.integers(0, 12), replace=False):
            value ^= 1 << int(bit)
        hashes[index] = value
    return hashes


@pytest.mark.parametrize("max_distance", [0, 1, 2, 3, 5, 8, 14])
@pytest.mark.parametrize("count", [1, 2, 50, 1500])
def test_the_same_as_all_pairs(count: int, max_distance: int) -> None:
    hashes = planted(count, seed=count + max_distance)
    expected = by_all_pairs(hashes, max_distance)
    assert expected or count < 50
    assert by_blocks(hashes, max_distance) == expected


def test_any_number_of_blocks_finds_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    hashes = planted(800, seed=1)
    expected = by_all_pairs(hashes, 6)
    for cost in (1e-9, 1.0, 1e9):  # sorts that cost nothing make many blocks
        monkeypatch.setattr("opensora.data.duplicates.SORT_COST", cost)
        assert by_blocks(hashes, 6) == expected


@pytest.mark.parametrize("limit", [0, 50, 400])
def test_a_crowd_is_walked_in_halves_and_gives_the_same(monkeypatch: pytest.MonkeyPatch, limit: int) -> None:
    monkeypatch.setattr("opensora.data.duplicates.MAX_PAIRS", limit)
    hashes = planted(800, seed=3)
    found, expected = by_blocks(hashes, 6), by_all_pairs(hashes, 6)
    assert [index for index, _, _ in found] == [index for index, _, _ in expected]
    dropped = {index for index, _, _ in found}
    for index, original, bits in found:
        assert original < index
        assert original not in dropped
        assert bits == int(hashes[index] ^ hashes[original]).bit_count() <= 6


def test_a_crowd_of_pairs_is_no_trouble() -> None:
    """Title cards: 20,000 hashes within 4 bits of one, two hundred million pairs."""
    rng = np.random.default_rng(4)
    crowd = np.zeros(20_000, np.uint64)
    for _ in range(2):
        crowd ^= np.uint64(1) << rng.integers(0, 64, len(crowd), dtype=np.uint64)
    crowd = np.concatenate([np.zeros(1, np.uint64), crowd ^ np.uint64(0b11)])
    assert len(find_duplicates(crowd, 4).index) == 20_000


def test_one_that_is_dropped_drops_nothing() -> None:
    chain = np.array([0b0000, 0b0011, 0b1111, 0b1111], np.uint64)
    assert by_blocks(chain, 2) == [(1, 0, 2), (3, 2, 0)]


def test_many_equal_ones_are_one_group() -> None:
    hashes = np.repeat(planted(10, seed=2), 50_000)
    assert len(by_blocks(hashes, 4)) == len(hashes) - (10 - len(by_all_pairs(hashes[::50_000], 4)))


def test_none_is_no_trouble() -> None:
    for max_distance in (0, 4):
        assert by_blocks(np.empty(0, np.uint64), max_distance) == []
