"""Archives: what is good in them comes out, what is bad has its reason, and nothing leaves its folder or its limits."""

import gzip
import io
import stat
import struct
import tarfile
import zipfile
from pathlib import Path

import pytest

from opensora.config import DownloadConfig
from opensora.data.sources.archives import unpack

CONFIG = DownloadConfig(max_mib=1)
MIB = 1 << 20


def noise(seed: int, size: int = 50_000) -> bytes:
    import numpy as np

    return np.random.default_rng(seed).bytes(size)


GOOD = {"a.mp4": noise(1), "deep/b.mp4": noise(2), "deep/c.mp4": noise(3)}


def make_zip(path: Path, members: dict[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as bundle:
        for name, data in members.items():
            bundle.writestr(name, data)
    return path


def make_tar(path: Path, members: dict[str, bytes], mode: str = "w") -> Path:
    with tarfile.open(path, mode) as bundle:  # type: ignore[call-overload]
        for name, data in members.items():
            put(bundle, name, data)
    return path


def put(bundle: tarfile.TarFile, name: str, data: bytes = b"", kind: bytes = tarfile.REGTYPE, link: str = "") -> None:
    member = tarfile.TarInfo(name)
    member.size, member.type, member.linkname = len(data), kind, link
    bundle.addfile(member, io.BytesIO(data))


def take(archive: Path, config: DownloadConfig = CONFIG) -> tuple[dict[str, bytes], dict[str, str]]:
    """(content of the good members, reasons of the bad), by what the manifest names them."""
    items = list(unpack(archive, "X", archive.parent / "store", config))
    assert len({item.url for item in items}) == len(items)
    good = {item.source.removeprefix("X!"): Path(item.url).read_bytes() for item in items if not item.reason}
    return good, {item.url.removeprefix("X!"): item.reason for item in items if item.reason}


def written(folder: Path) -> int:
    return sum(path.stat().st_size for path in (folder / "store").rglob("*") if path.is_file())


@pytest.mark.parametrize("name", ["x.zip", "x.tar", "x.tar.gz", "x.tgz", "x.tar.bz2", "x.tar.xz"])
def test_every_kind_is_unpacked_and_again_costs_nothing(tmp_path: Path, name: str) -> None:
    kind = {"gz": "gz", "tgz": "gz", "bz2": "bz2", "xz": "xz"}.get(name.rpartition(".")[2], "")
    archive = tmp_path / name
    make_zip(archive, GOOD) if name == "x.zip" else make_tar(archive, GOOD, f"w:{kind}" if kind else "w")
    assert take(archive) == (GOOD, {})
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "store").rglob("*.mp4")}
    assert take(archive) == (GOOD, {})
    assert before == {path: path.stat().st_mtime_ns for path in (tmp_path / "store").rglob("*.mp4")}


def test_a_plain_tar_under_the_name_of_a_packed_one(tmp_path: Path) -> None:
    assert take(make_tar(tmp_path / "x.tar.gz", GOOD)) == (GOOD, {})


def test_nothing_leaves_its_folder(tmp_path: Path) -> None:
    secret = tmp_path / "secret.mp4"
    secret.write_bytes(b"secret")
    bad = ["../out.mp4", "/absolute.mp4", "x/../../out.mp4", str(secret)]
    with tarfile.open(tmp_path / "x.tar", "w") as bundle:
        for name in bad:
            put(bundle, name, b"evil")
        put(bundle, "link.mp4", kind=tarfile.SYMTYPE, link=str(secret))
        put(bundle, "hard.mp4", kind=tarfile.LNKTYPE, link="../secret.mp4")
        put(bundle, "pipe.mp4", kind=tarfile.FIFOTYPE)
        put(bundle, "through", kind=tarfile.SYMTYPE, link="..")
        put(bundle, "through/d.mp4", b"inside")
        put(bundle, "good.mp4", b"good")
    good, reasons = take(tmp_path / "x.tar")
    assert good == {"through/d.mp4": b"inside", "good.mp4": b"good"}  # the link was never made: a folder is
    assert set(reasons) == {*bad, "link.mp4", "hard.mp4", "pipe.mp4"}
    assert all(reason.startswith("refused: ") for reason in reasons.values())
    assert secret.read_bytes() == b"secret"
    assert not (tmp_path / "out.mp4").exists()

    with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
        for name in (*bad, "good.mp4"):
            archive.writestr(name, b"evil")
        link = zipfile.ZipInfo("link.mp4")
        link.external_attr = (stat.S_IFLNK | 0o777) << 16
        archive.writestr(link, str(secret))
    good, reasons = take(tmp_path / "x.zip")
    assert set(good) == {"good.mp4"}
    assert set(reasons) == {*bad, "link.mp4"}
    assert secret.read_bytes() == b"secret"


