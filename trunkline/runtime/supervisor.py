"""A daemon's child processes: started in order, restarted when they fall, ended in reverse order."""

import contextlib
import ctypes
import errno
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from types import FrameType
from typing import Any

from trunkline.errors import DeploymentError, StorageError, TrunklineError
from trunkline.runtime import disk
from trunkline.runtime.incidents import Incidents, Kind, Lines, sentences
from trunkline.runtime.lock import Lock
from trunkline.runtime.programs import accepts, say
from trunkline.runtime.storage import write_atomic

FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.5, 30.0  # between an exit and the next start; doubles while starts fail
STEADY_S = 60.0  # alive for so long, a child has its first pause again
RECOVERED_S = 5.0  # alive for so long after it was started again, it runs again; twice as long at each fall soon after
CALM_S = 600.0  # no longer than this, and after a life of this length the first again
OFTEN = 4  # starts in a row without that: it does not only fall, it does not stand
GRACE_S = 8.0  # from the request to end until the kill; systemd's own default would allow 90
TICK_S = 0.2
LOG_LIMIT = 10 << 20  # bytes above which a log is set aside; the SuperLink writes about 3 MB a day and idle site
LOG_CHECK_S = 60.0
ROOM_S, NO_ROOM_S = 10.0, 1.0  # between two attempts to write; while the disk is nearly or quite full
STILL_S = 1.0  # between two looks at whether somebody has stopped a child, and at what the disk says of itself
PR_SET_PDEATHSIG = 1  # linux/prctl.h
OURS = ("NOTIFY_SOCKET", "WATCHDOG_USEC", "WATCHDOG_PID")  # no child speaks to systemd in the daemon's name


class Service:
    """What systemd is told of this process, by the protocol of sd_notify(3); nothing where it did not ask."""

    def __init__(self, environ: Mapping[str, str] = os.environ) -> None:
        self._address = environ.get("NOTIFY_SOCKET", "")
        if self._address.startswith("@"):  # the abstract namespace of Linux
            self._address = "\0" + self._address[1:]
        microseconds, pid = environ.get("WATCHDOG_USEC", ""), environ.get("WATCHDOG_PID", "")
        ours = microseconds.isdigit() and pid in ("", str(os.getpid()))
        self._every_s = int(microseconds) / 2e6 if ours else 0.0
        self._due = 0.0

    def tell(self, *lines: str) -> None:
        """Send lines such as `READY=1` in one datagram. That nobody takes it is no error."""
        if not self._address:
            return
        with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sender:
            sender.settimeout(1.0)
            sender.sendto("\n".join(lines).encode(), self._address)

    def beat(self) -> None:
        """To be called from the loop that must go on turning: `WATCHDOG=1` twice in the time that systemd allows."""
        if self._every_s and time.monotonic() >= self._due:
            self._due = time.monotonic() + self._every_s
            self.tell("WATCHDOG=1")


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
    fell: float = 0.0  # monotonic time of the end that it has not recovered from; 0: it stands
    falls: int = 0  # since then
    needed: float = 0.0  # seconds it must live to have recovered
    stopped: bool = False  # by a SIGSTOP of somebody else

    @property
    def trouble(self) -> str:
        """What is wrong with it now, in words; empty when all is well."""
        name = self.child.name
        if self.stopped:
            return f"{name} stands still: somebody has stopped it"
        if self.process is None and self.fell:
            return f"{name} is down ({self.last_exit})"
        return f"{name} keeps ending ({self.last_exit})" if self.falls >= OFTEN else ""


