"""The runs of a centre, one file each in `STATE/runs`: what was asked for, how far it is, and what is still to be finished.

A run outlives the processes that carry it: whoever submits one writes it down here, and the daemon (`conductor.py`) sees to
it that it goes on until it has ended by itself or was stopped.
"""

import fcntl
import json
import os
import secrets
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationError

from trunkline.errors import DeploymentError, StorageError
from trunkline.protocol.frozen import Frozen
from trunkline.runtime.storage import write_atomic

FORMAT = 1
OUTCOME = "outcome.json"  # in a run's folder: how its ServerApp ended, written by itself; absent after a kill
HOLD = "run.lock"  # in a run's folder: held by the ServerApp that works there, with its pid and run number
State = Literal["wanted", "running", "waiting", "completed", "failed", "stopped"]
OPEN = ("wanted", "running", "waiting")


class Entry(Frozen):
    """One run.

    Args:
        key: names it, here and in the commands; number: Flower's run id of the submission that counts, 0 before the first.
        toml: its run.toml, as JSON; out: its folder, absolute.
        state: "wanted": to be submitted; "waiting": the same, after something went wrong; since: when it got there.
        note: what happened last, in words; tries: submissions without a new round since.
        round: the newest round that was done when it was last looked at.
    """

    format: int = FORMAT
    key: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,127}$")
    name: str
    toml: str
    out: str
    resume: bool = False
    state: State = "wanted"
    number: int = 0
    submitted: str = ""
    since: str = ""
    note: str = ""
    tries: int = 0
    round: int = 0
    former: tuple[int, ...] = ()  # numbers of the submissions before, the last few
    stop: bool = False  # an operator wants it ended

    @property
    def open(self) -> bool:
        return self.state in OPEN


class Ledger:
    """All runs of a state folder. Written by commands and by the daemon, so every change is made under a lock."""

    def __init__(self, state: Path) -> None:
        self.folder = state / "runs"
        self._seen: dict[Path, tuple[tuple[int, int, int], Entry | None]] = {}  # the daemon looks twice a second

    def entries(self) -> list[Entry]:
        """Oldest first; a file that cannot be read is left out (`damaged` names it)."""
        found = [entry for path in self._paths() if (entry := self._read(path)) is not None]
        return sorted(found, key=lambda one: (one.submitted, one.key))

    def damaged(self) -> list[Path]:
        return [path for path in self._paths() if self._read(path) is None]

    def get(self, key: str) -> Entry:
        """Raises DeploymentError when there is no such run, naming those there are."""
        entry = self._read(self.folder / f"{key}.json")
        if entry is None:
            known = ", ".join(one.key for one in self.entries()[-5:]) or "none"
            raise DeploymentError(f"no run {key!r} in {self.folder}. Known, newest last: {known}.")
        return entry

    def find(self, name: str) -> Entry:
        """The run with this key, or the newest one of this name."""
        named = [one for one in self.entries() if name in (one.key, one.name)]
        return named[-1] if named else self.get(name)

    def add(self, name: str, toml: str, out: Path, *, resume: bool) -> Entry:
        """Write down a run that is wanted.

        Raises:
            DeploymentError: an unfinished run has the same folder.
            StorageError: it cannot be written.
        """
        stamp = time.strftime("%Y%m%d-%H%M%S", time.gmtime())
        with self._locked():
            for other in self.entries():
                if other.open and other.out == str(out):
                    raise DeploymentError(
                        f"{out}: the run {other.key} works there and is not finished ({other.state}). It goes on by itself; "
                        f"`trunkline server status` shows it, `trunkline server stop {other.key}` ends it. Or give another --out."
                    )
            entry = Entry(
                key=f"{name}-{stamp}-{secrets.token_hex(2)}", name=name, toml=toml, out=str(out), resume=resume,
                submitted=_now(), since=_now(),
            )  # fmt: skip
            self._write(entry)
        return entry

    def change(self, key: str, **values: Any) -> Entry:
        """Another state of a run; `since` follows a change of `state`.

        Raises:
            StorageError: it cannot be written; what is there stays.
        """
        with self._locked():
            entry = self.get(key)
            if values.get("state", entry.state) != entry.state:
                values.setdefault("since", _now())
            entry = entry.model_copy(update=values)
            self._write(entry)
        return entry

    def _paths(self) -> list[Path]:
        return sorted(self.folder.glob("*.json")) if self.folder.is_dir() else []

    def _write(self, entry: Entry) -> None:
        write_atomic(self.folder / f"{entry.key}.json", json.dumps(entry.model_dump(mode="json"), indent=1).encode())

    def _read(self, path: Path) -> Entry | None:
        """A run's file, parsed again only when it has changed; None where it is absent or damaged."""
        try:
            found = path.stat()
            mark = (found.st_mtime_ns, found.st_ino, found.st_size)
            if path not in self._seen or self._seen[path][0] != mark:
                self._seen[path] = mark, _parsed(path.read_bytes())
            return self._seen[path][1]
        except OSError:
            return None

    @contextmanager
    def _locked(self) -> Iterator[None]:
        try:
            self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            descriptor = os.open(self.folder / ".lock", os.O_RDWR | os.O_CREAT, 0o600)
        except OSError as error:
            raise StorageError(
                f"{self.folder}: the list of runs cannot be changed ({error.strerror}). Free space or mend the folder."
            ) from None
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield
        finally:
            os.close(descriptor)


