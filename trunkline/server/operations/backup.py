"""A backup of the server's state in one file, made while the daemon runs, and its restoration into an empty folder.

The file is a tar archive. Its last member lists all others with their hashes, so a truncated file is recognised by the
missing list. It holds the files of the state folder, sealed where they are sealed, without the key that seals them.

Files that are replaced as a whole are read through one descriptor, so each copy is of one version. The audit log is copied
under its lock. The database is copied by SQLite after the registry, and the checkpoints of a run after its journal: a file
copied later may contain more than an earlier one, never less.
"""

import contextlib
import fcntl
import hashlib
import io
import json
import os
import shutil
import sqlite3
import stat
import tarfile
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, Any

from pydantic import Field, ValidationError

import trunkline
from trunkline.errors import DeploymentError, ForeignState, StorageError, TrunklineError
from trunkline.protocol.frozen import Frozen
from trunkline.protocol.messages import PROTOCOL
from trunkline.runtime.lock import read_status
from trunkline.runtime.storage import write_atomic
from trunkline.server.membership import audit_log as audit
from trunkline.server.membership.authority import is_federation, read_federation
from trunkline.server.operations.run_store import RUN_LOCK, RunRecord, RunStore
from trunkline.server.releases.lineage import versions

FORMAT = 1
LIST = "backup.json"  # the last member
DATABASE = "superlink.db"
# files of a state folder that every start makes again, and logs
LEFT_OUT = ("pid", "status.json", "secret", "bin", "flwr", "logs")
MODES = 0o755  # no other account writes here
CHUNK = 1 << 20


class BackedUpFile(Frozen):
    """One file: its sha256, bytes and mode."""

    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    size: int = Field(ge=0)
    mode: int = Field(ge=0, le=0o777)


class Listing(Frozen):
    """The list of a backup.

    Args:
        made: time of the backup, ISO 8601, UTC. by: the operator, as in the audit log.
        federation: its name; empty without a federation.
        versions: of Trunkline and its main packages. protocol: version of the wire protocol.
        runs: key of a run -> its folder in the backup, also for a run whose folder is outside of the state.
        members: path in the backup -> the file.
    """

    format: int = FORMAT
    made: str
    by: str
    federation: str
    versions: dict[str, str]
    protocol: int
    runs: dict[str, str]
    members: dict[str, BackedUpFile]


@dataclass
class _Archive:
    tar: tarfile.TarFile
    members: dict[str, BackedUpFile] = field(default_factory=dict)

    def add(self, name: str, file: IO[bytes], mode: int | None = None) -> None:
        """As many bytes as the file has now; bytes that are appended meanwhile are not copied."""
        status = os.fstat(file.fileno())
        info = tarfile.TarInfo(name)
        info.size, info.mtime = status.st_size, int(status.st_mtime)
        info.mode = (stat.S_IMODE(status.st_mode) if mode is None else mode) & MODES
        reader = _Hashing(file, info.size)
        self.tar.addfile(info, reader)
        self.members[name] = BackedUpFile(sha256=reader.digest.hexdigest(), size=info.size, mode=info.mode)


class _Hashing:
    """Reads the first `size` bytes of a file, and hashes them."""

    def __init__(self, file: IO[bytes], size: int) -> None:
        self.file = file
        self.left = size
        self.digest = hashlib.sha256()

    def read(self, size: int = -1) -> bytes:
        data = self.file.read(self.left if size < 0 else min(size, self.left))
        self.left -= len(data)
        self.digest.update(data)
        return data


def back_up(state: Path, file: Path) -> Listing:
    """Write the state of a server into `file`, readable for this account only.

    Raises:
        DeploymentError: `state` is not the state folder of a server.
        StorageError: `file` exists or is inside `state`, or cannot be written; a file cannot be read.
    """
    state, file = state.resolve(), file.resolve()
    if not (is_federation(state) or (state / DATABASE).exists()):
        raise DeploymentError(f"{state}: no server has run on this state folder, so there is nothing to back up.")
    if file.exists():
        raise StorageError(f"{file}: exists already, and a backup is never written over another. Name another file.")
    if file.is_relative_to(state):
        raise StorageError(f"{file}: is inside the state folder, and would be lost with it. Name a file elsewhere.")
    audit.note(state, "back up", file=str(file))
    aside = file.with_name(f".{file.name}.{os.getpid()}.tmp")
    try:
        descriptor = os.open(aside, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o600)
        with os.fdopen(descriptor, "w+b") as out:
            with tarfile.open(fileobj=out, mode="w", format=tarfile.PAX_FORMAT) as tar:
                listing = _collect(state, _Archive(tar))
            out.flush()
            os.fsync(out.fileno())
        aside.rename(file)
    except (OSError, tarfile.TarError) as error:
        cause = getattr(error, "strerror", None) or error
        path = getattr(error, "filename", None) or file
        raise StorageError(
            f"{path}: the backup was not made ({cause}). Nothing was changed; remove the cause and try again."
        ) from None
    finally:
        aside.unlink(missing_ok=True)
    return listing


