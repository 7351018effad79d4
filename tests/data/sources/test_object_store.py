"""Objects of a bucket: listed with their captions, taken up where a stopped run left, not read again when unchanged."""

import errno
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from opensora.clip_file import write_clip
from opensora.config import DownloadConfig, ExecutorConfig
from opensora.data.download import run
from opensora.data.sources.object_store import bring_object
from opensora.data.sources.partial import DownloadError, Partial
from opensora.manifest import Span, read_manifest
from tests.s3 import s3_server

CONFIG = DownloadConfig(max_mib=1)


@pytest.fixture(scope="module")
def bucket() -> Iterator[Any]:
    """A client of an S3 server with the bucket "films"."""
    import boto3

    with pytest.MonkeyPatch.context() as patch, s3_server(patch) as endpoint:
        patch.setenv("AWS_ENDPOINT_URL", endpoint)
        client = boto3.client("s3")
        client.create_bucket(Bucket="films")
        yield client


def forget() -> None:
    """What s3fs remembers of a bucket, as in a new process."""
    import s3fs

    s3fs.S3FileSystem.clear_instance_cache()


@pytest.fixture(autouse=True)
def _new_process() -> None:
    forget()


def test_a_folder_of_a_bucket(bucket: Any, tmp_path: Path) -> None:
    frames = np.random.default_rng(0).integers(0, 255, (6, 32, 32, 3), dtype=np.uint8)
    bucket.upload_file(str(write_clip(tmp_path / "a.mp4", frames, 8)), "films", "raw/a b.mp4")
    side_car = b'[{"start_s": 0, "end_s": 1, "caption": "dots"}]'
    bucket.put_object(Bucket="films", Key="raw/a b.captions.json", Body=side_car)
    bucket.put_object(Bucket="films", Key="raw/readme.txt", Body=b"no video")
    assert run(CONFIG, "s3://films/raw", tmp_path / "download", ExecutorConfig(kind="sequential")).kept == 1
    (row,) = read_manifest(tmp_path / "download")
    assert row.source == "s3://films/raw/a b.mp4"
    assert row.spans == (Span(0.0, 1.0, "dots"),)


def test_an_object_is_taken_up_where_a_stopped_run_left_it(bucket: Any, tmp_path: Path) -> None:
    target = tmp_path / "x.mp4"
    data = np.random.default_rng(1).bytes(500_000)
    bucket.put_object(Bucket="films", Key="x.mp4", Body=data)
    bring_object("s3://films/x.mp4", target, CONFIG)
    assert target.read_bytes() == data
    version = Partial(target).whole
    assert version

    # Marked bytes show what was read again.
    target.unlink()
    Partial(target).begin(version)
    target.with_name("x.mp4.part").write_bytes(b"-" * 200_000)
    bring_object("s3://films/x.mp4", target, CONFIG)
    assert target.read_bytes() == b"-" * 200_000 + data[200_000:]
    bring_object("s3://films/x.mp4", target, CONFIG)
    assert target.read_bytes().startswith(b"-")  # unchanged: not read at all

    changed = data[::-1]
    bucket.put_object(Bucket="films", Key="x.mp4", Body=changed)
    forget()
    Partial(target).begin(version)
    target.with_name("x.mp4.part").write_bytes(b"-" * 200_000)
    bring_object("s3://films/x.mp4", target, CONFIG)
    assert target.read_bytes() == changed
    assert json.loads(target.with_name("x.mp4.version.json").read_text())["etag"] != version.etag


def test_objects_that_cannot_be_had(bucket: Any, tmp_path: Path) -> None:
    bucket.put_object(Bucket="films", Key="huge.mp4", Body=bytes(2 << 20))
    for url, said in {
        "s3://films/huge.mp4": r"^too large: 2 MiB",
        "s3://films/none.mp4": r"^dead link: ",
        "nowhere://films/a.mp4": r"^download failed: ",
    }.items():
        with pytest.raises(DownloadError, match=said):
            bring_object(url, tmp_path / "y.mp4", CONFIG)
    assert not (tmp_path / "y.mp4").exists()


def test_a_disk_that_takes_nothing_is_no_bad_object(
    bucket: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bucket.put_object(Bucket="films", Key="z.mp4", Body=b"z")
    for number in (errno.EDQUOT, errno.EROFS):

        def refuse(*_: object, number: int = number) -> None:
            raise OSError(number, os.strerror(number))

        monkeypatch.setattr(Partial, "append", refuse)
        with pytest.raises(OSError, match=os.strerror(number)):
            bring_object("s3://films/z.mp4", tmp_path / "z.mp4", CONFIG)