def _parsed(data: bytes) -> Entry | None:
    try:
        return Entry.model_validate_json(data)
    except (ValidationError, ValueError):
        return None


class Hold:
    """Held by the one ServerApp that may work in a run's folder; the system lets go of it however the process ends.

    Args:
        number: Flower's run id.

    Raises:
        DeploymentError: another process holds it for longer than `seconds`.
        StorageError: nothing can be written there.
    """

    def __init__(self, out: Path, number: int, seconds: float = 15.0) -> None:
        try:
            out.mkdir(parents=True, exist_ok=True)
            self._descriptor = os.open(out / HOLD, os.O_RDWR | os.O_CREAT, 0o600)
        except OSError as error:
            raise StorageError(
                f"{out}: no run can work there ({error.strerror}). Mend the folder, or give another --out."
            ) from None
        end = time.monotonic() + seconds
        while True:
            try:
                fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except OSError:
                if time.monotonic() > end:
                    other = os.pread(self._descriptor, 64, 0).decode(errors="replace").split()
                    os.close(self._descriptor)
                    raise DeploymentError(
                        f"{out}: the process {other[0] if other else 'of another run'} works there, and two would mix their rounds. "
                        "Wait for it, or give another --out."
                    ) from None
                time.sleep(0.1)
        os.ftruncate(self._descriptor, 0)
        os.pwrite(self._descriptor, f"{os.getpid()} {number}\n".encode(), 0)

    def release(self) -> None:
        os.close(self._descriptor)


def held_by(out: Path) -> tuple[bool, int]:
    """Whether a ServerApp works in `out` now, and the run number of the last one that did (0: none yet)."""
    try:
        with (out / HOLD).open("rb") as file:
            words = file.read(64).split()
            number = int(words[1]) if len(words) == 2 else 0
            try:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except OSError:
                return True, number
            return False, number
    except (OSError, ValueError):
        return False, 0


def write_outcome(out: Path, number: int, text: str = "") -> None:
    """Say that the run has ended by itself: with `text` as the reason why it went no further, or well.

    Raises:
        StorageError: it cannot be written.
    """
    record = {"number": number, "ended": _now(), "error": text}
    write_atomic(out / OUTCOME, json.dumps(record).encode())


def read_outcome(out: Path, number: int) -> str | None:
    """What submission `number` wrote when it ended by itself (empty: it ended well); None when it did not."""
    try:
        record = json.loads((out / OUTCOME).read_bytes())
        return str(record["error"]) if record["number"] == number else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
