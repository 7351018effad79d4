"""yt-dlp takes what it is given as an address, whatever it looks like."""

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
