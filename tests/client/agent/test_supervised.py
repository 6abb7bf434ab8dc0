"""The plant's daemon as systemd runs it: what it tells, a disk that fills up under it, a part that stands still, its end."""

import contextlib
import errno
import json
import os
import resource
import secrets
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.federation import TRUNKLINE, free_port, within
from trunkline.runtime.incidents import read_incidents
from trunkline.runtime.lock import read_status

pytestmark = [pytest.mark.processes, pytest.mark.skipif(sys.platform != "linux", reason="signals and mounts of Linux")]
SITE_TOML = 'name = "press-07"\n[data]\nfiles = "*.csv"\nchannels = ["a"]\n[tasks.wear]\nkind = "regression"\ntarget = "wear"\nunit = "mm"\n'


class Listener:
    """systemd's end of the socket."""

    def __init__(self) -> None:
        self.name = f"@trunkline-{secrets.token_hex(8)}"
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind("\0" + self.name[1:])
        self.heard: list[str] = []
        threading.Thread(target=self._listen, daemon=True).start()

    def _listen(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                self.heard += self._socket.recv(4096).decode().split("\n")

    def close(self) -> None:
        self._socket.shutdown(socket.SHUT_RDWR)  # ends the thread
        self._socket.close()

    def status(self) -> str:
        return next((one[7:] for one in reversed(self.heard) if one.startswith("STATUS=")), "")


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 3 MB, or a folder where this account may not mount one."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = os.geteuid() == 0 and not subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", str(folder)], check=False, capture_output=True
    ).returncode  # fmt: skip
    yield folder
    if mounted:
        subprocess.run(["umount", "-l", str(folder)], check=True)


@contextlib.contextmanager
def no_room(folder: Path, pid: int) -> Iterator[None]:
    """Fill the file system of `folder`; where it is no small one, forbid the process to write to files."""
    if os.path.ismount(folder):
        filler = folder / "filler"
        with filler.open("wb", buffering=0) as file, contextlib.suppress(OSError):
            while True:
                file.write(bytes(4096))
        yield
        filler.unlink()
    else:
        before = resource.prlimit(pid, resource.RLIMIT_FSIZE)
        resource.prlimit(pid, resource.RLIMIT_FSIZE, (0, before[1]))
        yield
        resource.prlimit(pid, resource.RLIMIT_FSIZE, before)


def child(state: Path, name: str) -> dict[str, Any]:
    return {one["name"]: one for one in read_status(state)["children"]}[name]


def said(state: Path, kind: str, word: str) -> list[str]:
    return [one["text"] for one in read_incidents(state, 100) if one["kind"] == kind and word in one["text"]]


