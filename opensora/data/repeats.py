"""Keys that come twice among any number of keys, at eight bytes a key."""

from array import array
from hashlib import blake2b

import numpy as np


def key_number(key: str) -> int:
    """64 bits that stand for a key, spread evenly."""
    return int.from_bytes(blake2b(key.encode(), digest_size=8).digest())


class Repeats:
    """Finds keys that come twice; who they are takes a second reading."""

    def __init__(self) -> None:
        self._numbers = array("Q")

    def add(self, key: str) -> None:
        """One more key."""
        self._numbers.append(key_number(key))

    def find(self) -> set[int]:
        """Numbers of the keys that came more than once."""
        ordered = np.sort(np.frombuffer(self._numbers, dtype=np.uint64))
        return {int(number) for number in ordered[1:][ordered[1:] == ordered[:-1]]}
