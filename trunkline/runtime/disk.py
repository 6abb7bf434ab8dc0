"""Whether there is room: what keeps a folder from taking a file, in words, and what was said of it by an error."""

import contextlib
import errno
import os
from pathlib import Path

PROBE = 64 << 10  # bytes that must fit: more than any file a daemon itself writes, less than a model
LOW_SHARE, LOW_MOST = 0.05, 256 << 20  # of the whole disk and in bytes: below both it is said ahead of time
WORDS = {
    errno.ENOSPC: "its disk is full",
    errno.EDQUOT: "its disk quota is used up",
    errno.EROFS: "its disk is read-only",
    errno.EFBIG: "a limit on the size of files is reached",
    errno.EIO: "its disk reports errors",
}
OTHERS = {
    errno.EACCES: "this account may not write there",
    errno.EPERM: "this account may not write there",
    errno.ENOENT: "the folder is gone",
    errno.ENOTDIR: "the folder is gone",
}


def want_of_room(error: BaseException) -> str:
    """What was wrong with the disk where `error`, or an error that it came from, is about that; else empty.

    A file that is damaged, or is not there, is no want of room: another attempt would find the same.
    """
    seen: set[int] = set()
    at: BaseException | None = error
    while at is not None and id(at) not in seen:
        seen.add(id(at))
        if isinstance(at, OSError) and at.errno in WORDS:
            return WORDS[at.errno]
        at = at.__cause__ or at.__context__
    return ""


def look(folder: Path) -> str:
    """What keeps `folder` from taking a file of 64 KiB, in words; empty where it takes one. Tried by writing one."""
    probe = folder / f".room.{os.getpid()}"
    try:
        with os.fdopen(os.open(probe, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as file:
            file.write(bytes(PROBE))
    except OSError as error:
        return {**OTHERS, **WORDS}.get(error.errno or 0, error.strerror or str(error))
    finally:
        with contextlib.suppress(OSError):
            probe.unlink(missing_ok=True)
    return ""


def seen(folder: Path) -> str:
    """The same as far as it can be seen without writing, for a command that another account may run."""
    try:
        found = os.statvfs(folder)
    except OSError:
        return ""
    if found.f_flag & os.ST_RDONLY:
        return WORDS[errno.EROFS]
    return WORDS[errno.ENOSPC] if found.f_bavail * found.f_frsize < PROBE else ""


def free(folder: Path) -> int:
    """Bytes that an ordinary account may still write there; 0 where that cannot be known."""
    try:
        found = os.statvfs(folder)
    except OSError:
        return 0
    return found.f_bavail * found.f_frsize


def is_low(folder: Path) -> bool:
    """Whether the disk will soon be full."""
    try:
        found = os.statvfs(folder)
    except OSError:
        return False
    return found.f_bavail * found.f_frsize < min(LOW_MOST, LOW_SHARE * found.f_blocks * found.f_frsize)


def in_words(folder: Path) -> str:
    """How much is free, `1.2 GB free`; and that no file can be made where the file system has no entry left for one."""
    size, unit = float(free(folder)), "bytes"
    for bigger in ("kB", "MB", "GB", "TB"):
        if size < 1000:
            break
        size, unit = size / 1000, bigger
    text = f"{size:.0f} {unit} free" if unit == "bytes" else f"{size:.1f} {unit} free"
    with contextlib.suppress(OSError):
        found = os.statvfs(folder)
        if found.f_files and not found.f_favail:
            text += ", and no file more can be made (no inode is left)"
    return text
