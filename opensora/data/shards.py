"""Shards: clips in tar files of WebDataset layout, latents and texts in safetensors files, all read by place or key.

`<clip_id>.mp4` stands beside `<clip_id>.json` in a tar file. A safetensors file of latents holds `latent_names`, one of
texts a tensor under each `text_key`.
"""

import io
import json
import os
import tarfile
from collections import OrderedDict
from collections.abc import Mapping
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any

from opensora.manifest import Clip
from opensora.step import StepError

if TYPE_CHECKING:
    from torch import Tensor

HEADER = 512  # bytes of a ustar header
OPEN_FILES = 64  # safetensors files that a reader keeps open


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
    return read_bytes(folder / clip.shard, clip.offset, clip.size, clip.clip_id)


def read_bytes(path: Path, offset: int, size: int, clip_id: str) -> bytes:
    """The mp4 of a clip whose place in a shard is known; errors as in `read_clip`."""
    try:
        with path.open("rb") as handle:
            handle.seek(offset)
            data = handle.read(size)
    except FileNotFoundError:
        raise StepError(f"shard {path} of clip {clip_id} is missing; run `opensora split` again") from None
    except OSError as error:
        raise StepError(f"shard {path} of clip {clip_id} cannot be read: {error}") from error
    if len(data) != size:
        raise StepError(f"shard {path} is shorter than the manifest says (clip {clip_id}); run `opensora split`")
    return data


def text_key(caption: str) -> str:
    """Name of a caption's embedding [L, Cc]: clips of the same words share it."""
    return sha256(caption.encode()).hexdigest()[:16]


def latent_names(clip_id: str, height: int, width: int) -> tuple[str, str]:
    """Names of the mean and of the standard deviation, both [T, C, h, w], of a clip at a size in pixels."""
    return f"{clip_id}/{height}x{width}/mean", f"{clip_id}/{height}x{width}/std"


def write_tensors(path: Path, tensors: "Mapping[str, Tensor]") -> None:
    """Write a safetensors file that appears whole or not at all; the same tensors give the same bytes."""
    from safetensors.torch import save_file

    part = path.with_name(path.name + ".part")
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, part)
    with part.open("rb") as handle:
        os.fsync(handle.fileno())
    part.replace(path)


class TensorFiles:
    """Tensors of a folder's safetensors files, by file and name; the files used last stay open.

    It can be pickled: another process opens the files anew.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._open: OrderedDict[str, Any] = OrderedDict()

    def __reduce__(self) -> tuple[type, tuple[Path]]:
        return TensorFiles, (self.folder,)

    def read(self, file: str, name: str, rows: slice = slice(None)) -> "Tensor":
        """A tensor, or only some of its first axis, without reading the rest of the file.

        Raises:
            StepError: the file is missing or damaged, or has no such tensor.
        """
        return self.part(file, name)[rows]

    def shape(self, file: str, name: str) -> list[int]:
        """The shape of a tensor, which is not read; errors as in `read`."""
        return self.part(file, name).get_shape()

    def part(self, file: str, name: str) -> Any:
        """safetensors' slice of a tensor; errors as in `read`."""
        from safetensors import SafetensorError, safe_open

        path = self.folder / file
        if file not in self._open:
            try:
                self._open[file] = safe_open(path, "pt")
            except FileNotFoundError:
                raise StepError(f"{path} is missing, which holds {name}; run `opensora encode` again") from None
            except (OSError, SafetensorError) as error:
                raise StepError(f"{path} is damaged ({error}); run `opensora encode` again") from error
            if len(self._open) > OPEN_FILES:
                self._open.popitem(last=False)
        self._open.move_to_end(file)
        try:
            return self._open[file].get_slice(name)
        except SafetensorError:
            raise StepError(
                f"{path} has no tensor {name}; run `opensora encode` again, with the size in encode.sizes"
            ) from None
