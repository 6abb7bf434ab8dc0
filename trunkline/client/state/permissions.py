"""Who can reach a sealed state: this account and nobody else. It is looked at whenever one is opened."""

import os
import stat
from collections.abc import Callable, Iterator
from pathlib import Path

from trunkline.errors import TrustError
from trunkline.security.encryption import Seal, find_seal

THEIRS = ("logs", "flwr")  # written by Flower and by the supervisor's children, with whatever mode the account has
PUBLIC = (".crt", ".pem", ".txt")  # what others may read; certificates and pins


def open_seal(state: Path, tell: Callable[[str], None] = lambda text: None) -> Seal | None:
    """`find_seal`, and nobody else can reach what it seals.

    Args:
        tell: called with a sentence about what is not wrong yet.

    Raises:
        TrustError: as `find_seal`; or another account can read or write the state, its key, or the key's folder.
    """
    seal = find_seal(state)
    if seal is None:
        return None
    check_access(state)
    kind, _, rest = seal.source.partition(":")
    if kind == "file" and replaceable(Path(rest).parent):
        raise TrustError(
            f"{Path(rest).parent}: other accounts can replace the key in it (mode {_mode(Path(rest).parent):o}). "
            f"`chmod go-w {Path(rest).parent}`."
        )
    parent = state.resolve().parent
    if replaceable(parent) and _mode(parent) & stat.S_IWOTH:
        tell(
            f"every account can put another folder in the place of {state} (mode {_mode(parent):o} of {parent}). `chmod o-w {parent}`."
        )
    return seal


def check_access(state: Path) -> None:
    """Raise TrustError, with the command that mends it, when another account can read or write in a state folder."""
    found = state.stat()
    if found.st_uid != os.getuid():
        raise TrustError(f"{state}: belongs to another account (uid {found.st_uid}). Run this as that account.")
    if found.st_mode & 0o077:
        raise TrustError(f"{state}: other accounts can reach into it (mode {_mode(state):o}). `chmod 700 {state}`.")
    wrong = [path for path in private_files(state) if _mode(path) & (0o022 if path.suffix in PUBLIC else 0o077)]
    if wrong:
        more = f" So are {len(wrong) - 1} more: `chmod -R go-rwx {state}` mends all." if len(wrong) > 1 else ""
        raise TrustError(
            f"{wrong[0]}: other accounts may use it (mode {_mode(wrong[0]):o}). `chmod 600 {wrong[0]}`.{more}"
        )


def make_private(state: Path) -> None:
    """Take folders and files of a state from all other accounts."""
    state.chmod(0o700)
    for path in private_files(state):
        if path.suffix not in PUBLIC:
            path.chmod(0o600)
        for folder in path.relative_to(state).parents:
            (state / folder).chmod(0o700)


def private_files(state: Path) -> Iterator[Path]:
    """The files of a state that Trunkline wrote, in order."""
    for folder, folders, files in os.walk(state):
        here = Path(folder)
        if here == state:
            folders[:] = [name for name in folders if name not in THEIRS]
        folders.sort()
        yield from (here / name for name in sorted(files) if not (here / name).is_symlink())


def replaceable(folder: Path) -> bool:
    """Whether other accounts can replace what lies in `folder`: they may write, and no sticky bit holds them back."""
    mode = folder.stat().st_mode
    return bool(mode & 0o022) and not mode & stat.S_ISVTX


def _mode(path: Path) -> int:
    try:
        return stat.S_IMODE(path.stat().st_mode)
    except FileNotFoundError:  # a daemon writes aside and renames while we look
        return 0
