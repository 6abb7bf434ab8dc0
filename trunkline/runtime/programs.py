"""Facts about the machine that daemons need: programs, accounts, secrets, addresses."""

import contextlib
import getpass
import ipaddress
import os
import secrets
import socket
import sys
from pathlib import Path

from trunkline.errors import DeploymentError
from trunkline.runtime.storage import write_atomic


def make_secret(path: Path) -> Path:
    """A file of 48 random bytes for this account only, made once.

    Raises:
        DeploymentError: another account could read it.
    """
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        write_atomic(path, secrets.token_bytes(48))
    if path.stat().st_mode & 0o077:
        raise DeploymentError(f"{path}: other accounts can read this secret. Remove the file; a start makes a new one.")
    return path


def pinned_digests(app: str, extra: Path | None) -> set[str]:
    """The pinned digests: `app`, of the installed thin app, and the first word of each line of the file `extra`."""
    if extra is None or not extra.exists():
        return {app}
    lines = (line.split("#")[0].split() for line in extra.read_text().splitlines())
    return {app, *(words[0] for words in lines if words)}


def accepts_connections(address: str, seconds: float = 0.5) -> bool:
    """Whether a server accepts a connection at host:port."""
    host, _, port = address.rpartition(":")
    try:
        with socket.create_connection((host.strip("[]"), int(port)), timeout=seconds):
            return True
    except OSError:
        return False


def account_name() -> str:
    """The name of the account this process runs under."""
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container whose user has no name
        return f"uid {os.getuid()}"


def is_loopback(host: str) -> bool:
    """Whether a name or address is this machine's own."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def print_line(text: str) -> None:
    """Print a line at once, even into a file. On a full disk the line is lost, and nothing else happens."""
    with contextlib.suppress(OSError):
        print(text, flush=True)


def find_program(name: str) -> str:
    """The path of a program installed beside this Python, whatever PATH says."""
    path = Path(sys.executable).parent / name
    if not path.exists():
        raise DeploymentError(f"{path}: not found. Install Trunkline again into this environment.")
    return str(path)
