"""Videos in object stores, by fsspec: listed below a folder, and brought with what a stopped run left."""

import threading
import time
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import IO

from opensora.config import DownloadConfig
from opensora.data.sources.item import CAPTIONS, VIDEOS, Item
from opensora.data.sources.partial import BLOCK, DownloadError, Partial, Version, check_size
from opensora.step import UNWRITABLE, StepError

VERSIONS = ("ETag", "etag", "md5Hash", "content_md5", "LastModified", "last_modified", "mtime")


def list_bucket(source: str) -> Iterator[Item]:
    """The videos below a folder of a bucket, by name, with side-car captions where there are any.

    All names are in memory at once, some 100 bytes each; for more than that allows, give a list.

    Raises:
        StepError: it cannot be listed.
    """
    import fsspec

    try:
        system, path = fsspec.core.url_to_fs(source)
        names = sorted(system.find(path))
    except (ImportError, ValueError) as error:
        raise StepError(f"the source {source} cannot be read: {error}; s3://bucket/folder, for example") from None
    except OSError as error:
        raise StepError(f"the source {source} cannot be read: {error}; look at the name and the credentials") from None
    known = set(names)
    whole = system.unstrip_protocol
    for name in names:
        if PurePosixPath(name).suffix.lower() in VIDEOS:
            side = str(PurePosixPath(name).with_suffix(CAPTIONS))
            yield Item(whole(name), captions=whole(side) if side in known else "")


def bring_object(url: str, target: Path, config: DownloadConfig, stopped: threading.Event | None = None) -> None:
    """Bring one object to `target`, whole or not at all; one that is here and did not change is not read again.

    Raises:
        DownloadError: the recorded reason.
        OSError: nothing can be written any more (`step.UNWRITABLE`).
    """
    import fsspec

    deadline = time.monotonic() + config.file_timeout_s
    file = Partial(target, stopped)
    try:
        system, path = fsspec.core.url_to_fs(url)
        about = system.info(path)
        size = int(about.get("size") or 0)
        check_size(size, config)
        version = Version(next((f"{name} {about[name]} {size}" for name in VERSIONS if about.get(name)), ""))
        if version and file.whole == version:
            return
        if not version or file.version != version or file.size > size:
            file.begin(version)
        with system.open(path, "rb", block_size=BLOCK * 32) as source:
            source.seek(file.size)
            file.append(_blocks(source), config, deadline)
    except FileNotFoundError:
        raise DownloadError(f"dead link: nothing at {url}") from None
    except ImportError as error:
        raise DownloadError(f"download failed: {error}; for buckets: pip install 'opensora-workflow[s3]'") from None
    except ValueError as error:  # fsspec: an unknown protocol
        raise DownloadError(f"download failed: {error}") from None
    except OSError as error:
        if error.errno in UNWRITABLE:
            raise
        raise DownloadError(f"download failed: {error}") from None
    if file.size != size:
        raise DownloadError(f"download failed: {file.size} of {size} bytes came; start again to go on")
    file.finish()


def _blocks(source: IO[bytes]) -> Iterator[bytes]:
    while block := source.read(BLOCK):
        yield block
