"""A daemon's child processes: started in order, restarted when they end, ended in reverse order."""

import contextlib
import json
import os
import signal
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from types import FrameType
from typing import Any

from trunkline.errors import StorageError, TrunklineError
from trunkline.runtime import disk
from trunkline.runtime.child import OFTEN, Child, ChildProcess, StartFailedError, Timing, format_time
from trunkline.runtime.incidents import Incidents, Kind, join_sentences
from trunkline.runtime.lock import Lock
from trunkline.runtime.log_files import LineLog
from trunkline.runtime.programs import print_line
from trunkline.runtime.storage import write_atomic
from trunkline.runtime.systemd import Service


class Supervisor:
    """Starts children in order, restarts those that end, writes `<state>/status.json`, ends them in reverse order.

    The children end when this process dies, even by kill -9 (Linux). Each failure and each recovery is reported once:
    to `emit`, to `<state>/logs/daemon.log` and to the incidents.

    Args:
        info: more entries for status.json, such as the address a daemon serves.
        emit: takes a line for the person who started the daemon.
        disk_full_effect: what stops while the disk is full, as a sentence.
        timing: pauses, time limits and the size of logs.

    Attributes:
        headline: what the daemon does now, one line without its troubles; systemd shows it.
        incidents: for what the daemon watches itself.
    """

    def __init__(
        self,
        children: Sequence[Child],
        state: Path,
        info: Mapping[str, object] | None = None,
        emit: Callable[[str], None] = print_line,
        disk_full_effect: str = "Nothing can be kept there, so its parts may stop.",
        timing: Timing = Timing(),  # noqa: B008 - frozen
    ) -> None:
        self.state = state
        self.info = dict(info or {})
        self.headline = "starting"
        self.incidents = Incidents(state, str(self.info.get("site", "")))
        self.log = state / "logs" / "daemon.log"
        self.timing = timing
        self._emit = emit
        self._lines = LineLog(self.log, timing.log_limit)
        self._disk_full_effect = disk_full_effect
        self._children = [ChildProcess(child, timing) for child in children]
        self._stop = threading.Event()
        self._since = time.time()
        self._ended = 0.0
        self._service = Service()
        self._is_ready = False
        self._last_notified = ""  # the status line that systemd has
        self._disk_due = self._stopped_due = self._logs_due = 0.0
        self._disk_problem, self._disk_problem_since = "", 0.0

    def stop(self, signal_number: int | None = None, frame: FrameType | None = None) -> None:
        """Ask `run` to end; also the handler of SIGTERM and SIGINT."""
        self._stop.set()

    @property
    def starts(self) -> int:
        """How often a child was started, of all together: grows when one has ended."""
        return sum(child.starts for child in self._children)

    @property
    def is_ready(self) -> bool:
        """Whether the daemon has been reported to serve."""
        return self._is_ready

    @property
    def all_running(self) -> bool:
        """Whether every child runs at this moment."""
        return all(child.process is not None for child in self._children)

    @property
    def troubles(self) -> list[str]:
        """What is wrong now, in words."""
        disk_trouble = [f"{self.state}: {self._disk_problem}"] if self._disk_problem else []
        return [*disk_trouble, *(child.trouble for child in self._children if child.trouble)]

    def retry_now(self) -> None:
        """Start at once the children that wait after a failure: its cause may have gone."""
        for child in self._children:
            child.retry_now()

    def emit(self, text: str) -> None:
        """Report a line to the person who started the daemon, and write it to the daemon's log."""
        self._emit(text)
        self._write_log(text)

    def mark_ready(self) -> None:
        """The daemon serves: report it to systemd, once."""
        if not self._is_ready:
            self._is_ready = True
            self._service.notify("READY=1")
            self._write_log("ready")
            self.write_status()

    def run(self, tick: Callable[[], None] = lambda: None) -> None:
        """Block until SIGTERM, SIGINT or `stop`; return within 10 s of it with every child gone.

        Args:
            tick: called five times a second, for what the daemon watches itself.

        Raises:
            DeploymentError: another daemon holds the state folder, or a program cannot be executed at all.
        """
        with Lock(self.state):
            handlers = self._take_signals()
            try:
                self._since = time.time()
                self._logs_due = time.monotonic() + self.timing.log_check_s
                self._report_start()
                while not self._stop.is_set():
                    self._service.beat()
                    try:
                        self._turn(tick)
                        self.incidents.note("recovery", "the daemon does all it should again", about="turn")
                    except OSError as error:  # a disk, or too many open files: nothing that a restart would mend
                        self._disk_due = 0.0
                        text = f"the daemon could not do all it should ({error})"
                        self._report(text, "It tries again by itself.", "turn")
                    self._stop.wait(self.timing.tick_s)
            finally:
                self._service.notify("STOPPING=1", "STATUS=ending its parts")
                self._end_children()
                self._ended = time.time()
                self.write_status()
                self._write_log("ended")
                for name, handler in handlers.items():
                    signal.signal(name, handler)

    def write_status(self) -> None:
        """Write `status.json` into the state folder. On a full disk the former file stays."""
        record = {
            **self.info,
            "pid": os.getpid(),
            "since": format_time(self._since),
            "ended": format_time(self._ended) if self._ended else "",
            "ready": self._is_ready,
            "headline": self.headline,
            "troubles": self.troubles,
            "log": str(self.log),
            "children": [child.describe() for child in self._children],
        }
        try:
            write_atomic(self.state / "status.json", json.dumps(record, indent=2).encode())
        except StorageError:
            self._disk_due = 0.0  # the disk check reports the reason

    def _turn(self, tick: Callable[[], None]) -> None:
        now = time.monotonic()
        changes = [self._update(child) for child in self._children]
        if now >= self._stopped_due:
            self._stopped_due = now + self.timing.stopped_s
            if disk.is_low(self.state):
                self._disk_due = 0.0
            changes += [self._check_stopped(child) for child in self._children]
        if now >= self._logs_due:
            self._logs_due = now + self.timing.log_check_s
            for child in self._children:
                child.rotate_log()
        if now >= self._disk_due:
            changes.append(self._check_disk())
        if any(changes):
            self.write_status()
        try:
            tick()
        except TrunklineError as error:  # a file that somebody is editing, say: the children run on
            raise OSError(str(error)) from error
        status = "; ".join([*self.troubles, self.headline])
        if status != self._last_notified:
            self._last_notified = status
            self._service.notify(f"STATUS={status}")

    def _report_start(self) -> None:
        """Close the failures of the daemon before this one, and report where it was killed."""
        self._write_log(f"started, pid {os.getpid()}")
        for name in (child.name for child in self._children):
            for about in (name, f"{name} stopped"):
                self.incidents.note("recovery", f"{name} is started with the daemon", about=about)
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            last = json.loads((self.state / "status.json").read_bytes())
            if not last.get("ended") and last["pid"] != os.getpid():
                text = f"the daemon (pid {last['pid']}, since {last['since']}) was killed and has been started again"
                remedy = "Nothing to do: it goes on from what is on disk. A kill -9, a power cut or too little memory ends it like this."
                self.incidents.note("recovery", text, remedy=remedy)
                self._write_log(text)

    def _take_signals(self) -> dict[int, Any]:
        if threading.current_thread() is not threading.main_thread():
            return {}  # Python gives handlers to the main thread only; a caller in another thread uses `stop`
        return {name: signal.signal(name, self.stop) for name in (signal.SIGTERM, signal.SIGINT)}

    def _update(self, child: ChildProcess) -> bool:
        """Start the child, or take note of its end or recovery; True when something changed."""
        if child.process is not None:
            if cause := child.poll():
                self._handle_end(child, cause)
                return True
            if child.has_recovered:
                self._report_recovery(child)
                return True
            return False
        if not child.is_due:
            return False
        try:
            child.start()
        except StartFailedError as error:
            self._disk_due = 0.0  # the disk check reports the reason, if it is the disk
            self._handle_end(child, str(error))
        else:
            self._write_log(f"{child.name} started, pid {child.process.pid if child.process else 0}")
        return True

    def _handle_end(self, child: ChildProcess, cause: str) -> None:
        """After an end, or a start that failed: report it, and say when the next start is due."""
        child.record_end(cause)
        name, log = child.name, child.child.log
        if not child.child.restart:
            self._write_log(f"{name} ended with {cause}; it is not restarted (log: {log})")
            return
        text = f"{name} was killed ({cause})" if cause.startswith("SIG") else f"{name} ended ({cause})"
        remedy = f"It is started again by itself. Its log: {log}"
        if child.keeps_ending:
            text = f"{name} keeps ending ({cause}), {OFTEN} times in a row"
            remedy = f"It is tried again every {self.timing.longest_pause_s:.0f} s; its log says why: {log}"
        self._report(text, remedy, name)
        self._write_log(f"{name} ended with {cause}; it starts again in {child.pause_s:.1f} s")

    def _report_recovery(self, child: ChildProcess) -> None:
        times = f"{child.failures} starts" if child.failures > 1 else "a start"
        text = f"{child.name} runs again, after {times} and {child.started - child.failed_at:.1f} s without it"
        child.record_recovery()
        self._report_over(text, child.name)

    def _check_stopped(self, child: ChildProcess) -> bool:
        """Report that somebody has stopped this child, or that it continues; True when either has changed."""
        if not child.update_stopped():
            return False
        name, about = child.name, f"{child.name} stopped"
        if child.is_stopped and child.process is not None:
            pid = child.process.pid
            self._report(
                f"{name} stands still: somebody has stopped it (SIGSTOP)",
                f"kill -CONT {pid} lets it go on; kill -KILL {pid} has another started in its place.",
                about,
            )
        else:
            self._report_over(f"{name} does not stand still any more", about)
        return True

    def _check_disk(self) -> bool:
        """Look whether the state folder takes a file, and report a change once; True when it has changed."""
        now = time.monotonic()
        problem = disk.find_problem(self.state)
        is_low = disk.is_low(self.state)
        self._disk_due = now + (self.timing.disk_full_s if problem or is_low else self.timing.disk_s)
        last_problem, self._disk_problem = self._disk_problem, problem
        if problem and not last_problem:
            self._disk_problem_since = now
            text = f"{self.state}: {problem} ({disk.describe_free(self.state)}). {self._disk_full_effect}"
            remedy = "Free space there, or mend the disk: everything goes on by itself, without a restart."
            self._report(text, remedy, "disk")
        elif last_problem and not problem:
            free, lasted = disk.describe_free(self.state), now - self._disk_problem_since
            self._report_over(
                f"{self.state}: there is room again ({free}), after {lasted:.0f} s; all goes on",
                "disk",
            )
            self.retry_now()
        elif not problem:
            self.incidents.flush()
            self._lines.flush()
            self.incidents.note("recovery", f"{self.state}: there is room", about="disk")  # since a daemon before this
            self._check_low_disk(is_low)
        return problem != last_problem

    def _check_low_disk(self, is_low: bool) -> None:
        if is_low:
            text = f"{self.state}: the disk is nearly full"
            remedy = f"Free space there before it is; {disk.describe_free(self.state)} now."
            self._report(text, remedy, "low disk", "note")
        else:
            self.incidents.note("recovery", f"{self.state}: the disk is not nearly full any more", about="low disk")

    def _report(self, text: str, remedy: str, about: str, kind: Kind = "failure") -> None:
        if self.incidents.note(kind, text, remedy=remedy, about=about):
            self.emit(join_sentences(text, remedy))

    def _report_over(self, text: str, about: str) -> None:
        if self.incidents.note("recovery", text, about=about):
            self.emit(join_sentences(text))

    def _write_log(self, text: str) -> None:
        self._lines.append(f"{datetime.now(UTC):%Y-%m-%d %H:%M:%S} {text}")

    def _end_children(self) -> None:
        """In reverse order, each after the one before it has gone, so that what serves outlives what it serves."""
        deadline = time.monotonic() + self.timing.grace_s
        for index, child in reversed(list(enumerate(self._children))):
            child.request_end(deadline - 1.5 * index)  # leave every earlier child a second and a half
        for child in self._children:
            if not child.ensure_end(deadline):
                text = f"{child.name} did not end within {self.timing.grace_s:.0f} s and was killed"
                self._report(text, "Nothing to do.", "")
