"""Lists: sound ones of every form pass, and every fault is named with its line, before anything is fetched."""

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from opensora.data.validation.problems import UnreadableError
from opensora.data.validation.validate import validate


def problems(path: Path, **options: str) -> list[str]:
    return [str(problem).removeprefix(f"{path}:") for problem in validate(path, **options)]


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("a.mp4", "b.mp4"):
        (tmp_path / name).write_bytes(b"video")
    return tmp_path


def test_sound_lists_of_every_form(folder: Path) -> None:
    rows = [{"url": "https://example.org/a.mp4", "licence": "CC0-1.0"}, {"url": str(folder / "a.mp4"), "licence": ""}]
    pq.write_table(pa.Table.from_pylist(rows), folder / "l.parquet")
    write(folder / "l.jsonl", "\n".join(map(json.dumps, rows)) + "\n\n")
    write(folder / "l.json", json.dumps(rows))
    write(folder / "l.txt", "a.mp4\nb.mp4\ns3://bucket/c.mp4\n")
    write(folder / "l.csv", '\ufeffpath,caption,frames\na.mp4,"a cat,\nand a dog",9\n\nb.mp4,,9\n')
    write(
        folder / "panda.csv",
        """videoID,url,timestamp,caption
id,https://www.youtube.com/watch?v=id,"[['0:00:05', '0:00:08'], ['0:01:00', '0:01:02']]","['one', 'two']"
""",
    )
    for name in ("l.parquet", "l.jsonl", "l.json", "l.txt", "l.csv", "panda.csv"):
        assert problems(folder / name) == [], name


def test_the_list_of_the_embedded_world_is_sound(clips: Path) -> None:
    assert problems(clips / "demo_videos" / "manifest.csv") == []


ROWS = {
    "https://": "malformed URL 'https://': it names no host",
    "https://example.org/a b.mp4": "malformed URL 'https://example.org/a b.mp4': it holds a space",
    "https://example.org:port/a.mp4": "malformed URL 'https://example.org:port/a.mp4'",
    "http://127.0.0.1:8000/a.mp4": "127.0.0.1 is a private address",
    "http://[::1]/a.mp4": "::1 is a private address",
    "http://10.0.0.7/a.mp4": "10.0.0.7 is a private address",
    "http://169.254.169.254/latest": "169.254.169.254 is a private address",
    "http://localhost/a.mp4": "localhost is a private address",
    "https://store.internal/a.mp4": "store.internal is a private address",
    "zip://a.mp4": "refused: zip:// is none of http, https",
    "none.mp4": "no file at",
    "": "names no video",
}


@pytest.mark.parametrize("url", ROWS)
def test_urls_and_paths(folder: Path, url: str) -> None:
    path = write(folder / "l.csv", f"url,licence\na.mp4,CC0-1.0\n{url},CC0-1.0\nb.mp4,CC0-1.0\n")
    (found,) = problems(path)
    assert found.startswith(f"3: {ROWS[url]}")


@pytest.mark.parametrize(
    ("columns", "values", "expected"),
    [
        ("sha256", "12ab", "sha256 is '12ab'; 64 hexadecimal digits were expected"),
        ("start_s,end_s", "5,2", "has a bad span: 5 to 2"),
        ("start_s,end_s", "0:00:01,soon", "could not convert string to float: 'soon'"),
        ("start_s,end_s", "1,inf", "a span ends at inf"),
        ("caption_path", "none.json", "captions: none.json is no list of start_s, end_s and caption"),
        ("caption_path", "bad.json", "captions: bad.json has a bad span: 3 to 1 s"),
        ("caption_path", "http://10.1.1.1/c.json", "10.1.1.1 is a private address"),
        ("licence", "CC0-1.0,more", "has 1 more fields than the header"),
        ("licence,sha256", "CC0-1.0", "has only 2 of 3 fields"),
    ],
)
def test_other_columns(folder: Path, columns: str, values: str, expected: str) -> None:
    write(folder / "bad.json", json.dumps([{"start_s": 3, "end_s": 1, "caption": "x"}]))
    found = problems(write(folder / "l.csv", f"path,{columns}\na.mp4,{values}\n"))
    assert len(found) == 1
    assert found[0].startswith(f"2: {expected}")


