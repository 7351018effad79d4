"""The step `download`: good and bad files, lists, archives and buckets; nothing is lost, brought or counted twice."""

import io
import json
import os
import tarfile
import threading
import zipfile
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest

from opensora.clip_file import write_clip
from opensora.config import DownloadConfig, ExecutorConfig
from opensora.data.download import run
from opensora.manifest import Clip, Span, manifest_hash, read_manifest
from opensora.step import StepError
from tests.shared import shared

EXECUTOR = ExecutorConfig(kind="sequential")
LOCAL = DownloadConfig(allow_private_hosts=True, retries=0, timeout_s=5, max_bad_share=0.9)


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("opensora.data.sources.fetch.BACK_OFF_S", 0.0)


class Counting(SimpleHTTPRequestHandler):
    """Serves a folder and counts whole answers by path."""

    served: list[str] = []  # noqa: RUF012 (one server a test)

    def send_response(self, code: int, message: str | None = None) -> None:
        if code == 200:
            self.served.append(self.path)
        super().send_response(code, message)

    def log_message(self, *_: object) -> None:
        pass


def serve(folder: Path) -> ThreadingHTTPServer:
    Counting.served = []
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Counting, directory=str(folder)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return server


@pytest.fixture
def web(tmp_path: Path) -> Iterator[tuple[Path, str]]:
    """A folder, and its URL."""
    (tmp_path / "web").mkdir()
    server = serve(tmp_path / "web")
    yield tmp_path / "web", f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()


def rows(tmp_path: Path) -> dict[str, Clip]:
    return {Path(row.source).name: row for row in read_manifest(tmp_path / "download")}


def video(path: Path, seed: int = 0) -> Path:
    frames = np.random.default_rng(seed).integers(0, 255, (6, 32, 32, 3), dtype=np.uint8)
    return write_clip(path, frames, 8)


def test_a_folder_with_good_and_bad_files(tmp_path: Path) -> None:
    source = tmp_path / "in"
    source.mkdir()
    video(source / "a b.mp4")
    video(source / "copy.mp4")
    video(source / "other.mp4", seed=1)
    (source / "other.captions.json").write_text('[{"start_s": 0, "end_s": 0.5, "caption": "noise"}]')
    (source / "text.mp4").write_text("no video")
    (source / "empty.mp4").write_bytes(b"")
    report = run(DownloadConfig(max_bad_share=0.9), str(source), tmp_path / "download", EXECUTOR)
    assert (report.total, report.kept) == (5, 2)
    assert report.dropped == {"duplicate": 1, "unreadable": 1, "empty": 1}
    rows = {Path(row.source).name: row for row in read_manifest(tmp_path / "download")}
    assert (rows["a b.mp4"].width, rows["a b.mp4"].fps) == (32, 8.0)
    assert rows["other.mp4"].spans == (Span(0.0, 0.5, "noise"),)
    assert (tmp_path / rows["other.mp4"].path).is_file()


def test_real_bad_videos_are_recorded(tmp_path: Path) -> None:
    report = run(DownloadConfig(), str(shared("videos")), tmp_path / "download", EXECUTOR)
    rows = read_manifest(tmp_path / "download")
    bad = {Path(row.source).name: row.reason for row in rows if not row.kept}
    assert set(bad) == {path.name for path in shared("videos").glob("bad_*")}
    assert all(bad.values())
    assert report.kept == len(rows) - len(bad) == 7


def test_a_list_with_a_dead_entry(tmp_path: Path) -> None:
    video(tmp_path / "a.mp4")
    video(tmp_path / "b.mp4", seed=1)
    lines = [{"url": "a.mp4", "licence": "CC0-1.0"}, {"url": "gone.mp4"}, {"url": "b.mp4", "sha256": "00"}]
    (tmp_path / "list.jsonl").write_text("\n".join(map(json.dumps, lines)))
    report = run(DownloadConfig(max_bad_share=0.9), str(tmp_path / "list.jsonl"), tmp_path / "download", EXECUTOR)
    assert report.dropped == {"missing": 1, "wrong content": 1}
    assert read_manifest(tmp_path / "download")[0].licence == "CC0-1.0"


