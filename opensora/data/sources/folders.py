"""Videos in a folder of this machine."""

import os
from collections.abc import Iterator
from pathlib import Path

from opensora.data.sources.item import CAPTIONS, VIDEOS, Item


def list_folder(folder: Path) -> Iterator[Item]:
    """The videos below a folder, by name, one folder in memory at a time; links to folders are not followed."""
    for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
        path = Path(entry.path)
        if entry.is_dir(follow_symlinks=False):
            yield from list_folder(path)
        elif path.suffix.lower() in VIDEOS and entry.is_file():
            yield Item(str(path.absolute()), captions=side_car(path))


def side_car(video: Path) -> str:
    """The captions beside a video; empty where there are none."""
    side = video.with_suffix(CAPTIONS)
    return str(side.absolute()) if side.is_file() else ""
