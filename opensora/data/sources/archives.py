"""Videos in zip and tar archives: unpacked within limits, none outside its folder, and what is bad has its reason."""

import bz2
import errno
import gzip
import lzma
import stat
import struct
import tarfile
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath
from typing import IO, Any, Protocol

from opensora.config import DownloadConfig
from opensora.data.sources.folders import side_car
from opensora.data.sources.item import CAPTIONS, VIDEOS, Item
from opensora.data.sources.partial import BLOCK, MIB
from opensora.step import fingerprint

SUFFIXES = (".zip", ".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz")
MAX_FILES = 1_000_000  # of an archive
MAX_RATIO = 100  # of the bytes that come out to those of the archive; videos are compressed already, and come near 1
LOCAL_HEADER = struct.Struct("<4s5H3I2H")  # of a zip's member
ENCRYPTED, SIZE_BEHIND, UTF8 = 1, 8, 0x800  # its flags
ZIP64 = 0xFFFFFFFF  # a size that stands elsewhere
DAMAGED = (tarfile.TarError, zipfile.BadZipFile, zlib.error, lzma.LZMAError, EOFError)


class _LimitError(Exception):
    """More comes out of an archive than it may hold."""


class _Readable(Protocol):
    def read(self, size: int, /) -> bytes: ...


@dataclass(frozen=True)
class _Member:
    """A file in an archive."""

    name: str
    size: int  # bytes, as the archive says
    content: _Readable | None = None  # open until the next member is asked for
    refused: str = ""


class _Limit:
    """Counts the bytes that come out of an archive, read or skipped, and stops at a limit."""

    def __init__(self, archive: Path, config: DownloadConfig) -> None:
        self.left = max(MAX_RATIO * archive.stat().st_size, config.max_mib * MIB)
        self.said = f"more than {self.left >> 20} MiB come out of it"

    def take(self, size: int) -> None:
        """So many bytes more."""
        self.left -= size
        if self.left < 0:
            raise _LimitError(self.said)


class _Limited:
    """A stream that counts what is read from it."""

    def __init__(self, stream: IO[bytes], limit: _Limit) -> None:
        self.stream, self.limit = stream, limit

    def read(self, size: int) -> bytes:
        """Up to `size` bytes."""
        data = self.stream.read(size)
        self.limit.take(len(data))
        return data


class _StrictMember(tarfile.TarInfo):
    """A member of a tar; a bad header is an error wherever it stands, where tarfile takes it for the end."""

    @classmethod
    def fromtarfile(cls, tarfile_: Any) -> Any:
        try:
            return super().fromtarfile(tarfile_)
        except tarfile.EOFHeaderError:  # type: ignore[attr-defined]
            raise  # an empty block: the only proper end
        except tarfile.HeaderError as error:
            raise tarfile.ReadError(str(error)) from None


def unpack(archive: Path, name: str, store: Path, config: DownloadConfig) -> Iterator[Item]:
    """The videos of an archive, unpacked below `store`; what cannot be is an item with a reason.

    Bad are: links, devices and names that lead out of the archive, names that come twice, members larger than
    `download.max_mib` or damaged. Where the archive breaks off, or unpacks to far more than its size, what came before
    is kept and one item says so. Only videos and their side-car captions are read: a list in an archive is no list.

    Args:
        name: of the archive in the manifest.

    Raises:
        OSError: the disk is full.
    """
    state = archive.stat()
    folder = store / f"archive-{fingerprint(str(archive.absolute()), state.st_size, state.st_mtime_ns)[:16]}"
    limit = _Limit(archive, config)
    times: Counter[str] = Counter()
    videos: list[tuple[str, Path]] = []
    try:
        for member in _members(archive, limit):
            path = PurePosixPath(member.name)
            if path.suffix.lower() not in VIDEOS and not path.name.lower().endswith(CAPTIONS):
                continue
            times[member.name] += 1
            where = f"{name}!{member.name}" + (f" ({times[member.name]})" if times[member.name] > 1 else "")
            reason = _reason(member, folder, times[member.name], config) or _extract(member, folder, limit)
            if reason:
                yield Item(where, reason=reason)
            elif path.suffix.lower() in VIDEOS:
                videos.append((where, folder / member.name))
            if times.total() > MAX_FILES:
                raise _LimitError(f"it holds more than {MAX_FILES:,} videos")
    except _LimitError as error:
        yield Item(name, reason=f"too large: the archive was left where {error}")
    except DAMAGED as error:
        yield Item(name, reason=f"damaged: unreadable after {len(videos)} of its videos: {error}")
    except OSError as error:  # gzip and bz2 say with it what they cannot read
        if error.errno is not None:
            raise
        yield Item(name, reason=f"damaged: unreadable after {len(videos)} of its videos: {error}")
    for where, target in videos:  # a side-car may stand behind its video
        yield Item(str(target.absolute()), captions=side_car(target), source=where)


def _reason(member: _Member, folder: Path, times: int, config: DownloadConfig) -> str:
    """Why a member is not unpacked, known before it is read."""
    if member.refused:
        return f"refused: {member.refused}"
    if not (folder / member.name).resolve().is_relative_to(folder.resolve()):
        return "refused: its name leads out of the archive"
    if times > 1:
        return "refused: a file of that name stands before it in the archive"
    if member.size > config.max_mib * MIB:
        return f"too large: {member.size >> 20} MiB, the limit is {config.max_mib}"
    return ""


