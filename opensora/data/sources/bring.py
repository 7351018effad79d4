"""Bring one file to its place, from wherever its URL says."""

import threading
from pathlib import Path

from opensora.config import DownloadConfig
from opensora.data.sources.fetch import fetch
from opensora.data.sources.hub import bring_from_hub
from opensora.data.sources.object_store import bring_object
from opensora.data.sources.platforms import fetch_platform, is_platform
from opensora.data.sources.uri import HUB, WEB, scheme


def bring(url: str, target: Path, config: DownloadConfig, stopped: threading.Event | None = None) -> None:
    """Bring `url` to `target`, whole or not at all; what a stopped run brought of it is gone on with.

    Args:
        stopped: set by another thread to end this one early.

    Raises:
        DownloadError: the recorded reason.
        OSError: nothing can be written any more (`step.UNWRITABLE`).
    """
    if is_platform(url):
        fetch_platform(url, target, config)
    elif scheme(url) in WEB:
        fetch(url, target, config, stopped)
    elif scheme(url) == HUB:
        bring_from_hub(url, target, config, stopped)
    else:
        bring_object(url, target, config, stopped)
