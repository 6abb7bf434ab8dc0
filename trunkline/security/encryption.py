"""Encryption at rest: AES-256-GCM under a key that does not lie beside what it seals.

Where the key comes from is a *source*: `file:PATH`, `env:NAME` or `keyring:SERVICE`. `seal.toml` in a state folder
remembers the source and the key's own name, so that a wrong key is told apart from a damaged file, and nothing is
overwritten with it.
"""

import base64
import binascii
import hashlib
import json
import os
import secrets
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from trunkline.errors import StorageError, TrustError
from trunkline.runtime.storage import MAGIC as MAGIC
from trunkline.runtime.storage import is_sealed as is_sealed
from trunkline.runtime.storage import write_atomic
from trunkline.security.keys import check_private

NAME, NONCE, TAG = 8, 12, 16  # bytes: of the key's name, GCM's nonce and its tag
OVERHEAD = len(MAGIC) + NAME + NONCE + TAG
SETTINGS = "seal.toml"


def key_name(key: bytes) -> str:
    """What a key is called: 16 hexadecimal digits that say nothing about it."""
    return _name(key).hex()


def sealing_key_name(data: bytes) -> str:
    """The name of the key that sealed `data`; of other data nothing that means anything."""
    return data[len(MAGIC) : len(MAGIC) + NAME].hex()


def _name(key: bytes) -> bytes:
    return hashlib.sha256(b"trunkline key name\0" + key).digest()[:NAME]


@dataclass(frozen=True)
class Seal:
    """Seals with the first key, opens with any: during a rotation both old and new are here.

    Args:
        keys: 32 bytes each, the newest first.
        source: where they came from, for errors.
    """

    keys: tuple[bytes, ...]
    source: str

    @property
    def name(self) -> str:
        """Of the newest key, see `key_name`."""
        return key_name(self.keys[0])

    def close(self, data: bytes, about: str) -> bytes:
        """`data` encrypted and authenticated; it opens only for the same `about`, so two sealed files cannot be swapped."""
        head = MAGIC + _name(self.keys[0])
        nonce = secrets.token_bytes(NONCE)
        return head + nonce + AESGCM(self.keys[0]).encrypt(nonce, data, head + about.encode())

    def open(self, data: bytes, about: str, where: str) -> bytes:
        """What `close` was given.

        Raises:
            TrustError: not sealed, or sealed with a key that is not here: no damage, so no reason to pass it over.
            StorageError: altered, or sealed as something else. `where` is named.
        """
        key = next(
            (own_key for own_key in self.keys if is_sealed(data) and key_name(own_key) == sealing_key_name(data)), None
        )
        if key is not None:
            plain = _decrypt(key, data, about)
        elif any(_decrypt(own_key, data, about) is not None for own_key in self.keys):
            plain = None  # the damage is in its first bytes; the file is sealed with one of these keys all the same
        elif not is_sealed(data):
            raise TrustError(
                f"{where}: is not encrypted, and everything here should be. If it lay here before the folder was sealed, "
                "`trunkline client vault seal SITE_DIR` encrypts it; if not, somebody put it there: restore a backup."
            )
        else:
            names = ", ".join(key_name(own_key) for own_key in self.keys)
            raise TrustError(
                f"{where}: sealed with key {sealing_key_name(data)}; {self.source} holds {names}. Nothing was changed. Give the key it "
                "was sealed with."
            )
        if plain is None:
            raise StorageError(
                f"{where}: altered, damaged, or moved here from another place (its seal does not match). Restore a backup of it."
            )
        return plain

    def newest(self, data: bytes) -> bool:
        """Whether `data` is sealed with the newest key."""
        return data[: len(MAGIC) + NAME] == MAGIC + _name(self.keys[0])


def _decrypt(key: bytes, data: bytes, about: str) -> bytes | None:
    """What `data` holds if this key sealed it as `about`, whatever its first bytes say."""
    head = MAGIC + _name(key)
    nonce, body = data[len(head) : len(head) + NONCE], data[len(head) + NONCE :]
    try:
        return AESGCM(key).decrypt(nonce, body, head + about.encode())
    except (InvalidTag, ValueError):
        return None


def environment_without_key(environment: Mapping[str, str], state: Path) -> dict[str, str]:
    """An environment for a process that seals nothing: where the key comes from the environment, it is not in this one."""
    seal = find_seal(state)
    kind, _, name = seal.source.partition(":") if seal is not None else ("", "", "")
    return {key: value for key, value in environment.items() if kind != "env" or key != name}


