"""Encryption at rest: AES-256-GCM under a key that does not lie beside what it seals.

Where the key comes from is a *source*: `file:PATH`, `env:NAME` or `keyring:SERVICE`. `seal.toml` in a state folder
remembers the source and the key's own name, so that a wrong key is told apart from a damaged file, and nothing is
overwritten with it.
"""

import base64
import binascii
import hashlib
import os
import secrets
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from trunkline.errors import StorageError, TrustError
from trunkline.keys import check_private
from trunkline.storage import write_atomic

MAGIC = b"trunkline-sealed\x01"
NAME, NONCE, TAG = 8, 12, 16  # bytes: of the key's name, GCM's nonce and its tag
OVERHEAD = len(MAGIC) + NAME + NONCE + TAG
SETTINGS = "seal.toml"


def is_sealed(data: bytes) -> bool:
    return data[: len(MAGIC)] == MAGIC


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
        """Of the newest key: 16 hexadecimal digits that say nothing about it."""
        return _name(self.keys[0]).hex()

    def close(self, data: bytes, about: str) -> bytes:
        """`data` encrypted and authenticated; it opens only for the same `about`, so two sealed files cannot be swapped."""
        head = MAGIC + _name(self.keys[0])
        nonce = secrets.token_bytes(NONCE)
        return head + nonce + AESGCM(self.keys[0]).encrypt(nonce, data, head + about.encode())

    def open(self, data: bytes, about: str, where: str) -> bytes:
        """What `close` was given.

        Raises:
            StorageError: not sealed, sealed with another key, altered, or sealed as something else; `where` is named.
        """
        if not is_sealed(data):
            raise StorageError(f"{where}: is not encrypted, and everything here should be. Restore a backup of it.")
        head, nonce = data[: len(MAGIC) + NAME], data[len(MAGIC) + NAME : len(MAGIC) + NAME + NONCE]
        named = head[len(MAGIC) :]
        key = next((one for one in self.keys if _name(one) == named), None)
        if key is None:
            known = ", ".join(_name(one).hex() for one in self.keys)
            raise StorageError(
                f"{where}: sealed with key {named.hex()}; {self.source} holds {known}. Nothing was changed. Give the key it was "
                "sealed with."
            )
        try:
            return AESGCM(key).decrypt(nonce, data[len(head) + NONCE :], head + about.encode())
        except (InvalidTag, ValueError):
            raise StorageError(
                f"{where}: altered or damaged (its seal does not match). Restore a backup of it."
            ) from None

    def newest(self, data: bytes) -> bool:
        """Whether `data` is sealed with the newest key."""
        return data[: len(MAGIC) + NAME] == MAGIC + _name(self.keys[0])


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
        found = tomllib.loads(settings.read_text(encoding="utf-8"))
        source, name = str(found["source"]), str(found["key"])
    except FileNotFoundError:
        return None
    except (OSError, KeyError, tomllib.TOMLDecodeError) as error:
        raise TrustError(f"{settings}: cannot be read ({error}). Restore a backup of it.") from None
    seal = Seal(read_keys(source), source)
    if name not in [_name(key).hex() for key in seal.keys]:
        raise TrustError(
            f"{source}: holds key {seal.name}; {state} is sealed with key {name}. Nothing was changed. Give the key it was "
            f"sealed with, by `source` in {settings}."
        )
    return seal


def make_seal(state: Path, source: str | None = None) -> Seal:
    """The seal of a state folder, made if there is none: for a `file:` source the key too.

    Raises:
        TrustError: as `find_seal`; or another source is named than the one in use.
    """
    found = find_seal(state)
    if found is not None:
        if source is not None and source != found.source:
            raise TrustError(
                f"{state} is sealed by {found.source}, not {source}. `trunkline client vault rekey` moves it to another."
            )
        return found
    source = source or default_source(state)
    kind, _, rest = source.partition(":")
    if kind == "file" and not Path(rest).exists():
        write_keys(source, (secrets.token_bytes(32),))
    seal = Seal(read_keys(source), source)
    remember(state, seal)
    return seal


def remember(state: Path, seal: Seal) -> None:
    """Say in the state folder which key seals it from now on."""
    text = f"# where the key to this folder comes from, and its name; the key itself is not here\nsource = '{seal.source}'\nkey = '{seal.name}'\n"
    state.mkdir(parents=True, exist_ok=True, mode=0o700)
    write_atomic(state / SETTINGS, text.encode())


def write_keys(source: str, keys: tuple[bytes, ...]) -> None:
    """Put keys, newest first, where `source` says; only `file:` and `keyring:` can be written."""
    text = "\n".join(base64.b64encode(key).decode() for key in keys) + "\n"
    kind, _, rest = source.partition(":")
    if kind == "file":
        Path(rest).parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        write_atomic(Path(rest), text.encode())
    elif kind == "keyring":
        _keyring().set_password("trunkline", rest, text)
    else:
        raise TrustError(f"{source}: cannot be written from here. Set it to: {' '.join(text.split())}")


def read_keys(source: str) -> tuple[bytes, ...]:
    """The keys of a source, newest first.

    Raises:
        TrustError: it names nothing that exists, or what is there is no key.
    """
    kind, _, rest = source.partition(":")
    if kind == "file":
        if not Path(rest).exists():
            raise TrustError(
                f"{rest}: the key file is gone. Restore it from where it was backed up; nothing was changed."
            )
        check_private(Path(rest))
        try:
            text = Path(rest).read_text(encoding="ascii")
        except (OSError, ValueError) as error:
            raise TrustError(f"{rest}: the key file cannot be read ({error}).") from None
    elif kind == "env":
        text = os.environ.get(rest, "")
        if not text:
            raise TrustError(f"{source}: the environment has no {rest}. Set it to the key, base64.")
    elif kind == "keyring":
        text = str(_keyring().get_password("trunkline", rest) or "")
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


def _keyring() -> Any:
    try:
        import keyring
    except ImportError:
        raise TrustError("the key source keyring: needs the package keyring: `pip install keyring`.") from None
    return keyring
