"""One child process of a daemon: its start, its end, and when it starts again."""

import ctypes
import errno
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from trunkline.errors import DeploymentError
from trunkline.runtime.log_files import rotate_in_place
from trunkline.runtime.programs import accepts_connections
from trunkline.runtime.systemd import remove_variables

OFTEN = 4  # starts in a row that fail: from here on the child counts as one that keeps ending
PR_SET_PDEATHSIG = 1  # linux/prctl.h
EXHAUSTED = (errno.EAGAIN, errno.ENOMEM, errno.EMFILE, errno.ENFILE)  # a later start may succeed


@dataclass(frozen=True)
class Timing:
    """The clocks of a supervisor, in seconds, and the size of its logs.

    Args:
        first_pause_s, longest_pause_s: between an end and the next start; the pause doubles while starts fail.
        steady_s: a child that lived so long has its first pause again.
        recovered_s: a restarted child that lives so long has recovered; the time doubles at each end soon after.
        calm_s: upper limit of that time; a child that lived so long has the first recovery time again.
        grace_s: from the request to end until the kill; systemd's own default would allow 90.
        tick_s: between two turns of the supervisor's loop.
        log_limit: bytes above which a log is rotated; the SuperLink writes about 3 MB a day and idle site.
        log_check_s: between two looks at the size of the logs.
        disk_s, disk_full_s: between two attempts to write; the second while the disk is full or nearly so.
        stopped_s: between two looks at whether somebody has stopped a child, and at the free space of the disk.
    """

    first_pause_s: float = 0.5
    longest_pause_s: float = 30.0
    steady_s: float = 60.0
    recovered_s: float = 5.0
    calm_s: float = 600.0
    grace_s: float = 8.0
    tick_s: float = 0.2
    log_limit: int = 10 << 20
    log_check_s: float = 60.0
    disk_s: float = 10.0
    disk_full_s: float = 1.0
    stopped_s: float = 1.0


@dataclass(frozen=True)
class Child:
    """A process to keep running.

    Args:
        log: stdout and stderr are appended here; above 10 MiB its content is moved to `<log>.1`.
        restart: start the process again whenever it ends, however it ended.
        needs: host:port that must accept a connection before the first start; empty: nothing. Flower's own parts wait
            for one another with pauses that grow to seconds.
    """

    name: str
    argv: Sequence[str]
    env: Mapping[str, str]
    log: Path
    restart: bool = True
    needs: str = ""


class StartFailedError(Exception):
    """A child could not be started now; its text is the cause. A later start may succeed."""