def _collect(state: Path, archive: _Archive) -> Listing:
    runs, inside = {}, {record.key: record for record in RunStore(state).records()}
    elsewhere: dict[str, Path] = {}
    for key, record in inside.items():
        out = Path(record.out).resolve()
        runs[key] = out.relative_to(state).as_posix() if out.is_relative_to(state) else f"runs/{key}"
        if not out.is_relative_to(state):
            elsewhere[runs[key]] = out
    for path in _files(state):
        name = path.relative_to(state).as_posix()
        if name == audit.AUDIT:
            _add_log(archive, path)
        elif name != f"{audit.AUDIT}.head" and not name.startswith(DATABASE):
            _add(archive, path, name)
    for folder, out in elsewhere.items():
        for path in _files(out):
            _add(archive, path, f"{folder}/{path.relative_to(out).as_posix()}")
    if (state / DATABASE).exists():
        _add_database(archive, state / DATABASE)
    listing = Listing(
        made=_now(), by=audit.operator(),
        federation=read_federation(state).name if is_federation(state) else "",
        versions=versions(), protocol=PROTOCOL, runs=runs, members=archive.members,
    )  # fmt: skip
    text = listing.model_dump_json(indent=1).encode()
    text = f"{hashlib.sha256(text).hexdigest()}\n".encode() + text
    info = tarfile.TarInfo(LIST)
    info.size, info.mode = len(text), 0o600
    archive.tar.addfile(info, io.BytesIO(text))
    return listing


def _files(folder: Path) -> Iterator[Path]:
    """The files of a folder, the journal of a run before its checkpoints, without temporary files and locks."""
    for parent, folders, files in os.walk(folder):
        top = Path(parent) == folder
        folders[:] = sorted(
            (name for name in folders if not (top and name in LEFT_OUT)), key=lambda name: (name == "checkpoint", name)
        )
        for name in sorted(files):
            path = Path(parent) / name
            if name.startswith(".") or name.endswith(".lock") or name == RUN_LOCK or (top and name in LEFT_OUT):
                continue
            if path.is_file() and not path.is_symlink():  # no sockets either
                yield path


def _add(archive: _Archive, path: Path, name: str) -> None:
    with contextlib.suppress(FileNotFoundError), path.open("rb") as file:  # an older checkpoint was deleted meanwhile
        archive.add(name, file)


def _add_log(archive: _Archive, path: Path) -> None:
    """The log and its head, under a lock that keeps writers out."""
    with path.open("rb") as file:
        fcntl.flock(file, fcntl.LOCK_SH)
        archive.add(path.name, file)
        _add(archive, path.with_name(f"{path.name}.head"), f"{path.name}.head")


def _add_database(archive: _Archive, path: Path) -> None:
    with tempfile.TemporaryDirectory(prefix="trunkline-") as folder:  # mode 0700
        copy = Path(folder) / path.name
        try:
            with (
                contextlib.closing(sqlite3.connect(path, timeout=30.0)) as source,
                contextlib.closing(sqlite3.connect(copy)) as target,
            ):
                source.backup(target)  # in one step: a copy of one moment, even while others write
        except sqlite3.Error as error:
            raise StorageError(f"{path}: cannot be copied ({error}). Stop the daemon and check the file.") from None
        with copy.open("rb") as file:
            archive.add(path.name, file, mode=0o600)


def restore(file: Path, state: Path, emit: Callable[[str], None] = lambda text: None) -> Listing:
    """Restore a backup as the state of a server. Everything is checked before `state` is created.

    Args:
        state: a folder that is empty or absent.
        emit: takes sentences that tell the operator what to do next.

    Raises:
        DeploymentError: a daemon runs on `state`.
        StorageError: `state` is not empty; the file is damaged, cut short, or no backup; it cannot be written.
        ForeignState: the file was written by a newer Trunkline.
    """
    state, file = state.resolve(), file.resolve()
    if _is_running(state):
        raise DeploymentError(f"{state}: a daemon runs on this state folder. Nothing was changed; restore to another.")
    if state.exists() and (not state.is_dir() or any(state.iterdir())):
        raise StorageError(
            f"{state}: is not empty, and a restoration never overwrites files. Name a folder that does not exist yet."
        )
    aside = state.with_name(f".{state.name}.{os.getpid()}.restoring")
    try:
        aside.mkdir(parents=True, mode=0o700)
        listing = _unpack(file, aside)
        _move_runs(aside, state, listing)
        _flush(aside)
        aside.rename(state)  # replaces an empty folder
    except OSError as error:
        where = error.filename if error.filename and Path(error.filename) == file else state
        raise StorageError(f"{where}: cannot be restored ({error.strerror}). Nothing was changed.") from None
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    try:
        audit.note(state, "restore", file=str(file), made=listing.made)
    except TrunklineError as error:
        emit(f"{error} Until then `trunkline server start --state {state}` fails with the same error.")
    emit(
        f"The state is of {listing.made}. Sites that joined since then join again with a new code. A site that was revoked since "
        "then is accepted again: revoke it before you start the server."
    )
    return listing


