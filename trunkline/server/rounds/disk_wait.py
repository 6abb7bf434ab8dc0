"""What the server does when its disk is full: it waits, reports it once, and goes on when there is room again."""

import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any, TypeVar

from trunkline.errors import ForeignState, StorageError

WRITE_RETRY_S = 2.0  # between attempts to write
BACKLOG = 10_000  # events kept in memory while they cannot be written
Result = TypeVar("Result")


class DiskWait:
    """Call it with a function that writes; the function is tried again until it succeeds.

    Args:
        folder: the folder that is written, for the words.
        note: takes a sentence when the waiting begins and when it is over.
        seconds: how long to wait for room; 0: not at all.
    """

    def __init__(self, folder: Path, note: Callable[[str], None], seconds: float) -> None:
        self.folder = folder
        self.note = note
        self.seconds = seconds

    def __call__(self, write: Callable[[], Result]) -> Result:
        """Raises StorageError when there was no room for `seconds`; ForeignState at once."""
        began = time.monotonic()
        reported = False
        while True:
            try:
                result = write()
            except StorageError as error:
                # files of another run do not become ours by waiting
                if isinstance(error, ForeignState) or time.monotonic() - began >= self.seconds:
                    raise
                if not reported:
                    reported = True
                    self.note(
                        f"The run stands still: {error} {free(self.folder)} It is tried again every {WRITE_RETRY_S:g} s."
                    )
                time.sleep(WRITE_RETRY_S)
            else:
                if reported:
                    self.note(
                        f"The run goes on: {self.folder} can be written again, after {time.monotonic() - began:.0f} s."
                    )
                return result


def free(folder: Path) -> str:
    """How much room there is, as a sentence; empty where the system does not say."""
    try:
        usage = shutil.disk_usage(folder)
    except OSError:
        return ""
    return f"{usage.free / 1e6:,.1f} of {usage.total / 1e6:,.0f} MB are free there."


class EventFile:
    """Appends lines to the file of a run's events; on a full disk they wait in memory, in order.

    A line that a kill cut short is ended first, so that the next line stands alone.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._waiting: list[bytes] = []
        self._file: IO[Any] | None = None

    def write(self, line: str) -> None:
        self._waiting.append(line.encode() + b"\n")
        del self._waiting[:-BACKLOG]
        try:
            if self._file is None:
                self._file = self.path.open("ab", buffering=0)
                if self._cut_short():
                    self._waiting.insert(0, b"\n")
            while self._waiting:
                done = self._file.write(self._waiting[0]) or 0
                if done < len(self._waiting[0]):  # the disk was full in the middle of it
                    self._waiting[0] = self._waiting[0][done:]
                    return
                del self._waiting[0]
        except OSError:
            pass  # nothing of a run depends on its events

    def _cut_short(self) -> bool:
        with self.path.open("rb") as file:
            size = file.seek(0, 2)
            file.seek(max(0, size - 1))
            return size > 0 and file.read(1) != b"\n"

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
