"""Which GPU of a machine a process takes, where several processes of one step want one each."""

import os
import tempfile
from pathlib import Path
from typing import IO

from opensora.step import lock_file


def claim_gpu(count: int) -> tuple[int, IO[str] | None]:
    """The first of `count` GPUs that no other process of this user has claimed, and the claim: it ends with the handle.

    With more processes than GPUs the rest share them, without a claim. So does a process that was shown one GPU alone.
    """
    for index in range(count):
        claim = lock_file(Path(tempfile.gettempdir()) / f"opensora-{os.getuid()}-gpu-{index}.lock")
        if claim is not None:
            return index, claim
    return os.getpid() % count, None