def _extract(member: _Member, folder: Path, limit: _Limit) -> str:
    """Write a member, unless a stopped run did; why that was not possible.

    Raises:
        _LimitError: the whole archive is too large.
        OSError: the disk is full.
    """
    target = folder / member.name
    if member.content is None or (target.is_file() and target.stat().st_size == member.size):
        return ""
    part = target.with_name(target.name + ".part")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with part.open("wb") as handle:
            while block := member.content.read(BLOCK):
                handle.write(block)
        if part.stat().st_size != member.size:
            return f"damaged: {part.stat().st_size} bytes came out, the archive says {member.size}"
        part.replace(target)
    except (zipfile.BadZipFile, zlib.error, NotImplementedError) as error:  # of one member; its neighbours may be well
        return f"damaged: {error}"
    except OSError as error:
        if error.errno not in (errno.ENAMETOOLONG, errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.EILSEQ):
            raise
        return f"refused: its name cannot be that of a file here: {error.strerror}"
    finally:
        with suppress(OSError):
            part.unlink()
    return ""


def _members(archive: Path, limit: _Limit) -> Iterator[_Member]:
    yield from _zip_members(archive, limit) if archive.name.lower().endswith(".zip") else _tar_members(archive, limit)


def _zip_members(archive: Path, limit: _Limit) -> Iterator[_Member]:
    with archive.open("rb") as handle:
        try:
            bundle = zipfile.ZipFile(handle)
        except zipfile.BadZipFile as error:
            yield from (_zip_member(info, partial(_open_here, handle, info), limit) for info in _scan_zip(handle))
            raise zipfile.BadZipFile(f"the list of its members at its end is lost: {error}") from None
        for info in bundle.infolist():
            if not info.is_dir():
                yield _zip_member(info, partial(bundle.open, info), limit)


def _zip_member(info: zipfile.ZipInfo, open_member: Callable[[], _Readable], limit: _Limit) -> _Member:
    if stat.S_ISLNK(info.external_attr >> 16):
        return _Member(info.filename, info.file_size, refused="a link")
    if info.flag_bits & ENCRYPTED:
        return _Member(info.filename, info.file_size, refused="encrypted")
    return _Member(info.filename, info.file_size, _ZipContent(open_member, limit))


def _scan_zip(handle: IO[bytes]) -> Iterator[zipfile.ZipInfo]:
    """Members by the headers that stand before each (APPNOTE.TXT 4.3.7), up to one that does not say how long it is."""
    place = 0
    while True:
        handle.seek(place)
        head = handle.read(LOCAL_HEADER.size)
        if len(head) < LOCAL_HEADER.size or not head.startswith(b"PK\3\4"):
            return
        _, _, flags, method, _, _, crc, packed, size, name_length, extra_length = LOCAL_HEADER.unpack(head)
        name = handle.read(name_length).decode("utf-8" if flags & UTF8 else "cp437", "replace")
        place += LOCAL_HEADER.size + name_length + extra_length
        if flags & SIZE_BEHIND or packed == ZIP64:
            return
        info = zipfile.ZipInfo(name)
        info.flag_bits, info.compress_type, info.CRC, info.compress_size, info.file_size = (
            flags,
            method,
            crc,
            packed,
            size,
        )
        info.header_offset = place  # here: of the content
        if not info.is_dir():
            yield info
        place += packed


def _open_here(handle: IO[bytes], info: zipfile.ZipInfo) -> _Readable:
    handle.seek(info.header_offset)
    return zipfile.ZipExtFile(handle, "r", info)


class _ZipContent:
    """The content of a zip's member, opened when it is first read: a bad header is then that member's alone."""

    def __init__(self, open_member: Callable[[], _Readable], limit: _Limit) -> None:
        self.open_member, self.limit = open_member, limit
        self.stream: _Readable | None = None

    def read(self, size: int) -> bytes:
        """Up to `size` bytes."""
        if self.stream is None:
            self.stream = self.open_member()
        data = self.stream.read(size)
        self.limit.take(len(data))
        return data


def _tar_members(archive: Path, limit: _Limit) -> Iterator[_Member]:
    """As a stream: nothing is sought, so that the limit sees every byte, those of members that are skipped too."""
    with closing(_decompressed(archive)) as stream:
        limited = _Limited(stream, limit)
        with tarfile.open(fileobj=limited, mode="r|", tarinfo=_StrictMember) as bundle:  # type: ignore[call-overload]
            while member := bundle.next():
                bundle.members.clear()  # tarfile remembers them all
                if member.issparse():  # its holes would come out without being read
                    yield _Member(member.name, member.size, refused="a sparse file")
                elif member.isfile():
                    yield _Member(member.name, member.size, bundle.extractfile(member))
                elif not member.isdir():
                    yield _Member(member.name, member.size, refused="a link or a device")
        while limited.read(BLOCK):  # to the end, where a compressed stream has its checksum
            pass


def _decompressed(archive: Path) -> IO[bytes]:
    """The archive as a plain tar, told by its first bytes: names lie, as when a server unpacks gzip on the way."""
    with archive.open("rb") as handle:
        head = handle.read(6)
    if head.startswith(b"\x1f\x8b"):
        return gzip.open(archive)  # type: ignore[return-value]
    if head.startswith(b"BZh"):
        return bz2.open(archive)
    if head == b"\xfd7zXZ\0":
        return lzma.open(archive)
    return archive.open("rb")