def test_a_list_of_open_sora_s_form_gives_captions(tmp_path: Path) -> None:
    from opensora.config import SplitConfig
    from opensora.data import split

    video(tmp_path / "a.mp4")
    (tmp_path / "list.csv").write_text('path,caption,frames\na.mp4,"a cat, and a dog",16\n')
    run(DownloadConfig(), str(tmp_path / "list.csv"), tmp_path / "download", EXECUTOR)
    split.run(SplitConfig(workers=1), tmp_path / "download", tmp_path / "split", EXECUTOR)
    rows = read_manifest(tmp_path / "split")
    assert {(row.caption, row.caption_model) for row in rows} == {("a cat, and a dog", "given")}


def test_twice_is_once(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    video(tmp_path / "in" / "a.mp4")
    first = run(DownloadConfig(), str(tmp_path / "in"), tmp_path / "download", EXECUTOR)
    stamp = (tmp_path / "download").stat().st_mtime_ns
    assert run(DownloadConfig(), str(tmp_path / "in"), tmp_path / "download", EXECUTOR) == first
    assert (tmp_path / "download").stat().st_mtime_ns == stamp
    video(tmp_path / "in" / "b.mp4", seed=2)
    assert run(DownloadConfig(), str(tmp_path / "in"), tmp_path / "download", EXECUTOR).kept == 2


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nowhere", "does not exist"),
        ("empty", "holds no video"),
        ("x.pdf", "none of the sources"),
        ("y.csv", "no rows"),
    ],
)
def test_bad_sources(tmp_path: Path, name: str, message: str) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "x.pdf").write_text("")
    (tmp_path / "y.csv").write_text("url\n")
    with pytest.raises(StepError, match=message):
        run(LOCAL, str(tmp_path / name), tmp_path / "download", EXECUTOR)


