"""The step `download` when something goes wrong: killed, no space, sources that change or come twice."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest

from opensora.clip_file import write_clip
from opensora.config import DownloadConfig, ExecutorConfig
from opensora.data.download import run
from opensora.manifest import Clip, Span, manifest_hash, read_manifest
from opensora.step import StepError
from tests.conftest import ROOT
from tests.data.file_server import FileServer, etag, file_server

EXECUTOR = ExecutorConfig(kind="sequential")
CONFIG = DownloadConfig(
    allow_private_hosts=True, retries=0, timeout_s=120, max_bad_share=0.9, connections=1, shard_videos=2
)


@pytest.fixture
def server() -> Iterator[FileServer]:
    with file_server() as running:
        yield running


def video(path: Path, seed: int, side: int = 32, frames: int = 6) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 255, (frames, side, side, 3), dtype=np.uint8)
    return write_clip(path, pixels, 8)


def rows(folder: Path) -> dict[str, Clip]:
    found = read_manifest(folder / "download")
    assert len({row.source for row in found}) == len(found)
    return {Path(row.source).name: row for row in found}


def wait_for(happened: Callable[[], bool], process: "subprocess.Popen[bytes]") -> None:
    end = time.monotonic() + 120
    while not happened():
        assert process.poll() is None, "the process ended by itself"
        assert time.monotonic() < end, "it did not happen in two minutes"
        time.sleep(0.02)


def kill(process: "subprocess.Popen[bytes]") -> None:
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait(60)


PROGRAM = """
import signal, sys
from pathlib import Path
from opensora.config import DownloadConfig, ExecutorConfig
from opensora.data.download import run

