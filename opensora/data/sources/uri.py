"""URIs of videos: their scheme, the form in which they may be written down, and names relative to a list."""

from pathlib import Path
from urllib.parse import urljoin, urlsplit, urlunsplit

WEB = ("http", "https")
BUCKETS = ("s3", "s3a", "gs", "gcs", "az", "abfs", "abfss", "oss", "r2")
HUB = "hf"
# What a list may name besides files of this machine: fsspec knows more schemes, some of which read local files.
LISTED = (*WEB, *BUCKETS, HUB)


def scheme(source: str) -> str:
    """ "file", "http", "https", "s3", …; a Windows drive or a colon in a file's name is no scheme."""
    head, mark, _ = source.partition("://")
    return head.lower() if mark and head.isalnum() else "file"


def stable_url(url: str) -> str:
    """`url`, with that of a server on this machine freed of its port, which is another in every run."""
    parts = urlsplit(url)
    if parts.hostname in ("127.0.0.1", "localhost"):
        return parts._replace(netloc="localhost").geturl()
    return url


def join(base: str, name: str, is_folder: bool) -> str:
    """`name` as the folder `base`, or the list `base`, means it."""
    if scheme(name) != "file" or Path(name).is_absolute():
        return name
    if scheme(base) == "file":
        return str((Path(base) if is_folder else Path(base).parent) / name)
    if scheme(base) in WEB:
        return urljoin(base.rstrip("/") + "/" if is_folder else base, name)
    return f"{base.rstrip('/') if is_folder else base.rpartition('/')[0]}/{name}"


def public_url(url: str) -> str:
    """A URL as it may stand in a manifest: without user and password, and without a signature in its query."""
    parts = urlsplit(url)
    if parts.scheme not in WEB:
        return url
    query = "&".join(item for item in parts.query.split("&") if not _is_secret(item.partition("=")[0]))
    return urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, query, ""))


def _is_secret(name: str) -> bool:
    """Whether a query's field signs the request: S3's, Google's and Azure's ways, and the usual names."""
    name = name.lower()
    return name.startswith(("x-amz-", "x-goog-")) or name in {
        *("signature", "sig", "token", "access_token", "key", "api_key", "apikey", "awsaccesskeyid", "policy"),
        *("key-pair-id", "password", "auth"),
    }


def without_secrets(message: str, url: str) -> str:
    """An error's text with the URL in it as `public_url` gives it."""
    parts = urlsplit(url)
    hidden = message.replace(url, public_url(url))
    if parts.query:
        hidden = hidden.replace(f"{parts.path}?{parts.query}", urlsplit(public_url(url)).path)
    return hidden.replace(f"{parts.password}", "…") if parts.password else hidden
