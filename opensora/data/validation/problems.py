"""What the checks of data share: a problem, and an error for what cannot be read."""

import re
from dataclasses import dataclass

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
