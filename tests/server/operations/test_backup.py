"""A backup of a centre is of one moment, holds all it needs, and is put back whole or not at all."""

import contextlib
import fcntl
import io
import json
import os
import shutil
import signal
import sqlite3
import stat
import subprocess
import tarfile
import threading
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path

import numpy as np
import pytest

from tests.federation import federation, rounds, within
from tests.formats.make import KEY, SEALED_WITH
from trunkline.errors import DeploymentError, StorageError, TrunklineError
from trunkline.runtime.lock import Lock, read_status
from trunkline.runtime.storage import Shelf
from trunkline.server.membership import audit_log as audit
from trunkline.server.membership import authority
from trunkline.server.membership.authority import Authority
from trunkline.server.operations import backup
from trunkline.server.operations.run_store import RunStore


@pytest.fixture(autouse=True)
def key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(KEY, SEALED_WITH)


@pytest.fixture
def state(tmp_path: Path) -> Path:
    """A centre with one run in its state folder, one elsewhere, and what a backup should leave out."""
    state = tmp_path / "s"
    authority.init(state, "North", ("127.0.0.1",), f"env:{KEY}")
    Authority.open(state).invite("press-07", 1.0)
    store = RunStore(state)
    for name, out in (("inside", state / "runs" / "inside"), ("elsewhere", tmp_path / "big disk" / "elsewhere")):
        record = store.add(name, "{}", out, resume=False)
        Shelf(out / "checkpoint", kind="checkpoint", owner=record.key).put(3, {"w": np.ones(9)}, {})
        (out / "events.jsonl").write_text('{"event": "start"}\n')
        (out / "run.lock").write_text("1 1\n")
    store.change(record.key, state="completed")
    with contextlib.closing(sqlite3.connect(state / "superlink.db")) as database:
        database.executescript("CREATE TABLE node (id INTEGER); INSERT INTO node VALUES (7);")
    for name in ("pid", "status.json", "logs/gateway.log", "bin/flwr-serverapp", "secret"):
        (state / name).parent.mkdir(exist_ok=True)
        (state / name).write_text("{}")
    return state


def contents(folder: Path) -> dict[str, tuple[int, bytes]]:
    return {
        path.relative_to(folder).as_posix(): (stat.S_IMODE(path.stat().st_mode), path.read_bytes())
        for path in folder.rglob("*")
        if path.is_file()
    }


def test_what_was_backed_up_comes_back_with_its_modes_and_its_runs(state: Path, tmp_path: Path) -> None:
    file, there = tmp_path / "b.tar", tmp_path / "new" / "s"
    with contextlib.closing(sqlite3.connect(state / "superlink.db")) as database:
        database.executescript("PRAGMA journal_mode=WAL; INSERT INTO node VALUES (8);")
        made = backup.back_up(state, file)  # while the last row is in no file but SQLite's log
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    told: list[str] = []
    shutil.rmtree(tmp_path / "big disk")
    was = contents(state)
    shutil.rmtree(state)
    assert backup.restore(file, there, told.append) == made
    found = contents(there)
    fresh = {name for name in found if name.startswith(("runs/", "audit.jsonl")) or name == "superlink.db"}
    left_out = {
        "pid",
        "status.json",
        "logs/gateway.log",
        "bin/flwr-serverapp",
        "secret",
        "registry.json.lock",
        "runs/.lock",
    }
    assert {name: one for name, one in found.items() if name not in fresh} == {
        name: one
        for name, one in was.items()
        if name not in left_out and name not in fresh and not name.endswith("run.lock")
    }
    assert stat.S_IMODE(there.stat().st_mode) == 0o700
    assert all(stat.S_IMODE(path.stat().st_mode) == 0o700 for path in there.rglob("*") if path.is_dir())
    assert found["server.key"][0] == 0o600
    inside, elsewhere = sorted(RunStore(there).records(), key=lambda one: one.name, reverse=True)
    assert inside.out == str(there / "runs" / "inside")
    assert (inside.state, elsewhere.state) == ("waiting", "completed"), "what was under way goes on, the other does not"
    assert Path(elsewhere.out) == there / "runs" / elsewhere.key
    for record in (inside, elsewhere):
        assert Shelf(Path(record.out) / "checkpoint", owner=record.key).newest() is not None
        assert not (Path(record.out) / "run.lock").exists()
    with contextlib.closing(sqlite3.connect(there / "superlink.db")) as database:
        assert database.execute("SELECT id FROM node").fetchall() == [(7,), (8,)]
    assert [link.body["what"] for link in audit.read(there)] == ["init", "invite", "back up", "restore"]
    assert any("was revoked since then is accepted again" in text for text in told)