def test_strange_names(tmp_path: Path) -> None:
    names = ["two words.mp4", 'it\'s "q".mp4', "two\nlines.mp4", "видео/映像.mp4", "a!b.mp4", "-rf.mp4", "%2e%2e.mp4"]
    members = {name: noise(seed) for seed, name in enumerate(names)}
    for archive in (make_zip(tmp_path / "x.zip", members), make_tar(tmp_path / "x.tar", members)):
        assert take(archive) == (members, {})
    bad = {"x" * 300 + ".mp4": b"1", "file.mp4": b"2", "file.mp4/under.mp4": b"3"}
    good, reasons = take(make_tar(tmp_path / "y.tar", bad))
    assert set(good) == {"file.mp4"}
    assert len(reasons) == 2
    assert all(reason.startswith("refused: its name cannot be") for reason in reasons.values())


def test_a_name_that_comes_twice_is_told(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "x.tar", "w") as bundle:
        for data in (b"one", b"two", b"six"):
            put(bundle, "a.mp4", data)
    good, reasons = take(tmp_path / "x.tar")
    assert good == {"a.mp4": b"one"}
    assert set(reasons) == {"a.mp4 (2)", "a.mp4 (3)"}


def test_captions_go_to_the_video_beside_them(tmp_path: Path) -> None:
    names = ["one/clip.captions.json", "one/clip.mp4", "two/clip.mp4", "two/clip.captions.json", "three/clip.mp4"]
    items = list(unpack(make_tar(tmp_path / "x.tar", dict.fromkeys(names, b"[]")), "X", tmp_path / "store", CONFIG))
    sides = {Path(item.url).parent.name: Path(item.captions).parent.name if item.captions else "" for item in items}
    assert sides == {"one": "one", "two": "two", "three": ""}


def test_a_list_in_an_archive_reads_nothing(tmp_path: Path) -> None:
    (tmp_path / "private.mp4").write_bytes(b"private")
    lists = {"list.csv": f"url\n{tmp_path}/private.mp4\n".encode(), "list.txt": b"http://127.0.0.1/x.mp4\n"}
    items = list(unpack(make_zip(tmp_path / "x.zip", lists | GOOD), "X", tmp_path / "store", CONFIG))
    assert {item.source for item in items} == {f"X!{name}" for name in GOOD}


def test_bombs_that_say_how_large_they_are(tmp_path: Path) -> None:
    members = {"bomb.mp4": bytes(30 * MIB), "good.mp4": GOOD["a.mp4"]}
    for archive in (make_zip(tmp_path / "x.zip", members), make_tar(tmp_path / "x.tar", members)):
        good, reasons = take(archive)
        assert set(good) == {"good.mp4"}
        assert reasons == {"bomb.mp4": "too large: 30 MiB, the limit is 1"}


def test_a_bomb_that_lies_about_its_size(tmp_path: Path) -> None:
    archive = make_zip(tmp_path / "x.zip", {"bomb.mp4": bytes(30 * MIB), "good.mp4": GOOD["a.mp4"]})
    archive.write_bytes(archive.read_bytes().replace(struct.pack("<I", 30 * MIB), struct.pack("<I", 1000)))
    good, reasons = take(archive)
    assert set(good) == {"good.mp4"}
    assert reasons["bomb.mp4"].startswith("damaged: ")
    assert written(tmp_path) < MIB


