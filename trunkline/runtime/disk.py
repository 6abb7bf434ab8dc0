"""Room on a disk: what keeps a folder from taking a file, how much is free, and which errors are about the disk."""

import contextlib
import errno
import os
from pathlib import Path

TRIAL_SIZE = 64 << 10  # bytes that must fit: more than any file a daemon itself writes, less than a model
LOW_SHARE, LOW_MOST = 0.05, 256 << 20  # of the whole disk and in bytes: below both a warning is due
PROBLEMS = {
    errno.ENOSPC: "its disk is full",
    errno.EDQUOT: "its disk quota is used up",
    errno.EROFS: "its disk is read-only",
    errno.EFBIG: "a limit on the size of files is reached",
    errno.EIO: "its disk reports errors",
}
FOLDER_PROBLEMS = {
    errno.EACCES: "this account may not write there",
    errno.EPERM: "this account may not write there",
    errno.ENOENT: "the folder is gone",
    errno.ENOTDIR: "the folder is gone",
}


def disk_error_text(error: BaseException) -> str:
    """What is wrong with the disk where `error`, or an error that caused it, is about the disk; else empty.

    A damaged or absent file is not about the disk: another attempt would find the same.
    """
    seen: set[int] = set()
    cause: BaseException | None = error
    while cause is not None and id(cause) not in seen:
        seen.add(id(cause))
        if isinstance(cause, OSError) and cause.errno in PROBLEMS:
            return PROBLEMS[cause.errno]
        cause = cause.__cause__ or cause.__context__
    return ""


def find_problem(folder: Path) -> str:
    """What keeps `folder` from taking a file of 64 KiB, in words; empty where it takes one. Tried by writing one."""
    trial = folder / f".room.{os.getpid()}"
    try:
        with os.fdopen(os.open(trial, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as file:
            file.write(bytes(TRIAL_SIZE))
    except OSError as error:
        return {**FOLDER_PROBLEMS, **PROBLEMS}.get(error.errno or 0, error.strerror or str(error))
    finally:
        with contextlib.suppress(OSError):
            trial.unlink(missing_ok=True)
    return ""


def find_visible_problem(folder: Path) -> str:
    """The same as far as it shows without writing, for a command that another account may run."""
    try:
        volume = os.statvfs(folder)
    except OSError:
        return ""
    if volume.f_flag & os.ST_RDONLY:
        return PROBLEMS[errno.EROFS]
    return PROBLEMS[errno.ENOSPC] if volume.f_bavail * volume.f_frsize < TRIAL_SIZE else ""


def free_bytes(folder: Path) -> int:
    """Bytes that an ordinary account may still write there; 0 where that cannot be known."""
    try:
        volume = os.statvfs(folder)
    except OSError:
        return 0
    return volume.f_bavail * volume.f_frsize


def is_low(folder: Path) -> bool:
    """Whether the disk will soon be full."""
    try:
        volume = os.statvfs(folder)
    except OSError:
        return False
    return volume.f_bavail * volume.f_frsize < min(LOW_MOST, LOW_SHARE * volume.f_blocks * volume.f_frsize)


def describe_free(folder: Path) -> str:
    """How much is free, `1.2 GB free`, with a note where the file system has no entry left for another file."""
    size, unit = float(free_bytes(folder)), "bytes"
    for larger_unit in ("kB", "MB", "GB", "TB"):
        if size < 1000:
            break
        size, unit = size / 1000, larger_unit
    text = f"{size:.0f} {unit} free" if unit == "bytes" else f"{size:.1f} {unit} free"
    with contextlib.suppress(OSError):
        volume = os.statvfs(folder)
        if volume.f_files and not volume.f_favail:
            text += ", and no file more can be made (no inode is left)"
    return text