def default_source(state: Path) -> str:
    """A key file of its own under the account's configuration, so that a copy of the state alone opens nothing."""
    home = Path(os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config")
    label = hashlib.sha256(str(state.resolve()).encode()).hexdigest()[:16]
    return f"file:{home / 'trunkline' / 'keys' / label}"


def find_seal(state: Path) -> Seal | None:
    """The seal of a state folder; None where nothing is sealed (a simulated site, or one that has not joined).

    Raises:
        TrustError: the key is missing, damaged, readable by others, or another one; nothing is written.
    """
    settings = state / SETTINGS
    try:
        table = tomllib.loads(settings.read_text(encoding="utf-8"))
        source, name = str(table["source"]), str(table["key"])
    except FileNotFoundError:
        return None
    except (OSError, KeyError, tomllib.TOMLDecodeError) as error:
        raise TrustError(f"{settings}: cannot be read ({error}). Restore a backup of it.") from None
    seal = Seal(read_keys(source), source)
    if name not in map(key_name, seal.keys):
        raise TrustError(
            f"{source}: holds key {seal.name}; {state} is sealed with key {name}. Nothing was changed. Give the key it was "
            f"sealed with, by `source` in {settings}."
        )
    return seal


def make_seal(state: Path, source: str | None = None) -> Seal:
    """The seal of a state folder, made if there is none: for a `file:` or `keyring:` source the key too.

    Raises:
        TrustError: as `find_seal`; or another source is named than the one in use.
    """
    current = find_seal(state)
    source = absolute_source(source, state) if source is not None else None
    if current is not None:
        if source is not None and source != current.source:
            raise TrustError(
                f"{state} is sealed by {current.source}, not {source}. `trunkline client vault rekey` moves it to another."
            )
        return current
    source = source or default_source(state)
    if source.startswith(("file:", "keyring:")) and not stored_keys(source):
        write_keys(source, (secrets.token_bytes(32),))
    seal = Seal(read_keys(source), source)
    write_settings(state, seal)
    return seal


def find_seal_of(path: Path) -> tuple[Seal | None, str]:
    """The seal of the state folder that `path` lies in, and what `path` is sealed as there; outside of any, None.

    Raises:
        TrustError: as `find_seal`.
    """
    path = path.resolve()
    for folder in path.parents:
        if (seal := find_seal(folder)) is not None:
            return seal, path.relative_to(folder).as_posix()
    return None, ""


def write_settings(state: Path, seal: Seal, key: str | None = None) -> None:
    """Say in the state folder which key seals it from now on; `key`: the name of an older one of `seal` until all is done."""
    about = "# where the key to this folder comes from, and its name; the key itself is not here"
    # a JSON string is a TOML string, whatever quotes a path has
    text = f"{about}\nsource = {json.dumps(seal.source, ensure_ascii=False)}\nkey = {json.dumps(key or seal.name)}\n"
    state.mkdir(parents=True, exist_ok=True, mode=0o700)
    state.chmod(0o700)
    write_atomic(state / SETTINGS, text.encode())


def absolute_source(source: str, state: Path) -> str:
    """The same source wherever a command or a daemon is started from."""
    kind, _, name = source.partition(":")
    if kind != "file":
        return source
    path = Path(name).expanduser().resolve()
    if path.is_relative_to(state.resolve()):
        raise TrustError(
            f"{source}: lies in the folder that it should seal, and would be copied with it. Keep it elsewhere."
        )
    return f"file:{path}"


def write_keys(source: str, keys: tuple[bytes, ...]) -> None:
    """Put keys, newest first, where `source` says; only `file:` and `keyring:` can be written."""
    text = "\n".join(base64.b64encode(key).decode() for key in keys) + "\n"
    kind, _, name = source.partition(":")
    if kind == "file":
        Path(name).parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        write_atomic(Path(name), text.encode())
    elif kind == "keyring":
        ring = _keyring()
        try:
            ring.set_password("trunkline", name, text)
        except Exception as error:  # each backend has its own
            raise TrustError(
                f"{source}: the system's keyring refused it ({error}). Unlock it, or name another source."
            ) from None
    else:
        raise TrustError(
            f"{source}: cannot be written from here. Set it to the following, then give the command again: {' '.join(text.split())}"
        )


def read_keys(source: str) -> tuple[bytes, ...]:
    """The keys of a source, newest first.

    Raises:
        TrustError: it names nothing that exists, or what is there is no key.
    """
    kind, _, name = source.partition(":")
    if kind == "file":
        if not Path(name).exists():
            raise TrustError(
                f"{name}: the key file is gone. Restore it from where it was backed up; nothing was changed."
            )
        check_private(Path(name))
        try:
            text = Path(name).read_text(encoding="ascii")
        except (OSError, ValueError) as error:
            raise TrustError(f"{name}: the key file cannot be read ({error}).") from None
    elif kind == "env":
        text = os.environ.get(name, "")
        if not text:
            raise TrustError(f"{source}: the environment has no {name}. Set it to the key, base64.")
    elif kind == "keyring":
        text = _stored_in_keyring(name, source)
        if not text:
            raise TrustError(f"{source}: the system's keyring has no such entry.")
    else:
        raise TrustError(f"key source {source!r}: expected file:PATH, env:NAME or keyring:NAME.")
    try:
        keys = tuple(base64.b64decode(line, validate=True) for line in text.replace(",", " ").split())
    except (binascii.Error, ValueError):
        keys = ()
    if not keys or any(len(key) != 32 for key in keys):
        raise TrustError(f"{source}: expected 32 bytes in base64, one key a line, the newest first.")
    return keys


def stored_keys(source: str) -> tuple[bytes, ...]:
    """As `read_keys`, and none where there is nothing yet: no file, no variable, no entry."""
    kind, _, name = source.partition(":")
    nothing = (
        (kind == "file" and not Path(name).exists())
        or (kind == "env" and not os.environ.get(name))
        or (kind == "keyring" and not _stored_in_keyring(name, source))
    )
    return () if nothing else read_keys(source)


def _stored_in_keyring(name: str, source: str) -> str:
    ring = _keyring()
    try:
        return str(ring.get_password("trunkline", name) or "")
    except Exception as error:  # each backend has its own
        raise TrustError(f"{source}: the system's keyring cannot be read ({error}). Unlock it.") from None


def _keyring() -> Any:
    try:
        import keyring
    except ImportError:
        raise TrustError("the key source keyring: needs the package keyring: `pip install keyring`.") from None
    return keyring