@pytest.mark.parametrize("kind", ["zip", "tar.gz"])
def test_a_bomb_of_many_files(tmp_path: Path, kind: str) -> None:
    members = {f"{number}.mp4": bytes(MIB // 2) for number in range(40)}
    archive = tmp_path / f"x.{kind}"
    make_zip(archive, members) if kind == "zip" else make_tar(archive, members, "w:gz")
    good, reasons = take(archive)
    limit = max(MIB, 100 * archive.stat().st_size)
    assert 1 <= len(good) < 20
    assert written(tmp_path) <= limit
    assert reasons == {"X": f"too large: the archive was left where more than {limit >> 20} MiB come out of it"}


def test_a_bomb_that_is_skipped_counts_too(tmp_path: Path) -> None:
    archive = make_tar(tmp_path / "x.tar.gz", {"readme.txt": bytes(60 * MIB), "a.mp4": b"behind"}, "w:gz")
    good, reasons = take(archive)
    assert good == {}
    assert reasons["X"].startswith("too large: ")


def test_holes_are_refused(tmp_path: Path) -> None:
    """GNU tar's sparse files, here one of a GiB of nothing in 2 KiB."""
    header = bytearray(tarfile.TarInfo("hole.mp4").tobuf(tarfile.GNU_FORMAT))
    header[156:157] = tarfile.GNUTYPE_SPARSE
    header[483:495] = b"%011o\0" % (1 << 30)
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    (tmp_path / "x.tar").write_bytes(bytes(header) + make_tar(tmp_path / "y.tar", GOOD).read_bytes())
    good, reasons = take(tmp_path / "x.tar", DownloadConfig())
    assert good == GOOD
    assert reasons == {"hole.mp4": "refused: a sparse file"}


@pytest.mark.parametrize(("cut", "whole"), [(100, 3), (25_000, 2), (75_000, 1), (149_000, 0)])
def test_a_truncated_zip_keeps_what_stands_before(tmp_path: Path, cut: int, whole: int) -> None:
    archive = make_zip(tmp_path / "x.zip", GOOD)
    archive.write_bytes(archive.read_bytes()[:-cut])
    good, reasons = take(archive)
    assert good == dict(list(GOOD.items())[:whole])
    assert set(reasons) == {"X"}
    assert reasons["X"].startswith(f"damaged: unreadable after {whole} of its videos: ")


def test_a_truncated_zip_whose_members_do_not_say_their_size(tmp_path: Path) -> None:
    """As one has that was written to a pipe."""
    made = io.BytesIO()

    class Pipe:
        def write(self, data: bytes) -> int:
            return made.write(data)

        def flush(self) -> None:
            pass

    with zipfile.ZipFile(Pipe(), "w") as bundle:  # type: ignore[call-overload]
        bundle.writestr("a.mp4", GOOD["a.mp4"])
    (tmp_path / "x.zip").write_bytes(made.getvalue())
    assert take(tmp_path / "x.zip") == ({"a.mp4": GOOD["a.mp4"]}, {})
    (tmp_path / "x.zip").write_bytes(made.getvalue()[:-10])
    good, reasons = take(tmp_path / "x.zip")
    assert good == {}
    assert reasons["X"].startswith("damaged: unreadable after 0 of its videos: ")


def test_a_flipped_bit_in_a_zip_costs_one_member(tmp_path: Path) -> None:
    archive = make_zip(tmp_path / "x.zip", GOOD)
    data = bytearray(archive.read_bytes())
    data[data.index(GOOD["a.mp4"][1000:1100]) if GOOD["a.mp4"][1000:1100] in data else 5000] ^= 1
    archive.write_bytes(data)
    good, reasons = take(archive)
    assert set(good) == {"deep/b.mp4", "deep/c.mp4"}
    assert reasons["a.mp4"].startswith("damaged: ")


CUTS = {
    "in the content": lambda data, at: data[: at + 1000],
    "in the header": lambda data, at: data[: at - 300],
    "between two members": lambda data, at: data[: at - 512],
    "a bit of the header flipped": lambda data, at: data[: at - 400] + bytes([data[at - 400] ^ 1]) + data[at - 399 :],
}


@pytest.mark.parametrize("cut", CUTS)
def test_a_damaged_tar_keeps_what_stands_before(tmp_path: Path, cut: str) -> None:
    archive = make_tar(tmp_path / "x.tar", GOOD)
    data = archive.read_bytes()
    archive.write_bytes(CUTS[cut](data, data.index(GOOD["deep/b.mp4"])))
    good, reasons = take(archive)
    assert good == {"a.mp4": GOOD["a.mp4"]}
    assert reasons["X"].startswith("damaged: unreadable after 1 of its videos: ")


@pytest.mark.parametrize("kind", ["gz", "bz2", "xz"])
def test_a_packed_tar_that_breaks_off(tmp_path: Path, kind: str) -> None:
    archive = make_tar(tmp_path / f"x.tar.{kind}", {str(n) + ".mp4": noise(n, 400_000) for n in range(6)}, f"w:{kind}")
    archive.write_bytes(archive.read_bytes()[: archive.stat().st_size * 2 // 3])
    good, reasons = take(archive, DownloadConfig())
    assert all(data == noise(int(name[0]), 400_000) for name, data in good.items())
    assert reasons["X"].startswith(f"damaged: unreadable after {len(good)} of its videos")
    assert len(good) >= (1 if kind == "bz2" else 3)


def test_a_wrong_checksum_of_gzip_is_told(tmp_path: Path) -> None:
    archive = make_tar(tmp_path / "x.tar.gz", GOOD, "w:gz")
    data = bytearray(archive.read_bytes())
    data[-8] ^= 1
    archive.write_bytes(data)
    good, reasons = take(archive)
    assert good == GOOD
    assert "CRC" in reasons["X"]


def test_junk_is_told(tmp_path: Path) -> None:
    for name, data in {"x.zip": b"junk", "x.tar": b"junk" * 300, "x.tar.gz": gzip.compress(b"junk" * 300)}.items():
        (tmp_path / name).write_bytes(data)
        assert [item.reason[:8] for item in unpack(tmp_path / name, "X", tmp_path, CONFIG)] == ["damaged:"]
