"""Hashes of what makes a checkpoint's clips and their numbers beside it: the VAE and the text encoder, and the code."""

from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from opensora.data.reuse import hash_folder
from opensora.step import fingerprint
from opensora.tracking.registry import Version
from opensora.training.checkpoint import MODELS, locate
from opensora.weights import hash_file

PACKAGE = Path(__file__).parents[1]
# Files and folders of the package that make a clip, its row, or the features of a real clip.
SOURCES = (
    *("generate.py", "diffusion", "models", "training/checkpoint.py", "clip_file.py"),
    *("data/cut.py", "data/timeline.py", "data/video.py"),
    *("evaluation/sampling.py", "evaluation/reference.py", "data/clip_reader.py", "demo/shapes.py"),
    *("metrics", "clip_model.py"),
)


def hash_models(info: Mapping[str, Any], checkpoint: Path, memory: Path) -> dict[str, str]:
    """sha256 of the VAE's and the text encoder's folder: the other half of what makes a checkpoint's clips.

    Args:
        info: what the checkpoint says of itself.
        memory: folder that remembers hashes of large files; see `hash_folder`.

    Raises:
        CheckpointError: one of them is missing.
    """
    return {name: fingerprint(hash_folder(locate(info[name], checkpoint), memory)) for name in MODELS}


def models_tag(model: str) -> str:
    """Of a version: the hash of its VAE or text encoder; see `hash_models`."""
    return f"{model}.sha256"


def registered_models(version: Version) -> dict[str, str]:
    """With which VAE and text encoder a version was registered: the same checkpoint with others is another model."""
    return {name: version.tags[models_tag(name)] for name in MODELS if models_tag(name) in version.tags}


@cache
def hash_code() -> str:
    """sha256 of SOURCES, read once by a process. A comment counts: telling it from code is not worth an error."""
    return hash_sources(PACKAGE)


def hash_sources(package: Path) -> str:
    """sha256 of SOURCES in `package`; raises FileNotFoundError for one that is not there."""
    places = [package / name for name in SOURCES]
    files = [file for place in places for file in (sorted(place.rglob("*.py")) if place.is_dir() else [place])]
    return fingerprint({str(file.relative_to(package)): hash_file(file) for file in files})
