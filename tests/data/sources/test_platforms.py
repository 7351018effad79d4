"""yt-dlp takes what it is given as an address, whatever it looks like."""

import errno
import os
import sys
from pathlib import Path

import pytest

from opensora.config import DownloadConfig
from opensora.data.sources.partial import DownloadError
from opensora.data.sources.platforms import fetch_platform


def test_an_address_is_no_option(tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    with pytest.raises(DownloadError, match=r"^dead link: .*'--exec=touch.*' is not a valid URL"):
        fetch_platform(f"--exec=touch {mark}", tmp_path / "a.mp4", DownloadConfig(retries=0, timeout_s=5))
    assert not mark.exists()
    assert not (tmp_path / "a.mp4").exists()


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EROFS])
def test_a_disk_that_takes_nothing_is_no_dead_link(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = tmp_path / "yt-dlp"  # in the place of the interpreter that runs yt-dlp
    said = f"ERROR: unable to write data: [Errno {number}] {os.strerror(number)}"
    program.write_text(f"#!/bin/sh\necho '{said}' >&2\nexit 1\n")
    program.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(program))
    with pytest.raises(OSError, match=os.strerror(number)) as caught:
        fetch_platform("https://youtu.be/x", tmp_path / "a.mp4", DownloadConfig())
    assert caught.value.errno == number
