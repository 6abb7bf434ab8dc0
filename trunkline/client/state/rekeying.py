"""A new key for a sealed state. Killed at any moment nothing is lost, and asked again it goes on.

1. the new key is put before the older ones, where the source says (a new source gets them all)
2. every sealed file is sealed again; each is at all times under one of these keys
3. seal.toml names the new key: until then it named an older one, which is how an interrupted change is known
4. keys that nothing needs any more are taken away, where no other folder can need them
"""

import secrets
from collections.abc import Sequence
from pathlib import Path

from trunkline.client.state.at_rest import Kept, Tell, kept, silent, status
from trunkline.client.state.permissions import open_seal
from trunkline.errors import StorageError, TrustError
from trunkline.runtime.lock import Lock
from trunkline.runtime.storage import write_atomic
from trunkline.security.encryption import (
    Seal,
    absolute_source,
    default_source,
    key_name,
    read_keys,
    stored_keys,
    write_keys,
    write_settings,
)


def rekey(state: Path, to: str | None = None, *, forget: bool = False, tell: Tell = silent) -> Seal:
    """Seal everything in `state` with a new key.

    Args:
        to: where the key comes from henceforth; None: from where it does now. A key that is there already is the new one.
        forget: take away keys that nothing here needs even where other folders may use the source. The source that a
            folder gets by default is its own, and cleared in any case.
        tell: called with what was done and what is left to do.

    Raises:
        DeploymentError: a daemon runs on the folder.
        TrustError: the key in use is not here, or the source cannot be written: the text says what to put there.
        StorageError: a file cannot be written; it is as it was.
    """
    with Lock(state):
        seal = open_seal(state, tell)
        if seal is None:
            raise TrustError(f"{state}: is not sealed. `trunkline client vault seal SITE_DIR` seals it.")
        target = absolute_source(to, state) if to is not None else seal.source
        new = _moved(state, seal, target) if target != seal.source else _turned(state, seal, tell)
        count = sum(_seal_again(one, new, tell) for one in kept(state) if one.key and one.key != new.name)
        write_settings(state, new)
        tell(f"{count} files sealed again, with key {new.name} from {new.source}.")
        if target != seal.source:
            tell(
                f"{seal.source} is not used any more. Destroy it once no backup of {state} and no other folder needs it."
            )
        return _cleared(state, new, forget, tell)


def _turned(state: Path, seal: Seal, tell: Tell) -> Seal:
    """A new key at the same source, or the one of a change that was interrupted."""
    if status(state).key != seal.name:
        tell("Going on with a change of key that has begun.")
        return seal
    return _stored(seal.source, (secrets.token_bytes(32), *seal.keys))


def _moved(state: Path, seal: Seal, target: str) -> Seal:
    """All keys at another source, which `state` is told of before anything is sealed with its newest."""
    there = stored_keys(target)
    keys = there or (secrets.token_bytes(32),)
    keys = (*keys, *(key for key in seal.keys if key not in keys))
    new = _stored(target, keys) if keys != there else Seal(keys, target)
    write_settings(state, new, status(state).key)
    return new


def _stored(source: str, keys: tuple[bytes, ...]) -> Seal:
    write_keys(source, keys)
    if read_keys(source) != keys:
        raise TrustError(f"{source}: did not keep the keys it was given. Nothing was sealed with the new one.")
    return Seal(keys, source)


def _seal_again(one: Kept, seal: Seal, tell: Tell) -> bool:
    """What cannot be opened stays as it is, and its key with it."""
    try:
        content = seal.open(one.path.read_bytes(), one.about, str(one.path))
    except (StorageError, TrustError, OSError) as error:
        tell(f"Left as it is: {error}")
        return False
    write_atomic(one.path, seal.close(content, one.about))
    return True


def _cleared(state: Path, seal: Seal, forget: bool, tell: Tell) -> Seal:
    needed = status(state).needed() | {seal.name}
    left = tuple(key for key in seal.keys if key_name(key) in needed)
    gone = [key_name(key) for key in seal.keys if key not in left]
    older = [key_name(key) for key in left[1:]]
    if older:
        tell(f"Older keys that stay in {seal.source}, because something here still needs them: {_words(older)}.")
    if not gone:
        return seal
    if seal.source.startswith("env:") or not (forget or seal.source == default_source(state)):
        tell(
            f"Nothing here needs {_words(gone)} any more. If no other folder and no backup does, take it out of {seal.source}"
            + ("." if seal.source.startswith("env:") else " (`--forget` does).")
        )
        return seal
    tell(f"Taken out of {seal.source}: {_words(gone)}. Backups made before this change need it.")
    return _stored(seal.source, left)


def _words(names: Sequence[str]) -> str:
    return ("key " if len(names) == 1 else "keys ") + ", ".join(names)
