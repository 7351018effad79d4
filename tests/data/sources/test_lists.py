"""Lists: our own columns, the published forms, and rows that say nothing usable."""

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from opensora.config import DownloadConfig
from opensora.data.sources.forms import seconds
from opensora.data.sources.item import Item
from opensora.data.sources.listing import resolve
from opensora.data.sources.lists import read_list as iterate_list
from opensora.manifest import WHOLE_VIDEO_S, Span
from opensora.step import StepError

WHOLE = WHOLE_VIDEO_S


def read_list(path: Path, list_format: str = "") -> list[Item]:
    return list(iterate_list(path, list_format))


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def test_our_own_columns_in_every_form(tmp_path: Path) -> None:
    row = {"url": "http://x/a.mp4", "caption": "a cat,\n and a dog", "licence": "CC0-1.0", "sha256": "AB"}
    expected = [Item("http://x/a.mp4", "ab", "CC0-1.0", spans=(Span(0.0, WHOLE, row["caption"]),))]
    pq.write_table(pa.Table.from_pylist([row]), tmp_path / "l.parquet")
    write(tmp_path / "l.jsonl", json.dumps(row) + "\n\n")
    write(tmp_path / "l.json", json.dumps([row]))
    quoted = row["caption"]
    write(tmp_path / "l.csv", f'\ufeffurl,caption,licence,sha256\nhttp://x/a.mp4,"{quoted}",CC0-1.0,AB\n')
    for name in ("l.parquet", "l.jsonl", "l.json", "l.csv"):
        assert read_list(tmp_path / name) == expected
    assert read_list(write(tmp_path / "l.txt", "http://x/a.mp4\nb c.mp4\n")) == [
        Item("http://x/a.mp4"),
        Item("b c.mp4"),
    ]


def test_every_row_is_an_item(tmp_path: Path) -> None:
    path = write(tmp_path / "l.csv", "url,start_s,end_s,caption\na,0,1,x\nb,0,1,\na,1,0:00:02.5,y\n")
    spans = (Span(0, 1, "x"),), (Span(0, 1),), (Span(1, 2.5, "y"),)
    assert read_list(path) == [Item(url, spans=given) for url, given in zip("aba", spans, strict=True)]


def test_panda_70m(tmp_path: Path) -> None:
    text = """videoID,url,timestamp,caption,matching_score
id,https://y/watch?v=id,"[['0:00:05.000', '0:00:08.500'], ['0:01:00', '0:01:02']]","['one', ""it's two""]","[0.4, 0.5]"
bad,https://www.youtube.com/watch?v=bad,"[['0:00:05', '0:00:01']]",['x'],[0.1]
worse,https://www.youtube.com/watch?v=worse,"[['0:00:05', '0:00:07']]","['x', 'y']",[0.1]
"""
    good, bad, worse = read_list(write(tmp_path / "panda.csv", text))
    assert good.spans == (Span(5.0, 8.5, "one"), Span(60.0, 62.0, "it's two"))
    assert bad.reason.startswith("bad row: number 2 has a bad span")
    assert worse.reason.startswith("bad row: number 3 has 1 timestamps and 2 captions")


def test_hd_vg_130m(tmp_path: Path) -> None:
    scenes = [{"clip_id": "a", "scene_cut": [0, 100], "caption": "one"}, {"scene_cut": [100, 400], "caption": "two"}]
    clip = {"span": ["00:00:10.000", "00:00:18.000"], "scene_split": scenes}
    document = {"id": {"url": "https://www.youtube.com/watch?v=id", "clip": {"id.0.mp4": clip}}}
    (item,) = read_list(write(tmp_path / "hdvg_0.json", json.dumps(document)))
    assert item == Item("https://www.youtube.com/watch?v=id", spans=(Span(10.0, 12.0, "one"), Span(12.0, 18.0, "two")))


def test_msr_vtt(tmp_path: Path) -> None:
    video = {"video_id": "video0", "url": "https://www.youtube.com/watch?v=x", "start time": 1.5, "end time": 4}
    document = {"videos": [video], "sentences": [{"video_id": "video0", "caption": "a man sings"}]}
    (item,) = read_list(write(tmp_path / "m.json", json.dumps(document)))
    assert item.spans == (Span(1.5, 4.0, "a man sings"),)
    cut = resolve(item, "/data/msrvtt", "/data/msrvtt")
    assert (cut.url, cut.spans) == ("/data/msrvtt/video0.mp4", (Span(0.0, WHOLE, "a man sings"),))


def test_ucf101(tmp_path: Path) -> None:
    path = write(tmp_path / "trainlist01.txt", "ApplyEyeMakeup/v_ApplyEyeMakeup_g08_c01.avi 1\n")
    (item,) = read_list(path)
    assert item == Item("ApplyEyeMakeup/v_ApplyEyeMakeup_g08_c01.avi", spans=(Span(0.0, WHOLE, "apply eye makeup"),))
    assert resolve(item, "/d/UCF", "/d/UCF").url == "/d/UCF/ApplyEyeMakeup/v_ApplyEyeMakeup_g08_c01.avi"


def test_lists_of_stock_videos(tmp_path: Path) -> None:
    path = write(
        tmp_path / "webvid.csv", "videoid,contentUrl,duration,page_dir,name\n1,https://x/1.mp4,PT1S,d,a beach\n"
    )
    assert read_list(path) == [Item("https://x/1.mp4", spans=(Span(0.0, WHOLE, "a beach"),))]


@pytest.mark.parametrize(
    ("text", "message"),
    [("", "no rows"), ("a,b\n1,2\n", "lacks a column"), ("{", "cannot be read")],
)
def test_lists_that_are_none(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(StepError, match=message):
        read_list(write(tmp_path / ("l.jsonl" if text == "{" else "l.csv"), text))
    with pytest.raises(StepError, match="this is 5"):
        read_list(write(tmp_path / "l.json", "5"))
    (tmp_path / "x.csv").write_bytes(b"url\n\xff\xfe\n")
    with pytest.raises(StepError, match="UTF-8"):
        read_list(tmp_path / "x.csv")
    with pytest.raises(StepError, match="did you mean 'panda70m'"):
        read_list(tmp_path / "x.csv", "panda")
    assert DownloadConfig().list_format == ""


def test_a_row_without_a_video_is_kept_in_sight(tmp_path: Path) -> None:
    good, bad = read_list(write(tmp_path / "l.csv", "url,caption\na,x\n,y\n"))
    assert (good.reason, bad.reason) == ("", "bad row: number 2 names no video")


def test_paths_are_those_of_the_list() -> None:
    assert resolve(Item("a.mp4"), "/d/list.csv", "").url == "/d/a.mp4"
    assert resolve(Item("a.mp4"), "http://h/d/list.csv", "").url == "http://h/d/a.mp4"
    assert resolve(Item("a.mp4"), "s3://b/d/list.csv", "").url == "s3://b/d/a.mp4"
    assert resolve(Item("a.mp4"), "http://h/v", "http://h/v").url == "http://h/v/a.mp4"
    assert resolve(Item("dQw4w9WgXcQ"), "/d/list.csv", "").url == "https://www.youtube.com/watch?v=dQw4w9WgXcQ"


@pytest.mark.parametrize(("text", "value"), [("1:02:03.5", 3723.5), ("90", 90.0), (2, 2.0), ("00:10", 10.0)])
def test_times(text: object, value: float) -> None:
    assert seconds(text) == value
