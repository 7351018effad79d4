"""Going back: the alias `champion` moves to a version that was registered before, after its files were read."""

import json
from datetime import UTC, datetime
from pathlib import Path

from opensora.promotion.evidence import damage_of
from opensora.tracking.promotion_lock import folder_lock, registry_lock, somebody
from opensora.tracking.registry import (
    CHAMPION,
    PREVIOUS,
    RESTORED,
    ROLLED_BACK,
    RegistryError,
    Version,
    champion,
    check_champion,
    find_version,
    lost_champion,
    move_champion,
    tag_version,
)


def rollback(root: Path, model: str, to: str = "", reason: str = "") -> tuple[str, str]:
    """Move the alias back and record in the tags who did so, when and why.

    The version that is left is marked, and the gate does not promote its checkpoint again by itself; where the alias
    was lost that is the version that had it last. One that was left before may be named: it loses that mark.

    Args:
        to: number of a version; empty: the champion before the present one.

    Returns:
        Numbers of the version that is left ("none" where the alias was gone) and of the champion now.

    Raises:
        RegistryError: there is nothing to go back to, or its files are gone or changed; nothing was moved.
    """
    if not root.is_dir():
        raise RegistryError(f"no results at {root}; give their folder by --workdir")
    with folder_lock(root) as lock:
        now = champion(root, model)
        target = _target(root, model, now, to)
        if now and now.version == target.version:
            raise RegistryError(f"version {target.version} of {model} is the champion already; nothing was moved")
        if problem := damage_of(root, model, target):
            raise RegistryError(
                f"version {target.version} of {model} cannot be loaded any more: {problem}; nothing was moved; "
                "`opensora registry` lists the others, and --to VERSION names one"
            )
        left = now or _last(root, model, target)
        with registry_lock(root, model, lock) as check_lock:
            check_champion(root, model, now.version if now else None)
            event = {"by": somebody(), "at": datetime.now(UTC).isoformat(timespec="seconds"), "reason": reason}
            if left:  # before the alias, so that no kill in between leaves a roll-back without its reason
                tag_version(root, model, left.version, {ROLLED_BACK: json.dumps(event | {"to": target.version})})
            restored = json.dumps(event | {"from": left.version if left else "none"})
            tag_version(root, model, target.version, {RESTORED: restored, ROLLED_BACK: None})
            check_lock()
            move_champion(root, model, target.version, now.version if now else None)
    return now.version if now else "none", target.version


def _last(root: Path, model: str, target: Version) -> Version | None:
    """The version that had the alias before it was lost; None if that one gets it back, or is deleted."""
    number = lost_champion(root, model)
    return find_version(root, model, number) if number not in ("", target.version) else None


def _target(root: Path, model: str, now: Version | None, to: str) -> Version:
    """The version to go back to; raises RegistryError."""
    advice = "`opensora registry` lists the versions, and --to VERSION names one"
    number = to or (now.tags.get(PREVIOUS, "none") if now else "")
    if not number:
        raise RegistryError(f"{model} has no version with the alias {CHAMPION} to go back from; {advice}")
    if number == "none":
        there = now.version if now else ""
        raise RegistryError(f"version {there} is the first champion of {model}: there is none before it; {advice}")
    target = find_version(root, model, number)
    if target is None:
        raise RegistryError(f"{model} has no version {number} in the registry (any more); nothing was moved; {advice}")
    return target
