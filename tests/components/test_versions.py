"""Data that goes to a DVC remote on S3 and comes back by its revision."""

from pathlib import Path

import boto3
import pytest

from components.versions import pull, push
from opensora.step import StepError
from tests.s3 import s3_server


def test_a_folder_comes_back_by_its_revision(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here, there = tmp_path / "here" / "encode", tmp_path / "there" / "encode"
    here.mkdir(parents=True)
    (here / "latents-0.safetensors").write_bytes(bytes(range(256)))
    (here / "report.json").write_text("{}")
    with s3_server(monkeypatch) as url:
        monkeypatch.setenv("AWS_ENDPOINT_URL", url)
        boto3.client("s3", endpoint_url=url).create_bucket(Bucket="data")
        revision = push(here, "s3://data/dvc")
        assert revision.endswith(".dir")
        assert push(here, "s3://data/dvc") == revision
        pull(there, revision, "s3://data/dvc")
        assert {path.name: path.read_bytes() for path in there.iterdir()} == {
            path.name: path.read_bytes() for path in here.iterdir()
        }
        with pytest.raises(StepError, match="dvc pull failed"):
            pull(tmp_path / "other" / "encode", "0" * 32 + ".dir", "s3://data/dvc")
