"""What an evaluation leaves for others to read, and what of it a registered version is held to."""

from pathlib import Path

from opensora.step import fingerprint
from opensora.weights import hash_file

METRICS, SCORES, BESIDE = "metrics.json", "scores.json", "champion.json"


def hash_evaluation(folder: Path) -> str:
    """Of the numbers in an evaluation's folder, or in the copy that a version keeps."""
    return fingerprint({name: hash_file(folder / name) for name in (METRICS, SCORES) if (folder / name).is_file()})
