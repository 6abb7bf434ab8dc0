"""The runs of a server, one file each in `STATE/runs`: the run.toml, the state of the run, and the latest note on it.

A run outlives the processes that carry it. A command writes the run here; the daemon (`run_supervisor.py`) keeps it going
until it ends by itself or an operator stops it.
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

from pydantic import ConfigDict, Field, ValidationError

from trunkline.errors import DeploymentError, StorageError
from trunkline.protocol.frozen import Frozen
from trunkline.runtime.storage import write_atomic

FORMAT = 1
OUTCOME = "outcome.json"  # in a run's folder: how its ServerApp ended, written by itself; absent after a kill
RUN_LOCK = "run.lock"  # in a run's folder: held by the ServerApp that works there, with its pid and run id
RunState = Literal["wanted", "running", "waiting", "completed", "failed", "stopped"]
OPEN = ("wanted", "running", "waiting")


class RunRecord(Frozen):
    """One run.

    Args:
        key: identifies the run, here and in the commands.
        toml: its run.toml, as JSON. out: its folder, absolute.
        state: "wanted": to be submitted; "waiting": to be submitted again, after a failure. since: start of this state.
        run_id: Flower's id of the submission that counts, 0 before the first; `number` in the file.
        note: the latest event, as a sentence. tries: submissions without a new round since.
        round: the newest round that was done when the daemon last looked.
        former: Flower's ids of the submissions before, the last few.
        stop: an operator wants the run ended.
    """

    model_config = ConfigDict(populate_by_name=True)

    format: int = FORMAT
    key: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,127}$")
    name: str
    toml: str
    out: str
    resume: bool = False
    state: RunState = "wanted"
    run_id: int = Field(default=0, alias="number")
    submitted: str = ""
    since: str = ""
    note: str = ""
    tries: int = 0
    round: int = 0
    former: tuple[int, ...] = ()
    stop: bool = False

    @property
    def open(self) -> bool:
        return self.state in OPEN

    def to_json(self) -> bytes:
        """The content of the run's file."""
        return json.dumps(self.model_dump(mode="json", by_alias=True), indent=1).encode()


class RunStore:
    """All runs of a state folder. Commands and the daemon write to it, so every change is made under a lock."""

    def __init__(self, state: Path) -> None:
        self.folder = state / "runs"
        self._cache: dict[Path, tuple[tuple[int, int, int], RunRecord | None]] = {}  # the daemon reads twice a second

    def records(self) -> list[RunRecord]:
        """Oldest first; a file that cannot be read is left out (`damaged` lists it)."""
        records = [record for path in self._paths() if (record := self._read(path)) is not None]
        return sorted(records, key=lambda record: (record.submitted, record.key))

    def damaged(self) -> list[Path]:
        return [path for path in self._paths() if self._read(path) is None]

    def get(self, key: str) -> RunRecord:
        """Raises DeploymentError when there is no such run; the text lists the newest runs."""
        record = self._read(self.folder / f"{key}.json")
        if record is None:
            newest = ", ".join(record.key for record in self.records()[-5:]) or "none"
            raise DeploymentError(f"no run {key!r} in {self.folder}. Known, newest last: {newest}.")
        return record

    def find(self, name: str) -> RunRecord:
        """The run with this key, or the newest run of this name."""
        named = [record for record in self.records() if name in (record.key, record.name)]
        return named[-1] if named else self.get(name)

    def add(self, name: str, toml: str, out: Path, *, resume: bool) -> RunRecord:
        """Add a run that the daemon is to submit.

        Raises:
            DeploymentError: an unfinished run has the same folder.
            StorageError: the record cannot be written.
        """
        stamp = time.strftime("%Y%m%d-%H%M%S", time.gmtime())
        with self._locked():
            for other in self.records():
                if other.open and other.out == str(out):
                    raise DeploymentError(
                        f"{out}: the run {other.key} uses this folder and is not finished ({other.state}). It continues by itself; "
                        f"`trunkline server status` shows it, `trunkline server stop {other.key}` ends it. Or give another --out."
                    )
            record = RunRecord(
                key=f"{name}-{stamp}-{secrets.token_hex(2)}", name=name, toml=toml, out=str(out), resume=resume,
                submitted=_now(), since=_now(),
            )  # fmt: skip
            self._write(record)
        return record

    def change(self, key: str, **values: Any) -> RunRecord:
        """Set fields of a run's record; `since` follows a change of `state`.

        Raises:
            StorageError: the record cannot be written; the old one stays.
        """
        with self._locked():
            record = self.get(key)
            if values.get("state", record.state) != record.state:
                values.setdefault("since", _now())
            record = record.model_copy(update=values)
            self._write(record)
        return record

    def _paths(self) -> list[Path]:
        return sorted(self.folder.glob("*.json")) if self.folder.is_dir() else []

    def _write(self, record: RunRecord) -> None:
        write_atomic(self.folder / f"{record.key}.json", record.to_json())

    def _read(self, path: Path) -> RunRecord | None:
        """A run's file, parsed again only when it has changed; None where it is absent or damaged."""
        try:
            status = path.stat()
            mark = (status.st_mtime_ns, status.st_ino, status.st_size)
            if path not in self._cache or self._cache[path][0] != mark:
                self._cache[path] = mark, _parse(path.read_bytes())
            return self._cache[path][1]
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


