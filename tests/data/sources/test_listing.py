"""What a source's URI names; what a list may name, and what it may not."""

import json
from pathlib import Path

import pytest

from opensora.config import DownloadConfig
from opensora.data.sources.item import Item
from opensora.data.sources.listing import list_items, resolve
from opensora.data.sources.platforms import is_platform
from opensora.step import StepError
from tests.data.file_server import file_server

LOCAL = DownloadConfig(allow_private_hosts=True, retries=0, timeout_s=30)


def test_a_folder_in_order_with_its_captions(tmp_path: Path) -> None:
    for name in ("b/z.mp4", "b/a.MOV", "a.mp4", "c.webm", "b.mp4", "x.txt", "b/deep/k.mkv"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "b" / "z.captions.json").write_text("[]")
    (tmp_path / "loop").symlink_to(tmp_path)
    items = list(list_items(str(tmp_path), LOCAL, tmp_path / "store"))
    names = [str(Path(item.url).relative_to(tmp_path)) for item in items]
    assert names == ["a.mp4", "b/a.MOV", "b/deep/k.mkv", "b/z.mp4", "b.mp4", "c.webm"]
    assert [Path(item.captions).name for item in items if item.captions] == ["z.captions.json"]


FOREIGN = [
    "/etc/hostname",
    "//etc/hostname",
    "local:///etc/hostname",
    "dir:///etc/hostname",
    "zip://a.mp4::file:///etc/x.zip",
    "sftp://host/a.mp4",
    "ftp://host/a.mp4",
    "memory://a.mp4",
]


@pytest.mark.parametrize("url", FOREIGN)
def test_a_list_from_elsewhere_reads_no_file_of_this_machine(url: str) -> None:
    assert resolve(Item(url), "https://example.org/list.csv", "").reason.startswith("refused: ")
    beside = Item("https://example.org/a.mp4", captions=url)
    assert resolve(beside, "https://example.org/list.csv", "").reason.startswith("refused: ")


def test_a_list_from_elsewhere_may_name_what_lies_below_the_folder_that_the_user_gave(tmp_path: Path) -> None:
    web, videos = "https://example.org/list.csv", str(tmp_path)
    assert resolve(Item("a/b.mp4"), web, videos) == Item(f"{tmp_path}/a/b.mp4")
    assert resolve(Item("../b.mp4"), web, videos).reason.startswith("refused: ")
    assert resolve(Item("/etc/hostname"), web, videos).reason.startswith("refused: ")
    (tmp_path / "out").symlink_to("/etc")
    assert resolve(Item("out/hostname"), web, videos).reason.startswith("refused: ")


@pytest.mark.parametrize("url", FOREIGN[2:])
def test_a_list_of_this_machine_names_files_and_known_places_alone(url: str) -> None:
    reason = resolve(Item(url), "/d/list.csv", "").reason
    assert reason.startswith("refused: ") or "::" in url  # a name with :: is a file's
    assert resolve(Item("/d/a.mp4"), "/d/list.csv", "") == Item("/d/a.mp4")
    assert resolve(Item("s3://b/a.mp4"), "/d/list.csv", "").reason == ""


def test_a_list_on_the_web_is_fetched_and_its_names_are_its_own(tmp_path: Path) -> None:
    rows = [{"url": "a b.mp4"}, {"url": str(tmp_path / "secret.mp4")}, {"url": "https://example.org/c.mp4"}]
    (tmp_path / "secret.mp4").write_bytes(b"secret")
    with file_server() as server:
        server.files["/lists/l.jsonl"] = "\n".join(map(json.dumps, rows)).encode()
        items = list(list_items(f"{server.url}/lists/l.jsonl", LOCAL, tmp_path / "store"))
    assert [item.url for item in items][::2] == [f"{server.url}/lists/a b.mp4", "https://example.org/c.mp4"]
    assert [bool(item.reason) for item in items] == [False, True, False]


def test_a_list_that_cannot_be_fetched_or_is_none(tmp_path: Path) -> None:
    with file_server() as server:
        with pytest.raises(StepError, match="could not be fetched: dead link: HTTP 404"):
            list(list_items(f"{server.url}/l.csv", LOCAL, tmp_path / "store"))
        with pytest.raises(StepError, match="neither a list nor an archive"):
            list(list_items(f"{server.url}/l.html", LOCAL, tmp_path / "store"))
    with pytest.raises(StepError, match="cannot be read"):
        list(list_items("nowhere://x/y", LOCAL, tmp_path / "store"))


@pytest.mark.parametrize(
    ("url", "is_one"),
    [
        ("https://www.youtube.com/watch?v=x", True),
        ("https://m.youtube.com/watch?v=x", True),
        ("https://youtu.be/x", True),
        ("https://youtube.com.example.org/x", False),
        ("https://example.org/youtube.com", False),
        ("file://youtube.com/etc/passwd", False),
        ("s3://youtube.com/x", False),
    ],
)
def test_which_urls_are_pages_of_platforms(url: str, is_one: bool) -> None:
    assert is_platform(url) == is_one