def test_while_everything_is_being_written_a_backup_is_of_one_moment(state: Path, tmp_path: Path) -> None:
    over = threading.Event()
    wrong: list[BaseException] = []

    def busy() -> None:
        try:
            shelf = Shelf(state / "runs" / "inside" / "checkpoint", kind="checkpoint")
            with contextlib.closing(sqlite3.connect(state / "superlink.db", timeout=30.0)) as database:
                number = 4
                while not over.is_set():
                    number += 1
                    audit.note(state, "invite", site=f"press-{number}")
                    authority.Registry(state).write(lambda book: book)
                    shelf.put(number, {"w": np.full(1000, number)}, {})
                    with database:
                        database.executemany("INSERT INTO node VALUES (?)", [(number,)] * 2)
        except BaseException as error:
            wrong.append(error)

    writer = threading.Thread(target=busy)
    writer.start()
    try:
        for count in range(8):
            there = tmp_path / f"there-{count}"
            backup.back_up(state, tmp_path / f"{count}.tar")
            backup.restore(tmp_path / f"{count}.tar", there)
            assert list(audit.read(there))[-1].body["what"] == "restore"
            authority.Registry(there).read()
            newest = Shelf(there / "runs" / "inside" / "checkpoint", tell=pytest.fail).newest()
            assert newest is not None
            assert (newest[1]["w"] == newest[0]).all() or newest[0] == 3
            with contextlib.closing(sqlite3.connect(there / "superlink.db")) as database:
                assert database.execute("PRAGMA integrity_check").fetchone() == ("ok",)
                assert database.execute("SELECT COUNT(*) FROM node").fetchone()[0] % 2 == 1  # one, and always two more
    finally:
        over.set()
        writer.join(20.0)
    assert not wrong


