"""Log files that are bounded: one that many processes append lines to, and rotation under a process that writes on."""

import contextlib
import fcntl
import os
import shutil
import threading
from collections import deque
from pathlib import Path

PENDING_LINES = 200  # kept in memory while the disk takes none


class LineLog:
    """A file that many processes append lines to. Above `limit` bytes it becomes `<file>.1`.

    A line that could not be written is kept, and is written before the next one. Nothing here raises: that something
    went wrong must not end the process that reports it.
    """

    def __init__(self, path: Path, limit: int) -> None:
        self.path = path
        self.limit = limit
        self._pending: deque[str] = deque(maxlen=PENDING_LINES)
        self._lock = threading.Lock()

    def append(self, line: str) -> bool:
        """Whether the line is in the file now."""
        with self._lock:
            self._pending.append(line)
        return self.flush()

    def flush(self) -> bool:
        """Write the pending lines; whether none is left."""
        with self._lock:
            while self._pending:
                if not self._write(self._pending[0]):
                    return False
                self._pending.popleft()
            return True

    def _write(self, line: str) -> bool:
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            descriptor = os.open(self.path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
            try:
                size = os.fstat(descriptor).st_size
                # a writer that was killed, or a full disk, leaves half a line: it gets an end of its own
                is_torn = size and os.pread(descriptor, 1, size - 1) != b"\n"
                data = b"\n" * bool(is_torn) + line.encode(errors="replace") + b"\n"
                is_whole = os.write(descriptor, data) == len(data)
                if is_whole and size + len(data) > self.limit:
                    self._set_aside(descriptor)
                return is_whole
            finally:
                os.close(descriptor)
        except OSError:
            return False

    def _set_aside(self, descriptor: int) -> None:
        """Rename the file, unless another process renames it now or has done so."""
        with contextlib.suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.fstat(descriptor).st_ino == self.path.stat().st_ino:
                self.path.replace(self.path.with_name(self.path.name + ".1"))


def rotate_in_place(log: Path, limit: int) -> None:
    """Copy a log above `limit` bytes to `<log>.1` and empty it: the process that appends to it continues at its new end."""
    aside = log.with_name(log.name + ".1")
    try:
        if log.stat().st_size <= limit:
            return
    except OSError:
        return
    try:
        shutil.copyfile(log, aside)
    except OSError:  # a full disk takes no copy; the log is emptied all the same, or it would keep the disk full
        with contextlib.suppress(OSError):
            aside.unlink(missing_ok=True)
    with contextlib.suppress(OSError):
        os.truncate(log, 0)
