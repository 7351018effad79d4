"""What the checks of data share: a problem, an error for what cannot be read, and a finder of keys that come twice."""

import re
from array import array
from dataclasses import dataclass
from hashlib import blake2b

import numpy as np

from opensora.config import UserError

SHA256 = re.compile(r"[0-9a-f]{64}")


class UnreadableError(UserError):
    """Nothing could be checked at all."""

    exit_code = 2


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong."""

    where: str  # file, row and clip
    what: str  # what was found, and what was expected

    def __str__(self) -> str:
        return f"{self.where}: {self.what}"


class Repeats:
    """Finds keys that come twice, at eight bytes a key; who they are takes a second reading."""

    def __init__(self) -> None:
        self._keys = array("Q")

    @staticmethod
    def number(key: str) -> int:
        """64 bits that stand for a key."""
        return int.from_bytes(blake2b(key.encode(), digest_size=8).digest())

    def add(self, key: str) -> None:
        """One more key."""
        self._keys.append(self.number(key))

    def find(self) -> set[int]:
        """Numbers of the keys that came more than once."""
        ordered = np.sort(np.frombuffer(self._keys, dtype=np.uint64))
        return {int(number) for number in ordered[1:][ordered[1:] == ordered[:-1]]}