class ChildProcess:
    """One child over all its starts.

    Attributes:
        process: the running process; None while there is none.
        started: monotonic time of the last start; 0: none so far.
        starts: how often the child was started.
        last_exit: how it ended last, `exit code 3` or `SIGKILL`.
        failed_at: monotonic time of the end that it has not recovered from; 0: it is well.
        failures: ends since then.
        is_stopped: somebody else has sent it SIGSTOP.
    """

    def __init__(self, child: Child, timing: Timing) -> None:
        self.child, self.timing = child, timing
        self.name = child.name
        self.process: subprocess.Popen[bytes] | None = None
        self.started = 0.0
        self.starts = 0
        self.last_exit = ""
        self.failed_at = 0.0
        self.failures = 0
        self.is_stopped = False
        self._started_at = 0.0  # Unix time of the last start
        self._due = 0.0  # monotonic time of the next start
        self._pause = timing.first_pause_s
        self._recovery_s = 0.0  # seconds it must live to have recovered

    @property
    def trouble(self) -> str:
        """What is wrong with the child now, in words; empty when all is well."""
        if self.is_stopped:
            return f"{self.name} stands still: somebody has stopped it"
        if self.process is None and self.failed_at:
            return f"{self.name} is down ({self.last_exit})"
        return f"{self.name} keeps ending ({self.last_exit})" if self.keeps_ending else ""

    @property
    def keeps_ending(self) -> bool:
        return self.failures >= OFTEN

    @property
    def is_due(self) -> bool:
        """Whether the child should be started now."""
        if self.process is not None or time.monotonic() < self._due:
            return False
        if self.starts:
            return self.child.restart
        return not self.child.needs or accepts_connections(self.child.needs)

    @property
    def has_recovered(self) -> bool:
        """Whether a child that ended has run long enough since."""
        return self.failed_at > 0.0 and time.monotonic() - self.started >= self._recovery_s

    @property
    def pause_s(self) -> float:
        """Seconds until the next start."""
        return self._due - time.monotonic()

    def start(self) -> None:
        """Start the process, its output appended to its log.

        Raises:
            StartFailedError: there is no log, or no memory for another process.
            DeploymentError: the program cannot be executed at all.
        """
        log_path = self.child.log
        try:
            log_path.parent.mkdir(parents=True, exist_ok=True)
            rotate_in_place(log_path, self.timing.log_limit)
            log = log_path.open("ab")
        except OSError as error:
            raise StartFailedError(f"no log: {error.strerror}") from error
        with log:
            try:
                self.process = subprocess.Popen(
                    self.child.argv,
                    env=remove_variables(self.child.env),
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    preexec_fn=_die_with_parent(),
                )
            except OSError as error:
                if self.starts or error.errno in EXHAUSTED:
                    raise StartFailedError(f"could not be started: {error.strerror}") from error
                raise DeploymentError(
                    f"{self.name}: {self.child.argv[0]} cannot be executed ({error.strerror}). "
                    "Install Trunkline again into this environment: `pip install -e .` or `make setup`."
                ) from None
        self.started, self._started_at = time.monotonic(), time.time()
        self.starts += 1

    def poll(self) -> str:
        """How the process ended, `exit code 3` say; empty while it runs."""
        code = self.process.poll() if self.process is not None else None
        return "" if code is None else describe_exit(code)

    def record_end(self, cause: str) -> None:
        """After an end, or a start that failed: when the next start is due, and what counts as a recovery."""
        now, timing = time.monotonic(), self.timing
        lived = now - self.started if self.starts else 0.0
        self.process, self.last_exit, self.is_stopped = None, cause, False
        if lived >= timing.steady_s:
            self._pause = timing.first_pause_s
        self._due = now + self._pause
        self._pause = min(2 * self._pause, timing.longest_pause_s)
        if not self.child.restart:
            return
        self.failed_at, self.failures = self.failed_at or now, self.failures + 1
        is_first = not self._recovery_s or lived >= timing.calm_s
        self._recovery_s = timing.recovered_s if is_first else min(2 * self._recovery_s, timing.calm_s)

    def record_recovery(self) -> None:
        self.failed_at, self.failures = 0.0, 0

    def retry_now(self) -> None:
        """Start without a pause, with the shortest pauses again: what made a start fail may have changed."""
        self._due, self._pause = 0.0, self.timing.first_pause_s

    def update_stopped(self) -> bool:
        """Look whether the process is stopped; True when that has changed. A stopped process does nothing and never ends."""
        was_stopped = self.is_stopped
        self.is_stopped = self.process is not None and _is_stopped(self.process.pid)
        return self.is_stopped != was_stopped

    def rotate_log(self) -> None:
        rotate_in_place(self.child.log, self.timing.log_limit)

    def request_end(self, deadline: float) -> None:
        """Ask the process to end, and wait for it until `deadline` on the monotonic clock."""
        if self.process is None:
            return
        self.process.terminate()
        self.process.send_signal(signal.SIGCONT)  # a stopped process receives the request only when it continues
        self._wait(deadline)

    def ensure_end(self, deadline: float) -> bool:
        """Wait until `deadline`, then kill the process; whether it ended by itself."""
        if self.process is None:
            return True
        has_ended = self._wait(deadline)
        if not has_ended:
            self.process.kill()
        self.last_exit = describe_exit(self.process.wait())
        self.process = None
        return has_ended

    def _wait(self, deadline: float) -> bool:
        if self.process is None:
            return True
        try:
            self.process.wait(max(0.05, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            return False
        return True

    def describe(self) -> dict[str, Any]:
        """The child's entry of `status.json`."""
        return {
            "name": self.name,
            "pid": self.process.pid if self.process is not None else None,
            "since": format_time(self._started_at) if self.starts else "",
            "restarts": max(0, self.starts - 1),
            "last_exit": self.last_exit,
            "trouble": self.trouble,
            "log": str(self.child.log),
        }


def format_time(moment: float) -> str:
    """Unix seconds as ISO 8601 in UTC."""
    return datetime.fromtimestamp(moment, UTC).isoformat(timespec="seconds")


def describe_exit(code: int) -> str:
    """A return code of `subprocess` in words: `exit code 3`, `SIGKILL`."""
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


def _die_with_parent() -> Callable[[], None] | None:
    """For the child between fork and exec: SIGTERM when its parent dies. Everything is looked up before the fork."""
    if not sys.platform.startswith("linux"):
        return None
    prctl = ctypes.CDLL(None, use_errno=True).prctl
    parent = os.getpid()

    def request_signal() -> None:
        prctl(PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)
        if os.getppid() != parent:  # the parent died in between
            os._exit(1)

    return request_signal
