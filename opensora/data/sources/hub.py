"""Videos of a data set of the Hugging Face hub: listed by its own client, brought like any other file over HTTP."""

import threading
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from opensora.config import DownloadConfig
from opensora.data.sources.fetch import fetch
from opensora.data.sources.item import CAPTIONS, VIDEOS, Item
from opensora.data.sources.partial import DownloadError
from opensora.step import StepError

FORM = "hf://datasets/owner/name, or …/name@revision"


def list_data_set(source: str) -> Iterator[Item]:
    """The videos of `hf://datasets/owner/name` or `…@revision`, by name, with side-car captions and known hashes.

    HF_TOKEN opens data sets that are not public, HF_ENDPOINT names another hub.

    Raises:
        StepError: there is no such data set, or the hub cannot be asked.
    """
    from huggingface_hub import HfApi, RepoFile
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, RepositoryNotFoundError

    name, revision, folder = _parse(source)
    if folder:
        raise StepError(f"the source {source} names more than a data set; {FORM}")
    try:
        tree = HfApi().list_repo_tree(name, recursive=True, revision=revision or None, repo_type="dataset")
        files = {file.path: file.lfs.sha256 if file.lfs else "" for file in tree if isinstance(file, RepoFile)}
    except RepositoryNotFoundError:
        raise StepError(f"no data set {name} on the hub, or not with this HF_TOKEN; {FORM}") from None
    except HFValidationError as error:
        raise StepError(f"the source {source} names no data set: {error}; {FORM}") from None
    except (HfHubHTTPError, OSError) as error:
        raise StepError(f"the data set {name} could not be listed: {error}; start again to go on") from None
    base = f"hf://datasets/{name}" + (f"@{revision}" if revision else "")
    for path in sorted(files):
        if PurePosixPath(path).suffix.lower() in VIDEOS:
            side = str(PurePosixPath(path).with_suffix(CAPTIONS))
            yield Item(f"{base}/{path}", files[path], captions=f"{base}/{side}" if side in files else "")


def bring_from_hub(url: str, target: Path, config: DownloadConfig, stopped: threading.Event | None = None) -> None:
    """Bring `hf://datasets/owner/name@revision/path` to `target`; see `fetch`.

    Raises:
        DownloadError: the recorded reason.
        OSError: nothing can be written any more (`step.UNWRITABLE`).
    """
    from huggingface_hub import get_token, hf_hub_url
    from huggingface_hub.constants import is_offline_mode

    name, revision, path = _parse(url)
    if not path:
        raise DownloadError(f"dead link: {url} names no file; hf://datasets/owner/name/file.mp4")
    if is_offline_mode():
        raise DownloadError("download failed: HF_HUB_OFFLINE is set, and a hub was to be asked")
    token = get_token()
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    fetch(hf_hub_url(name, path, repo_type="dataset", revision=revision or None), target, config, stopped, headers)


def _parse(uri: str) -> tuple[str, str, str]:
    """(owner/name, revision, path) of `hf://datasets/owner/name@revision/path`; the last two may be empty."""
    parts = uri.removeprefix("hf://").removeprefix("datasets/").split("/", 2)
    name, mark, revision = "/".join(parts[:2]).partition("@")
    return name, revision if mark else "", parts[2] if len(parts) > 2 else ""