def test_nothing_usable_fails_with_the_reasons(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.mp4").write_text("no video")
    with pytest.raises(StepError, match="1 unreadable"):
        run(DownloadConfig(), str(tmp_path / "in"), tmp_path / "download", EXECUTOR)
    assert not (tmp_path / "download").exists()


def test_a_list_that_grows_costs_only_what_is_new(web: tuple[Path, str], tmp_path: Path) -> None:
    folder, url = web
    for number in range(3):
        video(folder / f"{number}.mp4", seed=number)
        os.utime(folder / f"{number}.mp4", (1e9, 1e9))
    (folder / "list.csv").write_text("url\n0.mp4\n1.mp4\n0.mp4\n")
    report = run(LOCAL, f"{url}/list.csv", tmp_path / "download", EXECUTOR)
    assert (report.total, report.kept) == (2, 2)  # the same URL twice is one video
    (folder / "list.csv").write_text("url\n2.mp4\n0.mp4\n1.mp4\n")
    assert run(LOCAL, f"{url}/list.csv", tmp_path / "download", EXECUTOR).kept == 3
    assert sorted(path for path in Counting.served if path.endswith("mp4")) == ["/0.mp4", "/1.mp4", "/2.mp4"]


def test_content_that_changed_is_brought_anew(web: tuple[Path, str], tmp_path: Path) -> None:
    folder, url = web
    video(folder / "a.mp4", seed=0)
    os.utime(folder / "a.mp4", (1e9, 1e9))
    (folder / "list.csv").write_text("url\na.mp4\n")
    run(LOCAL, f"{url}/list.csv", tmp_path / "download", EXECUTOR)
    before = rows(tmp_path)["a.mp4"]
    video(folder / "a.mp4", seed=1)
    again = LOCAL.model_copy(update={"max_mib": 100})  # another configuration: the step runs again
    run(again, f"{url}/list.csv", tmp_path / "download", EXECUTOR)
    after = rows(tmp_path)["a.mp4"]
    assert after.source_sha256 != before.source_sha256
    assert after.path == before.path


def test_another_port_of_this_machine_is_the_same_source(tmp_path: Path) -> None:
    (tmp_path / "web").mkdir()
    video(tmp_path / "web" / "a.mp4")
    (tmp_path / "web" / "list.csv").write_text("url\na.mp4\n")
    hashes = []
    for name in ("one", "two"):
        server = serve(tmp_path / "web")
        (tmp_path / name).mkdir()
        run(LOCAL, f"http://127.0.0.1:{server.server_address[1]}/list.csv", tmp_path / name / "download", EXECUTOR)
        hashes.append(manifest_hash(tmp_path / name / "download"))
        server.shutdown()
    assert hashes[0] == hashes[1]


def test_names_that_are_alike_and_strange(tmp_path: Path) -> None:
    names = ["a/clip.mp4", "b/clip.mp4", 'it\'s "q".mp4', "two\nlines.mp4", "видео.mp4"]
    for number, name in enumerate(names):
        (tmp_path / "in" / name).parent.mkdir(parents=True, exist_ok=True)
        video(tmp_path / "in" / name, seed=number)
    report = run(LOCAL, str(tmp_path / "in"), tmp_path / "download", EXECUTOR)
    assert report.kept == len(names)
    assert all(Path(row.path).is_file() for row in read_manifest(tmp_path / "download"))


@pytest.mark.parametrize("kind", ["zip", "tar.gz"])
def test_archives_are_unpacked_and_nothing_leaves_them(tmp_path: Path, kind: str) -> None:
    data = video(tmp_path / "x.mp4").read_bytes()
    names = ["good/a.mp4", "../outside.mp4", "/absolute.mp4"]
    archive = tmp_path / f"videos.{kind}"
    if kind == "zip":
        with zipfile.ZipFile(archive, "w") as bundle:
            for name in names:
                bundle.writestr(name, data)
    else:
        with tarfile.open(archive, "w:gz") as bundle:
            for name in names:
                member = tarfile.TarInfo(name)
                member.size = len(data)
                bundle.addfile(member, io.BytesIO(data))
            link = tarfile.TarInfo("link.mp4")
            link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
            bundle.addfile(link)
    base = tmp_path / "runs"
    base.mkdir()
    report = run(LOCAL, str(archive), base / "download", EXECUTOR)
    assert report.kept == 1
    assert report.dropped == {"refused": 2 if kind == "zip" else 3}
    assert not (tmp_path / "outside.mp4").exists()
    assert not Path("/absolute.mp4").exists()


def test_pages_of_platforms_are_brought_by_yt_dlp(
    web: tuple[Path, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, url = web
    video(folder / "a.mp4")
    monkeypatch.setattr("opensora.data.sources.platforms.HOSTS", {"127.0.0.1"})
    (tmp_path / "list.jsonl").write_text("\n".join(json.dumps({"url": f"{url}/{name}.mp4"}) for name in "ab"))
    report = run(LOCAL, str(tmp_path / "list.jsonl"), tmp_path / "download", EXECUTOR)
    assert (report.kept, report.dropped) == (1, {"dead link": 1})
    assert not list((tmp_path / "videos").glob("*.yt/video.mp4"))


def test_a_bad_side_car_is_recorded(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    for name, side in {
        "a": "not json",
        "b": '[{"start_s": 0}]',
        "c": '[{"start_s": 0, "end_s": 1, "caption": "x"}]',
    }.items():
        video(tmp_path / "in" / f"{name}.mp4", seed=ord(name))
        (tmp_path / "in" / f"{name}.captions.json").write_text(side)
    assert run(LOCAL, str(tmp_path / "in"), tmp_path / "download", EXECUTOR).dropped == {"bad captions": 2}


def test_a_full_disk_is_no_bad_item(web: tuple[Path, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, url = web
    video(folder / "a.mp4")
    (folder / "list.csv").write_text("url\na.mp4\n")

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("opensora.data.download.bring", full)
        with pytest.raises(OSError, match="No space left"):
            run(LOCAL, f"{url}/list.csv", tmp_path / "download", EXECUTOR)
    assert run(LOCAL, f"{url}/list.csv", tmp_path / "download", EXECUTOR).kept == 1
