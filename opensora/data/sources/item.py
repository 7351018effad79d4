"""One video to bring, and the captions that may lie beside it."""

import json
from dataclasses import dataclass
from pathlib import Path

from opensora.manifest import Span

VIDEOS = {".mp4", ".mov", ".mkv", ".webm", ".avi", ".m4v", ".mpg", ".mpeg", ".ts", ".wmv", ".flv"}
CAPTIONS = ".captions.json"  # ends the name of a side-car file, in place of the video's suffix


@dataclass(frozen=True)
class Item:
    """One video to bring: where from, and what its list says of it."""

    url: str  # URL, path, or a path relative to the list
    sha256: str = ""
    licence: str = "unknown"
    captions: str = ""  # URL or path of a side-car file
    spans: tuple[Span, ...] = ()
    cut_file: str = ""  # name of the clip as it is handed round cut, which lies below `download.videos`
    source: str = ""  # what the manifest names as its source, where that is not the URL: "videos.zip!a.mp4"
    reason: str = ""  # why it cannot be brought, known from the list alone

    def to_json(self) -> str:
        """One line; letters stay as they are, so that one that UTF-8 does not have fails where the line is written."""
        return json.dumps(vars(self) | {"spans": [vars(span) for span in self.spans]}, ensure_ascii=False)

    @classmethod
    def from_json(cls, line: str) -> "Item":
        """The item of `to_json`."""
        values = json.loads(line)
        return cls(**values | {"spans": tuple(Span(**span) for span in values["spans"])})


def read_captions(path: Path) -> tuple[Span, ...]:
    """The spans of a file of captions that lies beside a video.

    Raises:
        ValueError: it cannot be read, or is no list of {start_s, end_s, caption}.
    """
    try:
        return tuple(
            Span(float(span["start_s"]), float(span["end_s"]), str(span["caption"]))
            for span in json.loads(path.read_text(encoding="utf-8"))
        )
    except (OSError, ValueError, KeyError, TypeError) as error:
        what = f"{path.name} is no list of start_s, end_s and caption"
        raise ValueError(f"{what} ({type(error).__name__}: {error})") from None