def test_nobody_writes_to_the_log_between_its_copy_and_that_of_its_head(
    state: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    add, seen = backup._add, []

    def look(archive: object, path: Path, name: str) -> None:
        if name == "audit.jsonl.head":
            with (state / "audit.jsonl").open("rb") as file, pytest.raises(BlockingIOError):
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            seen.append(name)
        add(archive, path, name)

    monkeypatch.setattr(backup, "_add", look)
    backup.back_up(state, tmp_path / "b.tar")
    assert seen


def test_nothing_is_written_over_a_backup_or_into_the_state(state: Path, tmp_path: Path) -> None:
    (tmp_path / "b.tar").write_bytes(b"the last one")
    with pytest.raises(StorageError, match=r"b\.tar: exists already, and a backup is never written over another"):
        backup.back_up(state, tmp_path / "b.tar")
    assert (tmp_path / "b.tar").read_bytes() == b"the last one"
    with pytest.raises(StorageError, match="is inside the state folder, and would be lost with it"):
        backup.back_up(state, state / "b.tar")
    with pytest.raises(DeploymentError, match="nothing to back up"):
        backup.back_up(tmp_path / "none", tmp_path / "c.tar")
    with pytest.raises(StorageError, match=r"absent.*the backup was not made \(No such file"):
        backup.back_up(state, tmp_path / "absent" / "c.tar")


def test_nothing_is_restored_over_a_state(state: Path, tmp_path: Path) -> None:
    backup.back_up(state, tmp_path / "b.tar")
    before = contents(state)
    with pytest.raises(StorageError, match="is not empty, and a restoration never overwrites files"):
        backup.restore(tmp_path / "b.tar", state)
    with Lock(state), pytest.raises(DeploymentError, match="a daemon runs on this state folder"):
        backup.restore(tmp_path / "b.tar", state)
    (state / "pid").write_text("{}")  # which the lock was
    assert contents(state) == before


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The bytes of a backup of a few small files."""
    folder = tmp_path_factory.mktemp("small")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(KEY, SEALED_WITH)
        authority.init(folder / "s", "North", (), f"env:{KEY}")
        backup.back_up(folder / "s", folder / "b.tar")
    return (folder / "b.tar").read_bytes()


def refused(data: bytes, tmp_path: Path) -> str:
    file, state = tmp_path / "b.tar", tmp_path / "there"
    file.write_bytes(data)
    with pytest.raises(StorageError) as error:
        backup.restore(file, state)
    assert [path.name for path in tmp_path.iterdir()] == ["b.tar"], "nothing is left of it"
    return str(error.value)


def members(data: bytes) -> Iterator[tuple[tarfile.TarInfo, bytes]]:
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        for info in tar:
            yield info, tar.extractfile(info).read()  # type: ignore[union-attr]


def test_no_bit_of_what_a_backup_holds_can_flip_unnoticed(small: bytes, tmp_path: Path) -> None:
    inside = np.zeros(len(small), bool)  # without what fills the last block of each file
    with tarfile.open(fileobj=io.BytesIO(small)) as tar:
        for info in tar:
            inside[info.offset_data : info.offset_data + info.size] = True
    for place in np.random.default_rng(1).choice(np.flatnonzero(inside), 40, replace=False):
        broken = bytearray(small)
        broken[place] ^= 1 << (place % 8)
        assert "amaged" in refused(broken, tmp_path), place


def test_a_backup_that_is_cut_short_is_none(small: bytes, tmp_path: Path) -> None:
    end = max(info.offset_data + info.size for info, _ in members(small))
    for size in (0, 1, 100, 511, 512, 513, *range(2000, end, len(small) // 25), end - 1):
        assert "amaged or cut short" in refused(small[:size], tmp_path), size


def test_a_backup_that_was_made_to_reach_elsewhere_is_refused(small: bytes, tmp_path: Path) -> None:
    def with_(info: tarfile.TarInfo, data: bytes = b"x") -> bytes:
        out = io.BytesIO()
        info.size = len(data) if info.isreg() else 0
        with tarfile.open(fileobj=out, mode="w") as tar:
            tar.addfile(info, io.BytesIO(data))
            for one, held in members(small):
                tar.addfile(one, io.BytesIO(held))
        return out.getvalue()

    outside = tmp_path.parent / "outside"
    for name in ("../outside", str(outside), "a/../../outside", "registry.json"):
        refused(with_(tarfile.TarInfo(name)), tmp_path)
    for kind, target in (
        (tarfile.SYMTYPE, "/etc"),
        (tarfile.LNKTYPE, "registry.json"),
        (tarfile.FIFOTYPE, ""),
        (tarfile.DIRTYPE, ""),
    ):
        info = tarfile.TarInfo("odd")
        info.type, info.linkname = kind, target
        refused(with_(info, b""), tmp_path)
    assert "'more' is not what was backed up" in refused(with_(tarfile.TarInfo("more")), tmp_path)
    assert not outside.exists()


def test_a_newer_backup_says_what_to_update(small: bytes, tmp_path: Path) -> None:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as tar:
        for info, data in members(small):
            if info.name == backup.LIST:
                table = json.loads(data.partition(b"\n")[2])
                text = json.dumps({**table, "format": 9, "versions": {"trunkline": "9.1.0"}}).encode()
                data = sha256(text).hexdigest().encode() + b"\n" + text
                info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    text = refused(out.getvalue(), tmp_path)
    assert "a backup of format 9, made by Trunkline 9.1.0" in text
    assert "Update this Trunkline" in text


def test_without_the_key_it_is_restored_and_says_what_is_missing(
    state: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    backup.back_up(state, tmp_path / "b.tar")
    monkeypatch.delenv(KEY)
    told: list[str] = []
    backup.restore(tmp_path / "b.tar", tmp_path / "there", told.append)
    assert f"the environment has no {KEY}" in told[0]
    with pytest.raises(TrunklineError, match=f"the environment has no {KEY}"):
        Authority.open(tmp_path / "there")


def test_on_a_disk_without_room_no_half_of_it_is_left(state: Path, tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=32k,mode=700", "tmpfs", str(disk)]
    done = subprocess.run(mount, capture_output=True, text=True, timeout=20, check=False)
    if done.returncode:
        pytest.skip(f"this account may not mount a tmpfs: {done.stderr.strip()}")
    try:
        with pytest.raises(StorageError, match=r"the backup was not made \(No space left"):
            backup.back_up(state, disk / "b.tar")
        assert not list(disk.iterdir())
        backup.back_up(state, tmp_path / "b.tar")
        with pytest.raises(StorageError, match=r"cannot be restored \(No space left"):
            backup.restore(tmp_path / "b.tar", disk / "s")
        assert not list(disk.iterdir())
    finally:
        subprocess.run(["umount", str(disk)], timeout=20, check=True)


RUN = """
name = "kept"
rounds = 4
[trunk]
width = 4
[training]
steps = 2
batch_size = 16
[report]
baseline = false
[cohort]
min_sites = 1
deadline_s = 60
resend_s = 3
gather_s = 60
"""


@pytest.mark.slow
@pytest.mark.processes
@pytest.mark.xdist_group("federation")
@pytest.mark.timeout(280)
def test_a_centre_that_burned_down_goes_on_from_its_backup(
    plants: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with federation(tmp_path) as made:
        monkeypatch.setenv("XDG_CONFIG_HOME", made.environment["XDG_CONFIG_HOME"])
        made.start()
        made.join(plants[0])
        made.plant(plants[0])
        first = made.server / "runs" / "kept"
        made.run(RUN, first)
        within(120.0, lambda: f"a round\n{made.logs()}", lambda: rounds(first))
        said = made.command("server", "backup", str(tmp_path / "b.tar"))
        assert "1 runs; for this account only" in said
        burn_down(made.running.pop("server"), made.server)
        watching = made.running.pop("kept")
        watching.terminate()
        watching.wait(20.0)
        made.server.rename(tmp_path / "ashes")
        made.server = tmp_path / "t"
        assert "restored" in made.command("server", "restore", str(tmp_path / "b.tar"))
        (tmp_path / "server.log").rename(tmp_path / "server-before.log")
        made.start()
        second = made.server / "runs" / "kept"
        within(120.0, lambda: f"it ends by itself\n{made.logs()}", lambda: (second / "report.json").exists())
        done = [one["round"] for one in rounds(second)]
        assert done[-1] == 4
        assert plants[0].name in made.online()
        assert json.loads((second / "report.json").read_text())["sites"]


def burn_down(daemon: "subprocess.Popen[bytes]", state: Path) -> None:
    """The machine is gone: the daemon, and with it its children."""
    pids = [one["pid"] for one in read_status(state)["children"] if one["pid"]]
    daemon.kill()
    daemon.wait(10.0)
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