@pytest.mark.slow
def test_the_daemon_outlives_a_full_disk_and_a_stopped_part_and_ends_in_time(tmp_path: Path, small_disk: Path) -> None:
    site, state, systemd = tmp_path / "press-07", small_disk / "state", Listener()
    site.mkdir()
    (site / "site.toml").write_text(SITE_TOML)
    log = tmp_path / "daemon.log"
    command = [*TRUNKLINE, "client", "start", str(site), "--state", str(state), "--server", f"127.0.0.1:{free_port()}"]
    env = {**os.environ, "NOTIFY_SOCKET": systemd.name, "WATCHDOG_USEC": "1000000"}
    with log.open("wb") as file:
        daemon = subprocess.Popen(command, env=env, stdout=file, stderr=subprocess.STDOUT)

    def wait(what: str, found: Callable[[], Any], seconds: float = 20.0) -> Any:
        assert daemon.poll() is None, log.read_text()
        return within(seconds, lambda: f"{what}\n{log.read_text()}\n{systemd.heard[-5:]}", found)

    try:
        wait("ready", lambda: "READY=1" in systemd.heard)
        wait("a line of status", lambda: "asks 127.0.0.1:" in systemd.status() and "where" not in systemd.status())
        assert child(state, "executor")["pid"] and child(state, "supernode")["pid"]

        with no_room(small_disk, daemon.pid):
            wait("it says so", lambda: "No request is taken and no reply leaves until there is room" in log.read_text())
            wait("systemd reads it", lambda: str(state) in systemd.status())
            first = child(state, "executor")["pid"]
            os.kill(first, signal.SIGKILL)  # a part that fails meanwhile is started again, now or when there is room
            beats = systemd.heard.count("WATCHDOG=1")
            wait("it turns on", lambda: systemd.heard.count("WATCHDOG=1") > beats + 1)
        wait("it says that it goes on", lambda: "there is room again" in log.read_text())
        again = wait(
            "the part is back", lambda: child(state, "executor")["restarts"] and child(state, "executor")["pid"]
        )
        assert again != first
        wait("and stands", lambda: said(state, "recovery", "executor runs again"))
        assert (
            len(said(state, "failure", "No request is taken")) == 1
            and log.read_text().count("No request is taken") == 1
        )
        assert len(said(state, "recovery", "there is room again")) == 1
        assert said(state, "failure", "executor") == ["executor was killed (SIGKILL)"]
        lines = (state / "logs" / "daemon.log").read_text()
        assert "No request is taken" in lines and "there is room again" in lines, "held until it could be written"

        os.kill(again, signal.SIGSTOP)
        wait("it says who stands still", lambda: "executor stands still" in log.read_text())
        assert child(state, "executor")["trouble"]
        daemon.terminate()
        began = time.monotonic()
        daemon.wait(12.0)
        assert time.monotonic() - began < 10.0 and daemon.returncode == 0, log.read_text()
        assert "STOPPING=1" in systemd.heard and systemd.heard.count("READY=1") == 1
        assert not Path(f"/proc/{again}").exists()
        status = json.loads((state / "status.json").read_bytes())
        assert status["ended"] and not any(one["pid"] for one in status["children"])
    finally:
        daemon.kill()
        daemon.wait(5.0)
        systemd.close()


def test_a_want_of_room_is_told_from_damage() -> None:
    from trunkline.errors import StorageError
    from trunkline.runtime.disk import disk_error_text

    def raised(cause: BaseException | None, hidden: bool = False) -> BaseException:
        try:
            try:
                if cause is not None:
                    raise cause
            except OSError as error:
                raise StorageError("could not be written") from (None if hidden else error)
            raise StorageError("no intact version is left")
        except StorageError as error:
            return error

    assert disk_error_text(raised(OSError(errno.ENOSPC, "x"))) == "its disk is full"
    assert disk_error_text(raised(OSError(errno.EROFS, "x"), hidden=True)) == "its disk is read-only"
    assert disk_error_text(raised(OSError(errno.ENOENT, "x"))) == disk_error_text(raised(None)) == ""


def test_an_answer_that_the_vault_cannot_keep_costs_a_question_and_no_byte(
    plants: list[Path], tmp_path: Path, small_disk: Path
) -> None:
    from flwr.app import Message

    from tests.loopback import WatchedGrid, federate, trunk_of
    from trunkline.flower.errors import FULL

    if not os.path.ismount(small_disk):
        pytest.skip("a small file system is needed, and this account may not mount one")
    codes: list[int] = []

    def full_once(message: Message, honest: Callable[[], Message]) -> Message:
        if message.metadata.message_type == "train" and not codes:
            with no_room(small_disk, 0):
                refusal = honest()
            codes.append(refusal.error.code)
            assert refusal.error.reason == "its disk is full; ask again"
        return honest()

    site, settings = plants[:1], {"rounds": 2, "training": {"steps": 2, "batch_size": 8}}
    grid = WatchedGrid(site, small_disk, {2: full_once})
    disturbed = federate(site, tmp_path / "disturbed", grid=grid, **settings)
    federate(site, tmp_path / "undisturbed", **settings)
    assert codes == [FULL] and len(disturbed.up) == 4, "an offer, two updates and a scorecard"
    assert trunk_of(tmp_path / "disturbed").digest() == trunk_of(tmp_path / "undisturbed").digest()
