"""The model registry: versions, and the alias `champion` that says which one users get."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from opensora.config import UserError
from opensora.tracking.redact import redact
from opensora.tracking.store import connect, store_name, tracking_uri

if TYPE_CHECKING:
    from mlflow import MlflowClient

CHAMPION = "champion"
# Tags of a version:
CHECKPOINT_URI, CHECKPOINT_SHA256 = "checkpoint.uri", "checkpoint.sha256"
EVALUATION_URI, EVALUATION_FILES, METRICS_TAG = "evaluation.uri", "evaluation.files_sha256", "metrics"
PREVIOUS = "previous_champion"
ROLLED_BACK, RESTORED = "rolled_back", "restored"  # JSON: who, when, why
# Tag of a registered model: the version that the alias was moved to last. It stays where the alias does not.
LAST_CHAMPION = "last_champion"
SILENT = ("INTERNAL_ERROR", "TEMPORARILY_UNAVAILABLE")  # error codes of a server that is away, or ill
BY_REFERENCE = "checkpoint://"  # before a path: a server refuses a bare one, which it would read from its own disk
ABSENT = ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE")  # what MLflow answers where there is no such thing


class RegistryError(UserError):
    """The registry does not answer, has no such model, or what it points to is gone or changed."""


class Refused(RegistryError):
    """The registry answers, and does not do it."""


class ChampionMoved(RegistryError):
    """The alias is not where it was when the candidate was judged."""


def model_name(profile: str) -> str:
    """Of the registered model that a profile's checkpoints are versions of."""
    return f"opensora-{profile}"


@dataclass(frozen=True)
class Version:
    """A registered version."""

    version: str  # its number
    tags: Mapping[str, str] = field(default_factory=dict)
    aliases: tuple[str, ...] = ()
    created: int = 0  # milliseconds since 1970, by the server's clock


@contextmanager
def asking(root: Path) -> Iterator["MlflowClient"]:
    """A client of the registry; its errors come out in one line.

    Raises:
        RegistryError: the server does not answer.
        Refused: it does, and refuses.
    """
    try:
        yield connect(root)
    except Exception as error:  # MLflow's kinds are known by their code: another thread may be importing it just now
        if not isinstance(error, OSError) and not hasattr(error, "error_code"):
            raise
        where, why = store_name(root), redact(_first_line(error))
        if getattr(error, "error_code", SILENT[0]) not in SILENT:
            raise Refused(f"the registry at {where} refuses: {why}") from error
        raise RegistryError(
            f"the registry at {where} does not answer ({why}); start the server, or name another by "
            "MLFLOW_TRACKING_URI; then the same command again goes on where it was"
        ) from error


def _first_line(error: BaseException) -> str:
    text = next(iter(str(getattr(error, "message", error)).strip().splitlines()), type(error).__name__)
    if "Max retries exceeded" in text:  # with the whole address and an object's address in it
        return "no connection"
    return text if len(text) < 200 else f"{text[:200]}…"


def _known(ask: Any, *arguments: str) -> Any | None:
    """What the registry answers, or None where it has no such thing."""
    from mlflow.exceptions import MlflowException

    try:
        return ask(*arguments)
    except MlflowException as error:
        if error.error_code in ABSENT:
            return None
        raise


def _is_new(root: Path) -> bool:
    """Whether the store is a file that does not exist yet; asking would make it."""
    place = tracking_uri(root).removeprefix("sqlite:///")
    return place != tracking_uri(root) and not Path(place).exists()


def _version(found: Any, aliases: tuple[str, ...] = ()) -> Version:
    return Version(str(found.version), dict(found.tags), aliases, int(found.creation_timestamp or 0))


def champion(root: Path, model: str) -> Version | None:
    """The registered version that carries the alias `champion`, or None."""
    if _is_new(root):
        return None
    with asking(root) as client:
        found = _known(client.get_model_version_by_alias, model, CHAMPION)
    return _version(found, (CHAMPION,)) if found else None


def lost_champion(root: Path, model: str) -> str:
    """Number of the version that was the champion last, where no version carries the alias; else empty."""
    if _is_new(root) or champion(root, model):
        return ""
    with asking(root) as client:
        found = _known(client.get_registered_model, model)
    return str(found.tags.get(LAST_CHAMPION, "")) if found else ""


def find_version(root: Path, model: str, number: str) -> Version | None:
    """A version by its number, or None."""
    if _is_new(root):
        return None
    with asking(root) as client:
        found = _known(client.get_model_version, model, number)
    return _version(found) if found else None