class Supervisor:
    """Starts children in order, restarts the fallen, writes `<state>/status.json`, ends them in reverse order.

    The children are told to end when this process dies, even by kill -9 (Linux). What goes wrong, and that it is over, is
    told once, to `tell`, to `<state>/logs/daemon.log` and to the incidents.

    Args:
        info: more entries for status.json, such as the address a daemon serves.
        tell: takes a line for whoever started the daemon.
        stands_still: what does not go on while the disk is full, as a sentence.

    Attributes:
        headline: what the daemon does now, one line without its troubles; systemd shows it.
        incidents: for what the daemon watches itself.
    """

    def __init__(
        self,
        children: Sequence[Child],
        state: Path,
        info: Mapping[str, object] | None = None,
        tell: Callable[[str], None] = say,
        stands_still: str = "Nothing can be kept there, so its parts may stop.",
    ) -> None:
        self.state = state
        self.info = dict(info or {})
        self.headline = "starting"
        self.incidents = Incidents(state, str(self.info.get("site", "")))
        self.log = state / "logs" / "daemon.log"
        self._tell = tell
        self._lines = Lines(self.log, LOG_LIMIT)
        self._stands_still = stands_still
        self._running = [_Running(child) for child in children]
        self._stop = threading.Event()
        self._since = time.time()
        self._ended = 0.0
        self._service = Service()
        self._ready = False
        self._said = ""  # to systemd, last
        self._room_due = self._still_due = self._logs_due = 0.0
        self._no_room, self._no_room_since = "", 0.0

    def stop(self, signal_number: int | None = None, frame: FrameType | None = None) -> None:
        """Ask `run` to end; also the handler of SIGTERM and SIGINT."""
        self._stop.set()

    @property
    def starts(self) -> int:
        """How often a child was started, of all together: grows when one has ended."""
        return sum(one.starts for one in self._running)

    @property
    def is_ready(self) -> bool:
        """Whether it was said to serve."""
        return self._ready

    @property
    def all_up(self) -> bool:
        """Whether every child runs at this moment."""
        return all(one.process is not None for one in self._running)

    @property
    def troubles(self) -> list[str]:
        """What is wrong now, in words."""
        full = [f"{self.state}: {self._no_room}"] if self._no_room else []
        return [*full, *(one.trouble for one in self._running if one.trouble)]

    def wake(self) -> None:
        """Start at once what waits after a failure: something it may have failed for has changed."""
        for one in self._running:
            one.due, one.pause = 0.0, FIRST_PAUSE_S

    def tell(self, text: str) -> None:
        """A line to whoever started the daemon, and with the time to its log."""
        self._tell(text)
        self._write(text)

    def ready(self) -> None:
        """The daemon serves: systemd is told, once."""
        if not self._ready:
            self._ready = True
            self._service.tell("READY=1")
            self._write("ready")
            self.write_status()

    def run(self, tick: Callable[[], None] = lambda: None) -> None:
        """Block until SIGTERM, SIGINT or `stop`; return within 10 s of it with every child gone.

        Args:
            tick: called five times a second, for what the daemon watches itself.

        Raises:
            DeploymentError: another daemon holds the state folder, or a program cannot be executed at all.
        """
        with Lock(self.state):
            before = self._take_signals()
            try:
                self._since = time.time()
                self._logs_due = time.monotonic() + LOG_CHECK_S
                self._look_back()
                while not self._stop.is_set():
                    self._service.beat()
                    try:
                        self._turn(tick)
                        self.incidents.note("recovery", "the daemon does all it should again", about="turn")
                    except OSError as error:  # a disk, or too many open files: nothing that a restart would mend
                        self._room_due = 0.0
                        self._note(
                            f"the daemon could not do all it should ({error})", "It tries again by itself.", "turn"
                        )
                    self._stop.wait(TICK_S)
            finally:
                self._service.tell("STOPPING=1", "STATUS=ending its parts")
                self._end_all()
                self._ended = time.time()
                self.write_status()
                self._write("ended")
                for number, handler in before.items():
                    signal.signal(number, handler)

    def _turn(self, tick: Callable[[], None]) -> None:
        now = time.monotonic()
        changed = [self._tend(one) for one in self._running]
        if now >= self._still_due:
            self._still_due = now + STILL_S
            if disk.is_low(self.state):
                self._room_due = 0.0
            changed += [self._watch(one) for one in self._running]
        if now >= self._logs_due:
            self._logs_due = now + LOG_CHECK_S
            for one in self._running:
                _set_aside(one.child.log)
        if now >= self._room_due:
            changed.append(self._look_at_disk())
        if any(changed):
            self.write_status()
        try:
            tick()
        except TrunklineError as error:  # a file that somebody is editing, say: its parts run on
            raise OSError(str(error)) from error
        said = "; ".join([*self.troubles, self.headline])
        if said != self._said:
            self._said = said
            self._service.tell(f"STATUS={said}")

    def _look_back(self) -> None:
        """Say it where the daemon before this one was killed; what it had not seen mended is over with its parts."""
        self._write(f"started, pid {os.getpid()}")
        for name in (one.child.name for one in self._running):
            for about in (name, f"{name} stopped"):
                self.incidents.note("recovery", f"{name} is started with the daemon", about=about)
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            before = json.loads((self.state / "status.json").read_bytes())
            if not before.get("ended") and before["pid"] != os.getpid():
                text = f"the daemon (pid {before['pid']}, since {before['since']}) had ended without a farewell and was started again"
                remedy = "Nothing to do: it goes on from what is on disk. A kill -9, a power cut or too little memory ends it like this."
                self.incidents.note("recovery", text, remedy=remedy)
                self._write(text)

    def _take_signals(self) -> dict[int, Any]:
        if threading.current_thread() is not threading.main_thread():
            return {}  # Python gives handlers to the main thread only; who runs this in another calls `stop`
        return {number: signal.signal(number, self.stop) for number in (signal.SIGTERM, signal.SIGINT)}

    def _tend(self, one: _Running) -> bool:
        """Start or reap one child; True when something changed."""
        now = time.monotonic()
        if one.process is not None:
            code = one.process.poll()
            if code is not None:
                self._reap(one, _exit_text(code))
                return True
            if one.fell and now - one.started >= one.needed:
                self._recovered(one)
                return True
            return False
        if now < one.due or (one.starts and not one.child.restart):
            return False
        if one.child.needs and not one.starts and not accepts(one.child.needs):
            return False
        self._start(one)
        return True

    def _reap(self, one: _Running, how: str) -> None:
        """After an end, or a start that failed: when the next is due, and a word about it."""
        now = time.monotonic()
        one.process, one.last_exit, one.stopped = None, how, False
        if one.starts and now - one.started >= STEADY_S:
            one.pause = FIRST_PAUSE_S
        one.due = now + one.pause
        one.pause = min(2 * one.pause, LONGEST_PAUSE_S)
        name, log = one.child.name, one.child.log
        if not one.child.restart:
            self._write(f"{name} ended with {how}; it is not restarted (log: {log})")
            return
        one.fell, one.falls = one.fell or now, one.falls + 1
        calm = not one.needed or (one.starts and now - one.started >= CALM_S)
        one.needed = RECOVERED_S if calm else min(2 * one.needed, CALM_S)
        text = f"{name} was killed ({how})" if how.startswith("SIG") else f"{name} ended ({how})"
        remedy = f"It is started again by itself. Its log: {log}"
        if one.falls >= OFTEN:
            text = f"{name} keeps ending ({how}), {OFTEN} times in a row"
            remedy = f"It is tried again every {LONGEST_PAUSE_S:.0f} s; its log says why: {log}"
        self._note(text, remedy, name)
        self._write(f"{name} ended with {how}; it starts again in {one.due - now:.1f} s")

    def _recovered(self, one: _Running) -> None:
        name = one.child.name
        times = f"{one.falls} starts" if one.falls > 1 else "a start"
        text = f"{name} runs again, after {times} and {one.started - one.fell:.1f} s without it"
        one.fell, one.falls = 0.0, 0
        self._over(text, name)

    def _watch(self, one: _Running) -> bool:
        """Whether it has changed that somebody has stopped this child; a stopped process does nothing and does not end."""
        stopped = one.process is not None and _is_stopped(one.process.pid)
        if stopped == one.stopped:
            return False
        one.stopped = stopped
        name, about = one.child.name, f"{one.child.name} stopped"
        if stopped and one.process is not None:
            self._note(
                f"{name} stands still: somebody has stopped it (SIGSTOP)",
                f"kill -CONT {one.process.pid} lets it go on; kill -KILL {one.process.pid} has another started in its place.",
                about,
            )
        else:
            self._over(f"{name} does not stand still any more", about)
        return True

    def _look_at_disk(self) -> bool:
        """Look whether the state folder takes a file; True when that has changed. Said once when it does not, and once when it does."""
        now = time.monotonic()
        problem = disk.look(self.state)
        low = disk.is_low(self.state)
        self._room_due = now + (NO_ROOM_S if problem or low else ROOM_S)
        was, self._no_room = self._no_room, problem
        if problem and not was:
            self._no_room_since = now
            text = f"{self.state}: {problem} ({disk.in_words(self.state)}). {self._stands_still}"
            self._note(
                text, "Free space there, or mend the disk: everything goes on by itself, without a restart.", "disk"
            )
        elif was and not problem:
            lasted = now - self._no_room_since
            self._over(
                f"{self.state}: there is room again ({disk.in_words(self.state)}), after {lasted:.0f} s; all goes on",
                "disk",
            )
            self.wake()
        elif not problem:
            self.incidents.flush()
            self._lines.flush()
            self.incidents.note("recovery", f"{self.state}: there is room", about="disk")  # since a daemon before this
            if low:
                text = f"{self.state}: the disk is nearly full"
                self._note(text, f"Free space there before it is; {disk.in_words(self.state)} now.", "low disk", "note")
            else:
                self.incidents.note("recovery", f"{self.state}: the disk is not nearly full any more", about="low disk")
        return problem != was

    def _note(self, text: str, remedy: str, about: str, kind: Kind = "failure") -> None:
        if self.incidents.note(kind, text, remedy=remedy, about=about):
            self.tell(sentences(text, remedy))

    def _over(self, text: str, about: str) -> None:
        if self.incidents.note("recovery", text, about=about):
            self.tell(sentences(text))

    def _write(self, text: str) -> None:
        self._lines.append(f"{datetime.now(UTC):%Y-%m-%d %H:%M:%S} {text}")

    def _start(self, one: _Running) -> None:
        """Start one child, or put it off: without a log, or without memory for another process, it is tried again later."""
        child = one.child
        try:
            child.log.parent.mkdir(parents=True, exist_ok=True)
            _set_aside(child.log)
            log = child.log.open("ab")
        except OSError as error:
            self._room_due = 0.0  # it says why, if it is the disk
            self._reap(one, f"no log: {error.strerror}")
            return
        with log:
            try:
                one.process = subprocess.Popen(
                    child.argv,
                    env={name: value for name, value in child.env.items() if name not in OURS},
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    preexec_fn=_die_with_parent(),
                )
            except OSError as error:
                if one.starts or error.errno in (errno.EAGAIN, errno.ENOMEM, errno.EMFILE, errno.ENFILE):
                    self._reap(one, f"could not be started: {error.strerror}")
                    return
                raise DeploymentError(
                    f"{child.name}: {child.argv[0]} cannot be executed ({error.strerror}). "
                    "Install Trunkline again into this environment: `pip install -e .` or `make setup`."
                ) from None
        one.started, one.since, one.starts = time.monotonic(), time.time(), one.starts + 1
        self._write(f"{child.name} started, pid {one.process.pid}")

    def _end_all(self) -> None:
        """In reverse order, each after the one before it has gone, so that what serves outlives what it serves."""
        end = time.monotonic() + GRACE_S
        for place, one in reversed(list(enumerate(self._running))):
            if one.process is None:
                continue
            one.process.terminate()
            one.process.send_signal(signal.SIGCONT)  # who was stopped hears the request only when he goes on
            _wait(one.process, end - 1.5 * place)  # leave every earlier child a second and a half
        for one in self._running:
            if one.process is None:
                continue
            if not _wait(one.process, end):
                self._note(f"{one.child.name} did not end within {GRACE_S:.0f} s and was killed", "Nothing to do.", "")
                one.process.kill()
            one.last_exit = _exit_text(one.process.wait())
            one.process = None

    def write_status(self) -> None:
        """Put `status.json` in the state folder as things stand; where the disk takes nothing, the former one stays."""
        record = {
            **self.info,
            "pid": os.getpid(),
            "since": _iso(self._since),
            "ended": _iso(self._ended) if self._ended else "",
            "ready": self._ready,
            "headline": self.headline,
            "troubles": self.troubles,
            "log": str(self.log),
            "children": [
                {
                    "name": one.child.name,
                    "pid": one.process.pid if one.process is not None else None,
                    "since": _iso(one.since) if one.starts else "",
                    "restarts": max(0, one.starts - 1),
                    "last_exit": one.last_exit,
                    "trouble": one.trouble,
                    "log": str(one.child.log),
                }
                for one in self._running
            ],
        }
        try:
            write_atomic(self.state / "status.json", json.dumps(record, indent=2).encode())
        except StorageError:
            self._room_due = 0.0  # it says why


def _set_aside(log: Path) -> None:
    """Copy a log that grew too large to `<log>.1` and empty it: whoever appends to it writes on, at its new end."""
    aside = log.with_name(log.name + ".1")
    try:
        if log.stat().st_size <= LOG_LIMIT:
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


def _wait(process: subprocess.Popen[bytes], end: float) -> bool:
    """Wait until `end` on the monotonic clock; True when the process has gone."""
    try:
        process.wait(max(0.05, end - time.monotonic()))
    except subprocess.TimeoutExpired:
        return False
    return True


def _exit_text(code: int) -> str:
    if code >= 0:
        return f"exit code {code}"
    try:
        return signal.Signals(-code).name
    except ValueError:  # most signals of real time have no name
        return f"SIG{-code}"


def _is_stopped(pid: int) -> bool:
    """Whether a process was stopped by a signal; False where that cannot be seen (other systems than Linux)."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "T"
    except (OSError, IndexError):
        return False


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
