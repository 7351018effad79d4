"""One promotion at a time: a lock among the processes of one folder of results, and one among all users of a registry.

The first is a file lock, and holds. The second is a tag of the registered model, because MLflow has nothing better: it
can be set and read, but not "set if still free". Whoever takes it writes its name, waits, and looks whether the name is
still there; of several who found it free at once, the last one has it, unless a request takes longer than the wait.
A lock that nobody gave back is taken over by those who have seen it unchanged for a while by their own clock: no two
clocks are compared.
"""

import fcntl
import getpass
import json
import logging
import os
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from uuid import uuid4

from opensora.tracking.registry import Refused, RegistryError, asking, ensure_model

LOCK_FILE = ".promote.lock"  # in a folder of results; holds the folder's name among the users of a registry
LOCK_TAG = "promotion.lock"
SETTLE_S = 0.5  # longer than a request and an answer
STALE_S = 60.0  # far longer than the few requests for which it is held
PATIENCE_S = 300.0
POLL_S = 1.0
log = logging.getLogger(__name__)


@contextmanager
def folder_lock(root: Path) -> Iterator[str]:
    """Hold the lock of a folder of results, waiting for it; gives a name that no other folder has."""
    with (root / LOCK_FILE).open("a+") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        handle.seek(0)
        name = handle.read()
        if not name:
            name = uuid4().hex
            handle.write(name)
            handle.flush()
        yield name


@contextmanager
def registry_lock(
    root: Path,
    model: str,
    name: str,
    *,
    settle_s: float = SETTLE_S,
    stale_s: float = STALE_S,
    patience_s: float = PATIENCE_S,
) -> Iterator[Callable[[], None]]:
    """Hold the registry's lock on a model; gives a function that raises if somebody has taken it over meanwhile.

    Args:
        name: of `folder_lock`, which is held: a lock under this name was left by a process that is gone.

    Raises:
        RegistryError: others kept it for `patience_s`, or the server does not answer.
    """
    ensure_model(root, model)
    own = json.dumps({"folder": name, "by": somebody(), "nonce": uuid4().hex})
    started = since = time.monotonic()
    seen = ""
    while True:
        held = _read(root, model)
        if held and not _is_of(held, name):
            if held != seen:
                seen, since = held, time.monotonic()
            if time.monotonic() - since < stale_s:
                if time.monotonic() - started > patience_s:
                    raise RegistryError(f"others have been promoting {model} for {patience_s:.0f} s: {held}; try later")
                time.sleep(min(POLL_S, stale_s / 4))
                continue
            log.warning("the lock of %s was not given back in %.0f s and is taken over: %s", model, stale_s, held)
        with suppress(Refused), asking(root) as client:  # as a database does where two set a new tag at once
            client.set_registered_model_tag(model, LOCK_TAG, own)
        time.sleep(settle_s)
        if _read(root, model) == own:
            break
        if time.monotonic() - started > patience_s:
            raise RegistryError(f"the lock of {model} cannot be taken in {patience_s:.0f} s; try later")

    def check() -> None:
        if _read(root, model) != own:
            raise RegistryError(f"somebody else has taken over the lock of {model}; nothing was moved; start again")

    try:
        yield check
    finally:
        with suppress(RegistryError):  # the next one of this folder takes it, others do after `stale_s`
            if _read(root, model) == own:
                with asking(root) as client:
                    client.delete_registered_model_tag(model, LOCK_TAG)


def somebody() -> str:
    """Who runs this process, and where."""
    try:
        name = getpass.getuser()
    except (KeyError, OSError):  # a container's user has no name
        name = f"user {os.getuid()}"
    return f"{name}@{socket.gethostname()}"


def _read(root: Path, model: str) -> str:
    with asking(root) as client:
        return str(client.get_registered_model(model).tags.get(LOCK_TAG, ""))


def _is_of(held: str, name: str) -> bool:
    try:
        return json.loads(held)["folder"] == name
    except (ValueError, KeyError, TypeError):
        return False
