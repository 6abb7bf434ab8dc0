"""Keeps a daemon's child processes running, and ends them with it."""

import ctypes
import fcntl
import getpass
import ipaddress
import json
import logging
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, Self

from trunkline.errors import DeploymentError
from trunkline.storage import write_atomic

if TYPE_CHECKING:
    from rich.table import Table

FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.5, 30.0  # between an exit and the next start; doubles while starts fail
STEADY_S = 60.0  # alive for so long, a child has its first pause again
GRACE_S = 8.0  # from the request to end until the kill; systemd's own default would allow 90
TICK_S = 0.2
LOG_LIMIT = 10 << 20  # bytes above which a log is set aside; the SuperLink writes about 3 MB a day and idle site
LOG_CHECK_S = 60.0
PR_SET_PDEATHSIG = 1  # linux/prctl.h

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Child:
    """A process to keep running.

    Args:
        log: stdout and stderr are appended here; above 10 MiB its content is moved to `<log>.1`.
        restart: start it again whenever it ends, however it ended.
        needs: host:port that must accept a connection before the first start; empty: nothing. Flower's own parts wait
            for one another with pauses that grow to seconds.
    """

    name: str
    argv: Sequence[str]
    env: Mapping[str, str]
    log: Path
    restart: bool = True
    needs: str = ""


@dataclass
class _Running:
    child: Child
    process: subprocess.Popen[bytes] | None = None
    since: float = 0.0  # Unix time of the last start
    started: float = 0.0  # the same moment on the monotonic clock
    due: float = 0.0  # monotonic time of the next start
    pause: float = FIRST_PAUSE_S
    starts: int = 0
    last_exit: str = ""

    @property
    def alive(self) -> bool:
        return self.process is not None


@dataclass
class Lock:
    """One daemon a state folder: a file lock, which the system drops with the process however it dies.

    Raises:
        DeploymentError: another process holds it; the text names its pid.
    """

    state: Path
    _descriptor: int = field(default=-1, init=False)

    def __enter__(self) -> Self:
        try:
            self.state.mkdir(parents=True, exist_ok=True, mode=0o700)
            self._descriptor = os.open(self.state / "pid", os.O_RDWR | os.O_CREAT, 0o600)
        except OSError as error:
            raise DeploymentError(
                f"{self.state}: cannot keep state here ({error.strerror}). Give another folder, or the right to write."
            ) from None
        if not self._take():
            holder = os.pread(self._descriptor, 32, 0).decode(errors="replace").strip()
            os.close(self._descriptor)
            raise DeploymentError(
                f"{self.state}: a daemon with pid {holder or 'unknown'} already runs on this state folder. "
                f"End it first (kill {holder or 'PID'}), or give the second one a state folder of its own."
            ) from None
        os.ftruncate(self._descriptor, 0)
        os.pwrite(self._descriptor, f"{os.getpid()}\n".encode(), 0)
        return self

    def _take(self) -> bool:
        for pause in (0.05, 0.2, 0.0):  # `read_status` holds it for an instant
            try:
                fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return True
            except OSError:
                time.sleep(pause)
        return False

    def __exit__(self, *exc: object) -> None:
        os.close(self._descriptor)


def read_status(state: Path) -> dict[str, Any]:
    """The last `status.json` of a supervisor, with `running`: whether one holds the folder now.

    Raises:
        DeploymentError: no supervisor ever ran on this folder.
    """
    try:
        status: dict[str, Any] = json.loads((state / "status.json").read_bytes())
    except FileNotFoundError:
        raise DeploymentError(
            f"{state}: no daemon has run on this state folder yet. Start one, or name its folder."
        ) from None
    except (OSError, ValueError) as error:
        raise DeploymentError(
            f"{state / 'status.json'}: cannot be read: {error}. It is written anew at a start."
        ) from None
    try:
        with (state / "pid").open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        status["running"] = False
    except FileNotFoundError:
        status["running"] = False
    except OSError:
        status["running"] = True
    return status


def make_secret(path: Path) -> Path:
    """A file of 48 random bytes for this account only, made once.

    Raises:
        DeploymentError: another account could read it.
    """
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        write_atomic(path, secrets.token_bytes(48))
    if path.stat().st_mode & 0o077:
        raise DeploymentError(f"{path}: other accounts can read this secret. Remove the file; a start makes a new one.")
    return path