def versions(root: Path, model: str) -> list[Version]:
    """All versions, newest first."""
    if _is_new(root):
        return []
    with asking(root) as client:
        registered = _known(client.get_registered_model, model)
        found, token = [], None
        while registered:
            page = client.search_model_versions(f"name = '{model}'", page_token=token)
            found += list(page)
            token = page.token
            if not token:
                break
    aliases = registered.aliases if registered else {}
    named: dict[str, tuple[str, ...]] = {}
    for alias, number in aliases.items():
        named[str(number)] = (*named.get(str(number), ()), alias)
    listed = [_version(each, named.get(str(each.version), ())) for each in found]
    return sorted(listed, key=lambda version: int(version.version), reverse=True)


def version_of(root: Path, model: str, sha256: str) -> Version | None:
    """The version of the checkpoint with that hash, or None; the first one, should two have been made at once."""
    same = [each for each in versions(root, model) if each.tags.get(CHECKPOINT_SHA256) == sha256]
    return same[-1] if same else None


def adopt(root: Path, model: str, tags: Mapping[str, str]) -> str | None:
    """The number of the version of the checkpoint that `tags` name, which gets them; None if there is none yet.

    So a promotion that was cut off after it had registered its version goes on with that one. No version becomes the
    champion before itself: one that lost the alias and gets it back keeps the one it followed.
    """
    found = version_of(root, model, tags.get(CHECKPOINT_SHA256, ""))
    if found is None:
        return None
    new = {name: value for name, value in tags.items() if found.tags.get(name) != value}
    if new.get(PREVIOUS) == found.version:
        del new[PREVIOUS]
    tag_version(root, model, found.version, new)
    return found.version


def register(root: Path, model: str, source: Path, tags: dict[str, str]) -> str:
    """Register the files in `source` as the next version; returns its number."""
    ensure_model(root, model)
    place = str(source.resolve())
    if not tracking_uri(root).startswith("sqlite:"):
        place = f"{BY_REFERENCE}{place}"
    with asking(root) as client:
        return str(client.create_model_version(model, place, tags=tags).version)


def ensure_model(root: Path, model: str) -> None:
    """Make the registered model if there is none yet."""
    with asking(root) as client:
        if _known(client.get_registered_model, model):
            return
    with suppress(Refused), asking(root) as client:  # somebody else makes it at the same moment
        client.create_registered_model(model)


def check_champion(root: Path, model: str, expected: str | None) -> None:
    """See that the version `expected` carries the alias, or none does.

    Raises:
        ChampionMoved: it is not so.
    """
    now = champion(root, model)
    if (now.version if now else None) != expected:
        was, there = (f"version {number}" if number else "no version" for number in (expected, now and now.version))
        raise ChampionMoved(f"the alias {CHAMPION} of {model} was on {was}, and meanwhile somebody put it on {there}")


def move_champion(root: Path, model: str, version: str, expected: str | None) -> None:
    """Move the alias from `expected` to `version`; hold the locks of `promotion_lock` meanwhile.

    MLflow cannot compare and set in one request: what somebody does by hand between the two goes unseen.

    Raises:
        ChampionMoved: another version carries it; nothing was changed.
    """
    check_champion(root, model, expected)
    with asking(root) as client:
        client.set_registered_model_alias(model, CHAMPION, version)
        client.set_registered_model_tag(model, LAST_CHAMPION, version)


def tag_version(root: Path, model: str, version: str, tags: Mapping[str, str | None]) -> None:
    """Set tags of a version; None removes one."""
    with asking(root) as client:
        for name, value in tags.items():
            if value is None:
                client.delete_model_version_tag(model, version, name)
            else:
                client.set_model_version_tag(model, version, name, value)


def read_version(uri: str, root: Path) -> tuple[str, Version]:
    """Name of the model and the version behind `models:/NAME@ALIAS` or `models:/NAME/VERSION`; raises RegistryError."""
    name, at, alias = uri.removeprefix("models:/").partition("@")
    found = None
    if not _is_new(root):
        with asking(root) as client:
            if at:
                found = _known(client.get_model_version_by_alias, name, alias)
            else:
                name, _, number = name.partition("/")
                found = _known(client.get_model_version, name, number)
    if found is None:
        raise RegistryError(f"{uri} is not in the registry at {store_name(root)}; `opensora registry` lists what is")
    return name, _version(found)
