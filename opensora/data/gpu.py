"""Which GPU of a machine a process takes, where several processes of one step want one each."""

import os
from functools import cache
from pathlib import Path
from typing import IO

from opensora.step import lock_file

CLAIMS = Path("/dev/shm")  # of the machine or the pod, whatever TMPDIR says
_claims: list[IO[str] | None] = []  # of this process, until it ends


@cache
def process_device() -> str:
    """Where the models of this process compute, as torch names it: on the GPU that it claims, else on the CPU."""
    import torch

    if not torch.cuda.is_available():
        return "cpu"
    index, claim = claim_gpu(torch.cuda.device_count())
    _claims.append(claim)
    return f"cuda:{index}"


def claim_gpu(count: int, folder: Path = CLAIMS) -> tuple[int, IO[str] | None]:
    """The first of `count` GPUs that no other process of this user has claimed, and the claim: it ends with the handle.

    With more processes than GPUs the rest share them, without a claim. So does a process that was shown one GPU alone.
    """
    for index in range(count):
        claim = lock_file(folder / f"opensora-{os.getuid()}-gpu-{index}.lock")
        if claim is not None:
            return index, claim
    return os.getpid() % count, None