signal.signal(signal.SIGINT, signal.default_int_handler)  # whoever runs the tests may ignore it
config = DownloadConfig.model_validate_json(sys.argv[1])
run(config, sys.argv[2], Path(sys.argv[3]), ExecutorConfig(kind="sequential"))
"""


def test_a_killed_download_goes_on_with_the_byte_that_it_had_not(server: FileServer, tmp_path: Path) -> None:
    names = ["a", "b", "c", "d"]  # two shards of two
    for seed, name in enumerate(names):
        server.files[f"/{name}.mp4"] = video(tmp_path / "made" / f"{name}.mp4", seed, side=256, frames=12).read_bytes()
    slow = server.files["/d.mp4"]
    held = len(slow) // 2
    assert held > 300_000
    server.hold["/d.mp4"] = held
    server.files["/list.csv"] = "\n".join(["url", *(f"{name}.mp4" for name in names)]).encode()
    output = tmp_path / "run" / "download"
    command = [sys.executable, "-c", PROGRAM, CONFIG.model_dump_json(), f"{server.url}/list.csv", str(output)]
    process = subprocess.Popen(
        command, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, start_new_session=True, stderr=subprocess.DEVNULL
    )
    try:
        store, work = output.parent / "videos", output.parent / ".partial" / "download"

        def in_the_middle() -> bool:
            parts = list(store.glob("*-d.mp4.part"))
            noted = work / "rows" / "00001.jsonl"
            return bool(parts) and parts[0].stat().st_size > 200_000 and noted.is_file() and noted.stat().st_size > 0

        wait_for(in_the_middle, process)
    finally:
        kill(process)
    (part,) = store.glob("*-d.mp4.part")
    have = part.stat().st_size
    assert 0 < have <= held
    assert not output.exists()
    server.go_on.set()
    server.hold.clear()
    before = len(server.log)

    report = run(CONFIG, f"{server.url}/list.csv", output, EXECUTOR)

    assert (report.total, report.kept) == (4, 4)
    assert [request.path for request in server.log[before:]] == ["/list.csv", "/d.mp4"]  # a, b, c are not asked for
    asked = server.log[-1]
    assert (asked.headers["range"], asked.headers["if-range"]) == (f"bytes={have}-", etag(slow))
    assert (asked.status, asked.sent) == (206, len(slow) - have)  # no byte came twice
    assert (output.parent / rows(output.parent)["d.mp4"].path).read_bytes() == slow
    assert not list(store.glob("*.part"))
    run(CONFIG, f"{server.url}/list.csv", tmp_path / "undisturbed" / "download", EXECUTOR)
    assert manifest_hash(output) == manifest_hash(tmp_path / "undisturbed" / "download")


def test_ctrl_c_does_not_wait_for_downloads(server: FileServer, tmp_path: Path) -> None:
    """Two are under way, of a server that is silent: with its thousand tries a run that waited would not end."""
    for name in ("/a.mp4", "/b.mp4"):
        server.files[name] = bytes(400_000)
        server.hold[name] = 300_000
    server.files["/list.csv"] = b"url\na.mp4\nb.mp4\n"
    config = CONFIG.model_copy(update={"retries": 1000, "timeout_s": 3.0, "connections": 2})
    output = tmp_path / "download"
    command = [sys.executable, "-c", PROGRAM, config.model_dump_json(), f"{server.url}/list.csv", str(output)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(command, cwd=ROOT, env=environment, start_new_session=True, stderr=subprocess.DEVNULL)
    try:
        parts = tmp_path / "videos"
        wait_for(lambda: len([p for p in parts.glob("*.part") if p.stat().st_size > 200_000]) == 2, process)
        process.send_signal(signal.SIGINT)
        assert process.wait(120) != 0
    finally:
        kill(process)
    assert len(list(parts.glob("*.part"))) == 2
    assert not output.exists()


def test_a_source_that_changes_while_it_is_away_is_not_mixed(server: FileServer, tmp_path: Path) -> None:
    """What was half here is of another version: the rest of the new one would make neither."""
    old = video(tmp_path / "old.mp4", 1, side=256, frames=12).read_bytes()
    new = video(tmp_path / "new.mp4", 2, side=256, frames=12).read_bytes()
    server.files |= {"/list.csv": b"url\na.mp4\n", "/a.mp4": old}
    source = f"{server.url}/list.csv"
    run(CONFIG, source, tmp_path / "download", EXECUTOR)
    (whole,) = (tmp_path / "videos").glob("*-a.mp4")
    part = whole.with_name(whole.name + ".part")
    part.write_bytes(old[:100_000])
    part.with_name(part.name + ".version.json").write_text(json.dumps({"etag": etag(old), "modified": ""}))
    server.files["/a.mp4"] = new
    run(CONFIG.model_copy(update={"max_mib": 100}), source, tmp_path / "download", EXECUTOR)
    assert (tmp_path / rows(tmp_path)["a.mp4"].path).read_bytes() == new


def test_a_local_video_or_its_captions_that_change_are_read_again(tmp_path: Path) -> None:
    path = video(tmp_path / "in" / "a.mp4", 1)
    side = path.with_suffix(".captions.json")
    side.write_text('[{"start_s": 0, "end_s": 0.5, "caption": "one"}]')
    run(CONFIG, str(tmp_path / "in"), tmp_path / "download", EXECUTOR)
    first = rows(tmp_path)["a.mp4"]
    side.write_text('[{"start_s": 0, "end_s": 0.5, "caption": "another"}]')
    run(CONFIG, str(tmp_path / "in"), tmp_path / "download", EXECUTOR)
    assert rows(tmp_path)["a.mp4"].spans == (Span(0.0, 0.5, "another"),)
    video(path, 2)
    run(CONFIG, str(tmp_path / "in"), tmp_path / "download", EXECUTOR)
    assert rows(tmp_path)["a.mp4"].source_sha256 != first.source_sha256


def test_what_comes_twice_counts_once(server: FileServer, tmp_path: Path) -> None:
    """The same id twice in a list, two files of one name, one content at two places, a link with two signatures."""
    one, two = (video(tmp_path / f"{seed}.mp4", seed).read_bytes() for seed in (1, 2))
    for path, data in {"/x/clip.mp4": one, "/y/clip.mp4": two, "/z/copy.mp4": one, "/s.mp4?token=1": two}.items():
        server.files[path] = data
    server.files["/s.mp4?token=2"] = two
    urls = ["x/clip.mp4", "y/clip.mp4", "x/clip.mp4", "z/copy.mp4", "s.mp4?token=1", "s.mp4?token=2"]
    server.files["/list.csv"] = "\n".join(["url", *urls]).encode()
    report = run(CONFIG, f"{server.url}/list.csv", tmp_path / "download", EXECUTOR)
    assert (report.total, report.kept, report.dropped) == (5, 2, {"duplicate": 3})
    kept = [row for row in read_manifest(tmp_path / "download") if row.kept]
    assert [row.source for row in kept] == ["http://localhost/x/clip.mp4", "http://localhost/y/clip.mp4"]
    assert len({row.clip_id for row in kept}) == len({row.path for row in kept}) == 2
    assert [len(server.asked(f"/{url}")) for url in dict.fromkeys(urls)] == [1] * 5


def test_names_that_are_no_text_are_recorded(tmp_path: Path) -> None:
    video(tmp_path / "in" / "good.mp4", 1)
    strange = os.fsencode(tmp_path / "in") + b"/caf\xe9.mp4"
    try:
        with open(strange, "wb") as handle:
            handle.write(b"x")
    except OSError:
        pytest.skip("this file system takes no such names")
    report = run(CONFIG, str(tmp_path / "in"), tmp_path / "download", EXECUTOR)
    assert (report.kept, report.dropped) == (1, {"refused": 1})


def test_too_many_shards_are_refused_before_anything_is_brought(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("opensora.data.download.MAX_SHARDS", 2)
    (tmp_path / "list.csv").write_text("\n".join(["url", *(f"http://127.0.0.1:9/{n}.mp4" for n in range(5))]))
    with pytest.raises(StepError, match=r"set download\.shard_videos to 3 or more"):
        run(CONFIG, str(tmp_path / "list.csv"), tmp_path / "download", EXECUTOR)


FULL = """
set -e
mount -t tmpfs -o size=600k none "$1"
"$2" -c "$3" "$4" "$5" "$1/download" 2> "$6" && exit 99
ls -A "$1" "$1/videos" > "$7"
mount -o remount,size=64m "$1"
"$2" -c "$3" "$4" "$5" "$1/download" 2>> "$6"
cp -r "$1/download" "$8"
"""


def test_a_disk_that_is_full_and_then_is_not(server: FileServer, tmp_path: Path) -> None:
    """A file system of 600 KiB of its own: the step ends with the reason, and goes on when there is space."""
    big = video(tmp_path / "big.mp4", 1, side=256, frames=12).read_bytes()
    assert len(big) > 700_000
    server.files |= {"/list.csv": b"url\nbig.mp4\n", "/big.mp4": big}
    (tmp_path / "disk").mkdir()
    names = [str(tmp_path / name) for name in ("errors", "left", "result")]
    command = ["unshare", "--map-root-user", "--mount", "sh", "-c", FULL, "sh", str(tmp_path / "disk"), sys.executable]
    command += [PROGRAM, CONFIG.model_dump_json(), f"{server.url}/list.csv", *names]
    probe = ["unshare", "--map-root-user", "--mount", "sh", "-c", f"mount -t tmpfs none '{tmp_path / 'disk'}'"]
    if subprocess.run(probe, capture_output=True, timeout=60, check=False).returncode:
        pytest.skip("no right to mount a small file system here")
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=240, check=False)
    said = (tmp_path / "errors").read_text()
    assert done.returncode == 0, said + done.stderr
    assert "No space left on device" in said
    assert "download\n" not in (tmp_path / "left").read_text()
    (row,) = read_manifest(tmp_path / "result")
    assert (row.kept, row.size) == (True, len(big))
    assert sum(request.sent for request in server.asked("/big.mp4")) >= len(big)
    assert server.asked("/big.mp4")[-1].status == 206  # what came before was kept