def _is_running(state: Path) -> bool:
    try:
        return bool(read_status(state)["running"])
    except DeploymentError:  # no daemon ever ran
        return False


def _unpack(file: Path, to: Path) -> Listing:
    """Write the members below `to`, and compare each with the list."""
    damaged = f"{file}: damaged or cut short ({{}}). Nothing was restored; take another backup."
    unpacked: dict[str, BackedUpFile] = {}
    listing: Listing | None = None
    try:
        with tarfile.open(file, "r:") as tar:
            for info in tar:
                if listing is not None:
                    raise StorageError(damaged.format(f"{info.name!r} comes after its list"))
                if info.name == LIST:
                    listing = _listing(tar, info, file)
                    continue
                checked = tarfile.data_filter(info, str(to))
                if not info.isreg() or checked.name != info.name or info.name in unpacked:
                    raise StorageError(damaged.format(f"{info.name!r} is no file of a backup"))
                unpacked[info.name] = _write(tar, info, to / info.name)
    except tarfile.FilterError as error:
        raise StorageError(f"{file}: is no backup of ours: {error}. Nothing was restored.") from None
    except (tarfile.TarError, EOFError) as error:
        raise StorageError(damaged.format(error or type(error).__name__)) from None
    if listing is None:
        raise StorageError(damaged.format("its list is missing"))
    if different := [
        name for name in {**listing.members, **unpacked} if listing.members.get(name) != unpacked.get(name)
    ]:
        raise StorageError(damaged.format(f"{different[0]!r} is not what was backed up"))
    return listing


def _listing(tar: tarfile.TarFile, info: tarfile.TarInfo, file: Path) -> Listing:
    source = tar.extractfile(info)
    data = source.read() if source is not None else b""
    digest, _, text = data.partition(b"\n")
    if hashlib.sha256(text).hexdigest().encode() != digest:
        raise StorageError(
            f"{file}: damaged: its list is not what was written. Nothing was restored; take another backup."
        )
    try:
        table: dict[str, Any] = json.loads(text)
        if table["format"] > FORMAT:
            by = table.get("versions", {}).get("trunkline", "newer than this")
            raise ForeignState(
                f"{file}: a backup of format {table['format']}, made by Trunkline {by}; this is Trunkline {trunkline.__version__} and "
                f"reads up to {FORMAT}. Update this Trunkline; nothing was restored."
            )
        return Listing.model_validate(table)
    except (ValidationError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise StorageError(f"{file}: its list cannot be read ({type(error).__name__}). Nothing was restored.") from None


def _write(tar: tarfile.TarFile, info: tarfile.TarInfo, path: Path) -> BackedUpFile:
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    source = tar.extractfile(info)
    assert source is not None  # a regular file has one
    reader = _Hashing(source, info.size)
    mode = info.mode & MODES
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "wb") as out:
        shutil.copyfileobj(reader, out, CHUNK)
        out.flush()
        os.fsync(out.fileno())
    path.chmod(mode)
    os.utime(path, (info.mtime, info.mtime))
    return BackedUpFile(sha256=reader.digest.hexdigest(), size=info.size - reader.left, mode=mode)


def _move_runs(aside: Path, state: Path, listing: Listing) -> None:
    """Give the runs their new folders, and mark unfinished runs to be submitted again."""
    for key, folder in listing.runs.items():
        path = aside / "runs" / f"{key}.json"
        try:
            record = RunRecord.model_validate_json(path.read_bytes())
        except (FileNotFoundError, ValidationError, ValueError):
            continue  # it was damaged before the backup, and the daemon reports it
        change: dict[str, Any] = {"out": str(state / folder)}
        if record.open:
            change |= {
                "state": "waiting",
                "since": _now(),
                "note": f"restored from the backup of {listing.made}",
                "tries": 0,
            }
        write_atomic(path, record.model_copy(update=change).to_json())


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def _flush(folder: Path) -> None:
    for parent, _, _ in os.walk(folder):
        descriptor = os.open(parent, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
