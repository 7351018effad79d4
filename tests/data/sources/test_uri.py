"""URIs: what may be written down of them, and names relative to a list."""

import pytest

from opensora.data.sources.uri import join, public_url, scheme, stable_url, without_secrets


def test_secrets_of_urls_are_not_written_down() -> None:
    url = "https://user:word@host/a.mp4?X-Amz-Signature=abc&part=2&token=t#x"
    assert public_url(url) == "https://host/a.mp4?part=2"
    assert "abc" not in without_secrets(f"cannot open {url}", url)
    assert "word" not in without_secrets(f"cannot open {url}", url)


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("/d/a.mp4", "file"),
        ("C:/d/a.mp4", "file"),
        ("a: b.mp4", "file"),
        ("HTTPS://x/a", "https"),
        ("s3://b/a", "s3"),
        ("hf://datasets/o/n", "hf"),
        ("zip://a::file:///b", "zip"),
        ("simplecache::http://x/a", "file"),
    ],
)
def test_schemes(source: str, expected: str) -> None:
    assert scheme(source) == expected


def test_a_server_of_this_machine_is_the_same_at_another_port() -> None:
    assert (
        stable_url("http://127.0.0.1:1234/a.mp4") == stable_url("http://localhost:99/a.mp4") == "http://localhost/a.mp4"
    )
    assert stable_url("http://example.org:99/a.mp4") == "http://example.org:99/a.mp4"


def test_names_are_those_of_the_list_or_of_a_folder() -> None:
    assert join("/d/list.csv", "x/a.mp4", False) == "/d/x/a.mp4"
    assert join("/d", "x/a.mp4", True) == "/d/x/a.mp4"
    assert join("http://h/d/list.csv", "a b.mp4", False) == "http://h/d/a b.mp4"
    assert join("http://h/d", "../a.mp4", True) == "http://h/a.mp4"
    assert join("s3://b/d/list.csv", "a.mp4", False) == "s3://b/d/a.mp4"
    assert join("/d/list.csv", "/e/a.mp4", False) == "/e/a.mp4"
    assert join("/d/list.csv", "https://h/a.mp4", False) == "https://h/a.mp4"
