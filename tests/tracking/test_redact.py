"""No credential reaches a spool, whatever it is called; ordinary names and values stay."""

import json
from pathlib import Path

import pytest

from opensora.tracking.redact import redact, redact_value
from opensora.tracking.tracker import Tracker

SECRETS = [
    ("caption.endpoint", "https://user:hunter2@host/v1", "hunter2"),
    ("caption.endpoint", "https://hunter2token@github.com/x", "hunter2token"),
    ("source", "https://host/x?X-Amz-Signature=hunter2&X-Amz-Credential=AK%2F1", "hunter2"),
    ("source", "s3://bucket/a?token=hunter2", "hunter2"),
    ("url", "http://host/?a=1&api_key=hunter2#end", "hunter2"),
    ("note", "key AKIAABCDEFGHIJKLMNOP in text", "AKIAABCDEFGHIJKLMNOP"),
    ("note", "hf_abcdefghijklmnopqrstuvwxyz", "hf_abcdefghij"),
    ("header", "Bearer abcdefghijklmnop1234", "abcdefghijklmnop1234"),
    ("note", "ghp_" + "a1" * 18, "a1a1a1"),
    ("key", "-----BEGIN RSA PRIVATE KEY-----\nabc\n-----END RSA PRIVATE KEY-----", "abc"),
    ("s3.secret_key", "hunter2", "hunter2"),
    ("aws.secretAccessKey", "hunter2", "hunter2"),
    ("hub.token", "hunter2", "hunter2"),
    ("db_password", "hunter2", "hunter2"),
    ("db.pwd", "hunter2", "hunter2"),
    ("wandb_key", "hunter2", "hunter2"),
    ("wandbKey", "hunter2", "hunter2"),
    ("store", "postgresql://eva:hunter2/b@db/mlflow", "hunter2"),
    ("store", "postgresql://eva:a/hunter2@db/mlflow", "hunter2"),
    ("store", "https://eva:p@ss/hunter2@host:5000/x", "hunter2"),
    ("store", "https://eva:p@hunter2?a#b:c@host/x", "hunter2"),
    ("url", "http://host/?a=1&pwd=hunter2", "hunter2"),
    ("train.password", "4711", "4711"),
    ("hub.token", "123456", "123456"),
    ("api_key", "1e5", "1e5"),
    ("max_password", "4711", "4711"),
    ("note", "first http://one:80/x,http://eva:a@hunter2/b@two/x", "hunter2"),
]
PLAIN = [
    ("encode.max_tokens", "120"),
    ("encode.tokenizer", "t5-v1_1-xxl"),
    ("model.token_count", "16"),
    ("train.seconds_per_token", "0.25"),
    ("hub.token", "None"),
    ("hub.use_token", "true"),
    ("download.source", "s3://bucket/folder/clips"),
    ("weights", "hf://datasets/owner/name"),
    ("uri", "sqlite:////runs/mlflow.db"),
    ("caption.endpoint", "http://host:8000/v1?model=llava&keys=2"),
    ("prompt", "a key on a table, 3:4@home"),
    ("hub.revision", "hf://datasets/owner/name@v1/a.csv"),
    ("image", "registry:5000/opensora-train@sha256:12ab"),
    ("model.key_size", "64"),
    ("keyboard", "qwerty"),
    ("uris", "http://a:80/x,https://b:8443/y z@w"),
    ("git_commit", "302d18e6f0a94c1f8a4d6f0a94c1f8a4d6f0a94c"),
]


@pytest.mark.parametrize(("name", "value", "secret"), SECRETS)
def test_credentials_are_hidden(name: str, value: str, secret: str) -> None:
    assert secret not in redact_value(name, value)


@pytest.mark.parametrize(("name", "value"), PLAIN)
def test_the_rest_stays(name: str, value: str) -> None:
    assert redact_value(name, value) == value


def test_an_address_keeps_its_host() -> None:
    assert redact("http://u:p@mlflow:5000/x?token=a&b=1") == "http://***@mlflow:5000/x?token=***&b=1"
    assert redact("postgresql://u:a/b@db:5432/mlflow") == "postgresql://***@db:5432/mlflow"
    assert redact("http://one:80/x,http://u:p@two/y") == "http://one:80/x,http://***@two/y"


def test_no_credential_is_spooled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Tracker, "_start_sender", lambda self: None)
    params = {str(number): {name: value} for number, (name, value, _) in enumerate(SECRETS)}
    tracker = Tracker.start(tmp_path, "smoke", "train_image", params, {"api_token": "hunter2"}, tmp_path)
    tracker.close()
    text = (tracker.place / "spool.jsonl").read_text()
    assert len(json.loads(text.splitlines()[0])["params"]) == len(SECRETS)
    assert not [secret for _, _, secret in SECRETS if secret != "abc" and secret in text]
