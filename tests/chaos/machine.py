"""What a test may do to a machine that stands for a plant or the centre: its processes, its disk, its clock."""

import contextlib
import errno
import os
import resource
import shutil
import signal
import struct
import subprocess
import sys
from pathlib import Path

FILLER = "filler"  # the file that takes the rest of a small disk


def children(pid: int) -> list[int]:
    """The processes that `pid` started and that live."""
    with contextlib.suppress(OSError):
        return [int(one) for one in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    return []


def family(pid: int) -> list[int]:
    """`pid` and everything below it, the eldest first."""
    found = [pid]
    for one in found:
        found += children(one)
    return found


def command_of(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
    except OSError:
        return ""


def send(pids: list[int], number: int) -> list[int]:
    """Who of them was still there."""
    sent = []
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)
            sent.append(pid)
    return sent


class Clock:
    """The time of day of one machine's processes. Where there is no C compiler, `built` says so and nothing is moved."""

    def __init__(self, file: Path, library: Path | None) -> None:
        self.file, self.library = file, library
        self.set(0)

    @staticmethod
    def build(folder: Path) -> Path | None:
        """The library to preload, or None: no compiler, or not Linux."""
        compiler = shutil.which("cc")
        if compiler is None or sys.platform != "linux":
            return None
        library = folder / "clock.so"
        source = Path(__file__).with_name("clock.c")
        subprocess.run([compiler, "-O2", "-shared", "-fPIC", "-o", str(library), str(source)], check=True, timeout=60)
        return library

    @property
    def environment(self) -> dict[str, str]:
        return {"LD_PRELOAD": str(self.library), "TRUNKLINE_TEST_CLOCK": str(self.file)} if self.library else {}

    def set(self, seconds: int) -> None:
        """Move it by so many seconds from the true time; in place, because the processes have the file mapped."""
        with self.file.open("r+b" if self.file.exists() else "wb") as file:
            file.write(struct.pack("=q", seconds))


class Disk:
    """The disk of one state folder: a small file system of its own where this account may mount one.

    Elsewhere a full disk is a limit on the size of any file that the machine's processes write; they cannot tell the two
    apart but for the number of the error.
    """

    def __init__(self, folder: Path, size_mb: int) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        mount = ["mount", "-t", "tmpfs", "-o", f"size={size_mb}m,mode=700", "none", str(folder)]
        self.own = os.geteuid() == 0 and shutil.which("mount") is not None and not subprocess.run(
            mount, capture_output=True, timeout=20, check=False
        ).returncode  # fmt: skip
        self._limited: list[int] = []

    def fill(self, pids: list[int]) -> None:
        """No byte more can be written by `pids`."""
        if not self.own:
            self._limit(pids, 0)
            self._limited = pids
            return
        file = os.open(self.folder / FILLER, os.O_WRONLY | os.O_CREAT, 0o600)
        try:
            for size in (1 << 20, 1 << 12):
                try:
                    while True:
                        os.posix_fallocate(file, os.lseek(file, 0, os.SEEK_END), size)
                        os.lseek(file, 0, os.SEEK_END)
                except OSError as error:
                    if error.errno != errno.ENOSPC:
                        raise
        finally:
            os.close(file)

    def free(self) -> None:
        (self.folder / FILLER).unlink(missing_ok=True)
        self._limit(self._limited, resource.RLIM_INFINITY)
        self._limited = []

    @staticmethod
    def _limit(pids: list[int], size: int) -> None:
        for pid in pids:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                most = resource.prlimit(pid, resource.RLIMIT_FSIZE)[1]
                resource.prlimit(pid, resource.RLIMIT_FSIZE, (most if size == resource.RLIM_INFINITY else size, most))

    def close(self) -> None:
        if self.own:
            subprocess.run(["umount", "--lazy", str(self.folder)], capture_output=True, timeout=20, check=False)
            self.own = False


def damage(path: Path, how: str, place: float) -> str:
    """Flip a bit in a file, or cut it, at `place` of its length (0 to 1); what was done, in words."""
    try:
        data = bytearray(path.read_bytes())
    except FileNotFoundError:
        return f"{path.name} is not there"
    at = min(int(place * len(data)), len(data) - 1)
    if not data:
        return f"{path.name} is empty"
    if how == "flip":
        data[at] ^= 1 << (at % 8)
        path.write_bytes(data)
        return f"{path.name}: a bit of byte {at} of {len(data)} flipped"
    os.truncate(path, at)
    return f"{path.name}: cut from {len(data)} to {at} bytes"


KILL, STOP, GO_ON = signal.SIGKILL, signal.SIGSTOP, signal.SIGCONT