def test_published_forms(folder: Path) -> None:
    text = """videoID,timestamp,caption
one,"[['0:00:05', '0:00:01']]","['x']"
two,"[['0:00:05', '0:00:07']]","['x', 'y']"
three,"not a list","['x']"
"""
    found = problems(write(folder / "panda.csv", text))
    assert [line.split(":")[0] for line in found] == ["2", "3", "4"]
    assert "has a bad span" in found[0]
    assert "has 1 timestamps and 2 captions" in found[1]
    split = write(folder / "trainlist01.txt", "Archery/v_Archery_g01_c01.avi 1\n")
    assert "no file at" in problems(split)[0]
    (folder / "UCF" / "Archery").mkdir(parents=True)
    (folder / "UCF" / "Archery" / "v_Archery_g01_c01.avi").touch()
    assert problems(split, videos=str(folder / "UCF")) == []
    assert "lacks 'timestamp'" in problems(write(folder / "t.csv", "url\na.mp4\n"), list_format="panda70m")[0]


def test_what_comes_twice_is_told_with_both_lines(folder: Path) -> None:
    path = write(folder / "l.csv", "path\na.mp4\nb.mp4\na.mp4\na.mp4\n")
    assert problems(path) == [
        f"4: the same video and span as in line 2: {folder / 'a.mp4'}",
        f"5: the same video and span as in line 2: {folder / 'a.mp4'}",
    ]
    spans = write(folder / "s.csv", "path,start_s,end_s\na.mp4,0,1\na.mp4,1,2\na.mp4,0:00:01,2.0\n")
    assert problems(spans) == [f"4: the same video and span as in line 3: {folder / 'a.mp4'}"]


def test_columns_that_are_not_read_and_captions_that_are_not_there(folder: Path) -> None:
    found = problems(write(folder / "l.csv", "path,capton,Licence,views\na.mp4,x,CC0-1.0,7\n"))
    assert found == [
        "1: the column 'capton' is not read; did you mean 'caption'?",
        "1: the column 'Licence' is not read; did you mean 'licence'?",
    ]
    found = problems(write(folder / "l.csv", "path,caption\na.mp4,\nb.mp4, \n"))
    assert found == [" has a column for captions, and all of them are empty"]


def test_where_a_file_breaks_off(folder: Path) -> None:
    path = folder / "l.csv"
    path.write_bytes(b"path\n" + b"a.mp4\n" * 3000 + b"caf\xe9.mp4\n" + b"b.mp4\n")
    found = [line for line in problems(path) if "same video" not in line]
    assert len(found) == 1
    assert found[0].startswith("3002: cannot be read from here on: ")
    path = write(folder / "l.jsonl", '{"url": "https://example.org/a.mp4"}\n{"url": \n')
    assert problems(path)[0].startswith("2: cannot be read from here on: ")


@pytest.mark.parametrize(
    ("name", "data", "expected"),
    [
        ("l.csv", b"", "has no rows"),
        ("l.csv", b"a,b\n1,2\n", "lacks a column for the videos"),
        ("l.csv", b"\xff\xfe\x00", "cannot be read"),
        ("l.parquet", b"junk", "no readable parquet file"),
        ("l.xlsx", b"junk", "is no list; its name must end in"),
        ("l.json", b"{", "cannot be read"),
    ],
)
def test_what_is_no_list(tmp_path: Path, name: str, data: bytes, expected: str) -> None:
    (tmp_path / name).write_bytes(data)
    with pytest.raises(UnreadableError, match=expected):
        problems(tmp_path / name)


def test_an_unknown_form(folder: Path) -> None:
    with pytest.raises(UnreadableError, match="did you mean 'panda70m'"):
        problems(write(folder / "l.csv", "path\na.mp4\n"), list_format="panda")