def _parse(data: bytes) -> RunRecord | None:
    try:
        return RunRecord.model_validate_json(data)
    except (ValidationError, ValueError):
        return None


class RunLock:
    """Held by the one ServerApp that may work in a run's folder; the system releases it however the process ends.

    Args:
        run_id: Flower's run id. seconds: how long to wait for another holder.

    Raises:
        DeploymentError: another process holds the lock for longer than `seconds`.
        StorageError: the folder cannot be written.
    """

    def __init__(self, out: Path, run_id: int, seconds: float = 15.0) -> None:
        try:
            out.mkdir(parents=True, exist_ok=True)
            self._descriptor = os.open(out / RUN_LOCK, os.O_RDWR | os.O_CREAT, 0o600)
        except OSError as error:
            raise StorageError(
                f"{out}: no run can work in this folder ({error.strerror}). Mend the folder, or give another --out."
            ) from None
        end = time.monotonic() + seconds
        while True:
            try:
                fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except OSError:
                if time.monotonic() > end:
                    holder = os.pread(self._descriptor, 64, 0).decode(errors="replace").split()
                    os.close(self._descriptor)
                    raise DeploymentError(
                        f"{out}: the process {holder[0] if holder else 'of another run'} works there, and two would mix their "
                        "rounds. Wait for it, or give another --out."
                    ) from None
                time.sleep(0.1)
        os.ftruncate(self._descriptor, 0)
        os.pwrite(self._descriptor, f"{os.getpid()} {run_id}\n".encode(), 0)

    def release(self) -> None:
        os.close(self._descriptor)


def lock_holder(out: Path) -> tuple[bool, int]:
    """Whether a ServerApp works in `out` now, and the run id of the last one that did (0: none yet)."""
    try:
        with (out / RUN_LOCK).open("rb") as file:
            words = file.read(64).split()
            run_id = int(words[1]) if len(words) == 2 else 0
            try:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except OSError:
                return True, run_id
            return False, run_id
    except (OSError, ValueError):
        return False, 0


def write_outcome(out: Path, run_id: int, text: str = "") -> None:
    """Write that the run has ended by itself: well, or with `text` as the cause of its end.

    Raises:
        StorageError: the file cannot be written.
    """
    outcome = {"number": run_id, "ended": _now(), "error": text}
    write_atomic(out / OUTCOME, json.dumps(outcome).encode())


def read_outcome(out: Path, run_id: int) -> str | None:
    """The error text of submission `run_id` if it ended by itself (empty: it ended well); None if it did not."""
    try:
        outcome = json.loads((out / OUTCOME).read_bytes())
        return str(outcome["error"]) if outcome["number"] == run_id else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
