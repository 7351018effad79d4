"""Downloads: cut connections, dead links, private hosts, bad files, and a resumed run."""

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest

from opensora.clip_file import write_clip
from opensora.config import DownloadConfig, ExecutorConfig
from opensora.data.download import DownloadError, fetch, list_items, run
from opensora.manifest import Span, read_manifest
from opensora.step import StepError
from tests.shared import shared

CONTENT = bytes(range(256)) * 4000
EXECUTOR = ExecutorConfig(kind="sequential")
CONFIG = DownloadConfig(allow_private_hosts=True, retries=5, timeout_s=5)


class Cutting(BaseHTTPRequestHandler):
    """Ends every connection after 300,000 bytes; honours ranges when `ranges` is set."""

    requests: list[str | None] = []  # noqa: RUF012 (one server a test)
    ranges = True

    def do_GET(self) -> None:
        if self.path == "/missing":
            self.send_error(404)
            return
        wanted = self.headers.get("Range")
        self.requests.append(wanted)
        start = int(wanted.removeprefix("bytes=").rstrip("-")) if wanted and self.ranges else 0
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(CONTENT) - start))
        self.send_header("ETag", '"one"')
        self.end_headers()
        self.wfile.write(CONTENT[start : start + 300_000])

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def server() -> Iterator[str]:
    Cutting.requests, Cutting.ranges = [], True
    server = ThreadingHTTPServer(("127.0.0.1", 0), Cutting)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("opensora.data.download.BACK_OFF_S", 0.0)


def test_a_cut_connection_goes_on_where_it_broke(server: str, tmp_path: Path) -> None:
    fetch(f"{server}/x", tmp_path / "x", CONFIG)
    assert (tmp_path / "x").read_bytes() == CONTENT
    starts = [int(wanted[6:-1]) for wanted in Cutting.requests[1:] if wanted]
    assert Cutting.requests[0] is None
    assert len(starts) >= 3
    assert starts == sorted(set(starts))
    assert [path.name for path in tmp_path.iterdir()] == ["x"]


def test_without_ranges_nothing_half_stands_under_the_name(server: str, tmp_path: Path) -> None:
    Cutting.ranges = False
    with pytest.raises(DownloadError, match="download failed"):
        fetch(f"{server}/x", tmp_path / "x", CONFIG)
    assert not (tmp_path / "x").exists()


def test_dead_links_and_large_files_are_not_tried_again(server: str, tmp_path: Path) -> None:
    with pytest.raises(DownloadError, match="dead link: HTTP 404"):
        fetch(f"{server}/missing", tmp_path / "x", CONFIG)
    small = CONFIG.model_copy(update={"max_mib": 1})
    fetch(f"{server}/x", tmp_path / "x", small)  # just under a MiB


def test_private_hosts_are_refused(server: str, tmp_path: Path) -> None:
    with pytest.raises(DownloadError, match=r"refused: 127\.0\.0\.1"):
        fetch(f"{server}/x", tmp_path / "x", DownloadConfig())
    assert Cutting.requests == []


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
    lines = [{"url": "a.mp4", "licence": "CC0-1.0"}, {"url": "gone.mp4"}, {"url": "a.mp4", "sha256": "00"}]
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
    ("name", "message"), [("nowhere", "no such folder"), ("empty", "holds no video"), ("x.txt", "neither a folder")]
)
def test_bad_sources(tmp_path: Path, name: str, message: str) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "x.txt").write_text("")
    with pytest.raises(StepError, match=message):
        list_items(str(tmp_path / name), DownloadConfig())


def test_nothing_usable_fails_with_the_reasons(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.mp4").write_text("no video")
    with pytest.raises(StepError, match="1 unreadable"):
        run(DownloadConfig(), str(tmp_path / "in"), tmp_path / "download", EXECUTOR)
    assert not (tmp_path / "download").exists()
