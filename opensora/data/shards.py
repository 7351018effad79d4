"""Tar shards in WebDataset layout: `<clip_id>.mp4` beside `<clip_id>.json`, read by offset without the rest."""

import io
import json
import os
import tarfile
from pathlib import Path

from opensora.manifest import Clip
from opensora.step import StepError

HEADER = 512  # bytes of a ustar header


class ShardWriter:
    """Writes the clips of part 3 to `clips-00003-00.tar`, …; a file appears under its name when it is whole."""

    def __init__(self, folder: Path, index: int, limit_mib: int) -> None:
        self.folder = folder
        self.index = index
        self.limit = limit_mib << 20
        self.count = 0
        self._tar: tarfile.TarFile | None = None

    def add(self, clip_id: str, data: bytes, about: dict[str, object]) -> tuple[str, int, int]:
        """Append a clip; returns its shard, the offset of its data and its size in bytes."""
        if self._tar is not None and self._tar.offset + len(data) > self.limit:
            self.close()
        if self._tar is None:
            self._tar = tarfile.open(self._part, "w", format=tarfile.USTAR_FORMAT)  # noqa: SIM115 (closed by close)
        offset = self._tar.offset + HEADER
        self._put(f"{clip_id}.mp4", data)
        self._put(f"{clip_id}.json", json.dumps(about, sort_keys=True).encode())
        return self.name, offset, len(data)

    @property
    def name(self) -> str:
        """The shard being written."""
        return f"clips-{self.index:05d}-{self.count:02d}.tar"

    @property
    def _part(self) -> Path:
        return self.folder / f"{self.name}.part"

    def _put(self, name: str, data: bytes) -> None:
        assert self._tar is not None
        member = tarfile.TarInfo(name)
        member.size = len(data)
        self._tar.addfile(member, io.BytesIO(data))

    def close(self) -> None:
        """Finish the shard being written, if any."""
        if self._tar is None:
            return
        self._tar.close()
        with self._part.open("rb") as handle:
            os.fsync(handle.fileno())
        self._part.rename(self.folder / self.name)
        self._tar = None
        self.count += 1


def read_clip(folder: Path, clip: Clip) -> bytes:
    """The mp4 of a clip, from the split step's folder.

    Raises:
        StepError: the shard is missing or shorter than the manifest says.
    """
    path = folder / clip.shard
    try:
        with path.open("rb") as handle:
            handle.seek(clip.offset)
            data = handle.read(clip.size)
    except FileNotFoundError:
        raise StepError(f"shard {path} of clip {clip.clip_id} is missing; run `opensora split` again") from None
    if len(data) != clip.size:
        raise StepError(f"shard {path} is shorter than the manifest says (clip {clip.clip_id}); run `opensora split`")
    return data