def pins_of(own: str, extra: Path | None) -> set[str]:
    """The pinned digests: of the installed thin app, and the first word of each line of `extra`."""
    if extra is None or not extra.exists():
        return {own}
    lines = (line.split("#")[0].split() for line in extra.read_text().splitlines())
    return {own, *(words[0] for words in lines if words)}


def accepts(address: str, seconds: float = 0.5) -> bool:
    """Whether somebody takes a connection at host:port."""
    host, _, port = address.rpartition(":")
    try:
        with socket.create_connection((host.strip("[]"), int(port)), timeout=seconds):
            return True
    except OSError:
        return False


def account() -> str:
    """The name of the account this process runs under."""
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container whose user has no name
        return f"uid {os.getuid()}"


def is_loopback(host: str) -> bool:
    """Whether a name or address is this machine's own."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def say(text: str) -> None:
    """A line to whoever started the daemon, at once even into a file."""
    print(text, flush=True)


def program(name: str) -> str:
    """The path of a program installed beside this Python, whatever PATH says."""
    path = Path(sys.executable).parent / name
    if not path.exists():
        raise DeploymentError(f"{path}: not found. Install Trunkline again into this environment.")
    return str(path)


def status_table(status: Mapping[str, Any]) -> "Table":
    """What `read_status` returned, as a table."""
    from rich.table import Table

    title = f"running, pid {status['pid']}, since {status['since']}" if status["running"] else "not running"
    table = Table("part", "pid", "since (UTC)", "restarts", "last exit", title=title, title_justify="left")
    table.add_column("log", overflow="fold")
    for child in status["children"]:
        pid = str(child["pid"]) if status["running"] and child["pid"] else "-"
        table.add_row(
            child["name"],
            pid,
            child["since"][:19].replace("T", " "),
            str(child["restarts"]),
            child["last_exit"],
            child["log"],
        )
    return table


class Supervisor:
    """Starts children in order, restarts the fallen, writes `<state>/status.json`, ends them in reverse order.

    The children are told to end when this process dies, even by kill -9 (Linux).

    Args:
        info: more entries for status.json, such as the address a daemon serves.
    """

    def __init__(self, children: Sequence[Child], state: Path, info: Mapping[str, object] | None = None) -> None:
        self.state = state
        self.info = dict(info or {})
        self._running = [_Running(child) for child in children]
        self._stop = threading.Event()
        self._since = time.time()

    def stop(self, signal_number: int | None = None, frame: FrameType | None = None) -> None:
        """Ask `run` to end; also the handler of SIGTERM and SIGINT."""
        self._stop.set()

    @property
    def starts(self) -> int:
        """How often a child was started, of all together: grows when one has ended."""
        return sum(one.starts for one in self._running)

    def wake(self) -> None:
        """Start at once what waits after a failure: something it may have failed for has changed."""
        for one in self._running:
            one.due, one.pause = 0.0, FIRST_PAUSE_S

    def run(self, tick: Callable[[], None] = lambda: None) -> None:
        """Block until SIGTERM, SIGINT or `stop`; return within 10 s of it with every child gone.

        Args:
            tick: called five times a second, for what the daemon watches itself.

        Raises:
            DeploymentError: another daemon holds the state folder, or a program cannot be executed.
        """
        with Lock(self.state):
            before = self._take_signals()
            try:
                self._since = time.time()
                due = time.monotonic() + LOG_CHECK_S
                while not self._stop.is_set():
                    changed = [self._tend(one) for one in self._running]
                    if any(changed):
                        self.write_status()
                    if time.monotonic() >= due:
                        due = time.monotonic() + LOG_CHECK_S
                        for one in self._running:
                            _set_aside(one.child.log)
                    tick()
                    self._stop.wait(TICK_S)
            finally:
                self._end_all()
                self.write_status()
                for number, handler in before.items():
                    signal.signal(number, handler)

    def _take_signals(self) -> dict[int, Any]:
        if threading.current_thread() is not threading.main_thread():
            return {}  # Python gives handlers to the main thread only; who runs this in another calls `stop`
        return {number: signal.signal(number, self.stop) for number in (signal.SIGTERM, signal.SIGINT)}

    def _tend(self, one: _Running) -> bool:
        """Start or reap one child; True when something changed."""
        now = time.monotonic()
        if one.process is not None:
            code = one.process.poll()
            if code is None:
                return False
            one.process = None
            one.last_exit = _exit_text(code)
            if now - one.started >= STEADY_S:
                one.pause = FIRST_PAUSE_S
            one.due = now + one.pause
            one.pause = min(2 * one.pause, LONGEST_PAUSE_S)
            then = f"starts again in {one.due - now:.1f} s" if one.child.restart else "is not restarted"
            logger.warning("%s ended with %s; it %s (log: %s)", one.child.name, one.last_exit, then, one.child.log)
            return True
        if now < one.due or (one.starts and not one.child.restart):
            return False
        if one.child.needs and not one.starts and not accepts(one.child.needs):
            return False
        self._start(one)
        return True

    def _start(self, one: _Running) -> None:
        child = one.child
        child.log.parent.mkdir(parents=True, exist_ok=True)
        _set_aside(child.log)
        with child.log.open("ab") as log:
            try:
                one.process = subprocess.Popen(
                    child.argv,
                    env=dict(child.env),
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    preexec_fn=_die_with_parent(),
                )
            except OSError as error:
                raise DeploymentError(
                    f"{child.name}: {child.argv[0]} cannot be executed ({error.strerror}). "
                    "Install Trunkline again into this environment: `pip install -e .` or `make setup`."
                ) from None
        one.started, one.since, one.starts = time.monotonic(), time.time(), one.starts + 1
        logger.info("%s started, pid %d", child.name, one.process.pid)

    def _end_all(self) -> None:
        """In reverse order, each after the one before it has gone, so that what serves outlives what it serves."""
        end = time.monotonic() + GRACE_S
        for place, one in reversed(list(enumerate(self._running))):
            if one.process is None:
                continue
            one.process.terminate()
            _wait(one.process, end - 1.5 * place)  # leave every earlier child a second and a half
        for one in self._running:
            if one.process is None:
                continue
            if not _wait(one.process, end):
                logger.warning("%s did not end within %.0f s and was killed", one.child.name, GRACE_S)
                one.process.kill()
            one.last_exit = _exit_text(one.process.wait())
            one.process = None

    def write_status(self) -> None:
        """Put `status.json` in the state folder as things stand."""
        record = {
            **self.info,
            "pid": os.getpid(),
            "since": _iso(self._since),
            "children": [
                {
                    "name": one.child.name,
                    "pid": one.process.pid if one.process is not None else None,
                    "since": _iso(one.since) if one.starts else "",
                    "restarts": max(0, one.starts - 1),
                    "last_exit": one.last_exit,
                    "log": str(one.child.log),
                }
                for one in self._running
            ],
        }
        write_atomic(self.state / "status.json", json.dumps(record, indent=2).encode())


def _set_aside(log: Path) -> None:
    """Copy a log that grew too large to `<log>.1` and empty it: whoever appends to it writes on, at its new end."""
    try:
        if log.stat().st_size > LOG_LIMIT:
            shutil.copyfile(log, log.with_name(log.name + ".1"))
            os.truncate(log, 0)
    except FileNotFoundError:
        pass
    except OSError as error:  # a full disk must not end the children
        logger.warning("%s: could not be set aside (%s)", log, error.strerror)


def _wait(process: subprocess.Popen[bytes], end: float) -> bool:
    """Wait until `end` on the monotonic clock; True when the process has gone."""
    try:
        process.wait(max(0.05, end - time.monotonic()))
    except subprocess.TimeoutExpired:
        return False
    return True


def _exit_text(code: int) -> str:
    return f"exit code {code}" if code >= 0 else signal.Signals(-code).name


def _iso(moment: float) -> str:
    return datetime.fromtimestamp(moment, UTC).isoformat(timespec="seconds")


def _die_with_parent() -> Callable[[], None] | None:
    """For the child between fork and exec: SIGTERM when its parent dies. Everything is looked up before the fork."""
    if not sys.platform.startswith("linux"):
        return None
    prctl = ctypes.CDLL(None, use_errno=True).prctl
    parent = os.getpid()

    def ask() -> None:
        prctl(PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)
        if os.getppid() != parent:  # it died in between
            os._exit(1)

    return ask
