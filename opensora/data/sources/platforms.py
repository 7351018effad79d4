"""Videos of platforms that give no file at a URL, such as YouTube's: brought by yt-dlp, an extra."""

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from urllib.parse import urlsplit

from opensora.config import DownloadConfig
from opensora.data.sources.partial import DownloadError, check_size
from opensora.data.sources.uri import WEB, scheme
from opensora.step import UNWRITABLE

HOSTS = {"youtube.com", "youtu.be", "vimeo.com", "dailymotion.com", "bilibili.com"}
# Pictures of 720 lines are enough for clips of 512; sound is not needed.
FORMAT = "bv*[height<=720][ext=mp4]/bv*[height<=720]/b[height<=720]/b"


def is_platform(url: str) -> bool:
    """Whether `url` is a page of a platform rather than a file."""
    host = (urlsplit(url).hostname or "").removeprefix("www.").removeprefix("m.")
    return scheme(url) in WEB and host in HOSTS


def fetch_platform(url: str, target: Path, config: DownloadConfig) -> None:
    """Bring the video of a page to `target`, whole or not at all; a stopped one goes on. One that is there is kept.

    yt-dlp runs in a process of its own, which is killed after `config.file_timeout_s`.

    Raises:
        DownloadError: yt-dlp is not installed, or its last line.
        OSError: nothing can be written any more (`step.UNWRITABLE`).
    """
    if target.is_file():
        return
    if find_spec("yt_dlp") is None:
        raise DownloadError("download failed: yt-dlp is not installed: pip install 'opensora-workflow[yt]'")
    folder = target.with_name(target.name + ".yt")  # yt-dlp leaves files of its own names beside its output
    folder.mkdir(exist_ok=True)
    command = [sys.executable, "-m", "yt_dlp", "--no-config", "--no-playlist", "--no-progress", "--no-warnings"]
    command += ["--format", FORMAT, "--max-filesize", f"{config.max_mib}M", "--no-mtime", "--no-cache-dir"]
    command += ["--socket-timeout", f"{config.timeout_s:g}", "--retries", str(config.retries)]
    command += ["--output", str(folder / "video.%(ext)s"), "--", url]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=config.file_timeout_s, check=False)
    except subprocess.TimeoutExpired:
        raise DownloadError(f"download failed: not done after {config.file_timeout_s:g} s") from None
    for number in UNWRITABLE:
        if os.strerror(number) in done.stderr:
            raise OSError(number, os.strerror(number))
    files = [path for path in folder.glob("video.*") if path.suffix not in (".part", ".ytdl")]
    if done.returncode or not files:
        said = (done.stderr.strip() or done.stdout.strip() or "no output").splitlines()[-1].removeprefix("ERROR: ")
        raise DownloadError(f"dead link: {said}")
    check_size(files[0].stat().st_size, config)  # yt-dlp's own limit knows nothing of streams in pieces
    files[0].replace(target)
    for path in folder.iterdir():
        path.unlink()
    folder.rmdir()
