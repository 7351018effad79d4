"""A program in the place of nvidia-smi, which no machine without its GPUs has."""

import os
from pathlib import Path

import pytest


def install(folder: Path, patch: pytest.MonkeyPatch, lines: list[str], status: int = 0) -> None:
    """Put it first on the path; it prints the lines if it is asked for as many fields as they have."""
    folder.mkdir()
    program = folder / "nvidia-smi"
    asked = "index,utilization.gpu,memory.used,memory.total,power.draw,enforced.power.limit"
    program.write_text(
        f'#!/bin/sh\n[ "$*" = "--query-gpu={asked} --format=csv,noheader,nounits" ] || exit 2\n'
        + "".join(f"echo '{line}'\n" for line in lines)
        + f"exit {status}\n"
    )
    program.chmod(0o755)
    patch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
