"""Keeps every run of the server going until it ends by itself: submits it, watches it, submits it again.

Flower ends a run when one of its processes dies: the ServerApp, the process that starts ServerApps, or a SuperLink that is
down for a minute. Nothing in Flower starts that run again. The progress of a run is on disk, so a new submission resumes
it. A ServerApp that ends by itself, well or not, writes its outcome into the run's folder.
"""

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from trunkline.errors import DeploymentError, TrunklineError
from trunkline.flower.control import run_status, stop_run, submit
from trunkline.runtime.incidents import Incidents, Kind
from trunkline.runtime.storage import Shelf
from trunkline.server.operations.run_store import RunRecord, RunStore, lock_holder, read_outcome

TRIES = 12  # submissions in a row without a new round until a run is given up
FORMER = 20  # ids of earlier submissions that are kept, to tell them from runs that somebody else submitted

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Timing:
    """Waits of the supervisor, in seconds."""

    look_s: float = 0.5  # between two looks at the list of runs
    start_s: float = 45.0  # from a submission until its ServerApp must have started; it loads torch, on a busy machine
    first_pause_s: float = 0.5  # before the first new submission; doubles with each failure
    longest_pause_s: float = 60.0

    def pause_s(self, tries: int) -> float:
        """How long to wait before submission number `tries` + 1."""
        return min(self.first_pause_s * 2.0 ** (tries - 1), self.longest_pause_s)


class RunSupervisor:
    """Call `tick` often; the work is done in a thread of its own, because the SuperLink may take its time.

    Args:
        state: the server's state folder. address, ca: its SuperLink, see `flower.control.submit`.
        app: folder of the app that is submitted.
        emit: takes a sentence with the run's name at every failure and recovery.
        incidents: gets the same.
    """

    def __init__(
        self,
        state: Path,
        address: str,
        ca: Path | None,
        app: Path,
        emit: Callable[[str], None] = lambda text: None,
        incidents: Incidents | None = None,
        timing: Timing = Timing(),
    ) -> None:
        self.incidents = incidents
        self.state = state
        self.address = address
        self.ca = ca
        self.app = app
        self.emit = emit
        self.timing = timing
        self.store = RunStore(state)
        self._thread: threading.Thread | None = None
        self._due = 0.0
        self._next_submission: dict[str, float] = {}  # key -> monotonic time
        self._submitted: dict[str, float] = {}  # key -> monotonic time
        self._reported: set[str] = set()

    def tick(self) -> None:
        """Start a look when it is time."""
        if self._thread is not None and self._thread.is_alive():
            return
        if time.monotonic() >= self._due:
            self._due = time.monotonic() + self.timing.look_s
            self._thread = threading.Thread(target=self.look, name="run-supervisor", daemon=True)
            self._thread.start()

    def look(self) -> None:
        """Check every unfinished run, and submit or end it where that is due."""
        for path in self.store.damaged():
            self._report_once(f"{path}: damaged, so this run is not supervised. Restore a backup, or remove the file.")
        for record in self.store.records():
            if not record.open:
                continue
            try:
                self._advance(record)
            except DeploymentError as error:  # the SuperLink is down: its supervisor starts it again
                logger.info("%s: %s", record.key, error)
            except TrunklineError as error:  # a full disk, say; checked again in a moment
                self._report_once(f"{record.name}: {error}")
            except Exception:  # the other runs still need their supervisor
                logger.exception("%s", record.key)

    def _advance(self, record: RunRecord) -> None:
        out = Path(record.out)
        if record.stop:
            self._stop(record)
            return
        if record.state in ("wanted", "waiting"):
            if time.monotonic() >= self._next_submission.get(record.key, 0.0):
                self._submit(record, out)
            return
        running, run_id = lock_holder(out)
        ended = read_outcome(out, record.run_id)
        if ended is not None and not running:
            self._end(record, ended)
            return
        status, details = self._status(record.run_id)
        if status.startswith("finished"):
            if running and run_id == record.run_id:
                return  # it is writing its outcome
            if (ended := read_outcome(out, record.run_id)) is not None:
                self._end(record, ended)
            elif status == "finished:stopped":
                self._close(record, "stopped", "It was stopped through Flower's own control interface.")
            elif status == "finished:completed":
                self._end(record, "")
            else:
                self._retry(record, out, f"its ServerApp ended without an outcome ({details[:200] or status})")
        elif status == "unknown":
            self._retry(record, out, "the SuperLink no longer knows it")
        elif run_id == record.run_id and not running:
            self._retry(record, out, "its ServerApp was killed", stop=True)
        elif run_id != record.run_id and status != "pending" and self._is_late(record):
            self._retry(record, out, f"its ServerApp did not start within {self.timing.start_s:g} s", stop=True)
        elif running and record.tries and (newest := newest_round(out)) > record.round:
            self.store.change(record.key, tries=0, round=newest)
            self._report(f"{record.name}: running again, round {newest} is done.", record, "recovery")

    def _submit(self, record: RunRecord, out: Path) -> None:
        running, run_id = lock_holder(out)
        if running and run_id and run_id != record.run_id and self._is_alive(run_id):
            # the daemon before was killed after the submission and before its record
            self._set_running(record, run_id, "found running, supervised again")
            return
        if record.run_id and self._is_alive(
            record.run_id
        ):  # a database from a backup may still list it, with its former folders
            stop_run(self.address, record.run_id, ca=self._authority())
        values: dict[str, str | int | float] = {
            "run-toml": record.toml,
            "out": record.out,
            "resume": int(record.resume or record.run_id > 0 or newest_round(out) >= 0),
            "state": str(self.state),
        }
        try:
            submitted = submit(self.address, self.app, values, ca=self._authority())
        except DeploymentError as error:
            if record.note != str(error):
                self.store.change(record.key, note=str(error))
            raise
        note = f"resumed after round {max(0, newest_round(out))}" if values["resume"] else ""
        self._set_running(record, submitted, note)

    def _set_running(self, record: RunRecord, run_id: int, note: str) -> None:
        self._submitted[record.key] = time.monotonic()
        former = (*record.former, record.run_id)[-FORMER:] if record.run_id else record.former
        self.store.change(record.key, state="running", run_id=run_id, former=former, note=note)
        if note:
            self._report(f"{record.name}: {note}.", record, "recovery")

    def _retry(self, record: RunRecord, out: Path, cause: str, *, stop: bool = False) -> None:
        newest = newest_round(out)
        tries = 1 if newest > record.round else record.tries + 1
        if tries > TRIES:
            self._close(
                record,
                "failed",
                f"No round after {max(0, newest)} was done in {TRIES} attempts; the last cause: {cause}.",
            )
            return
        pause = self.timing.pause_s(tries)
        self._next_submission[record.key] = time.monotonic() + pause
        # recorded before the stop: after a kill in between, the stop must not look like an operator's
        self.store.change(record.key, state="waiting", note=cause, tries=tries, round=newest)
        remedy = f"it is submitted again in {pause:g} s and resumes after round {max(0, newest)}."
        self._report(f"{record.name}: {cause}; {remedy}", record, "failure", newest)
        if stop:
            try:
                stop_run(self.address, record.run_id, ca=self._authority())
            except DeploymentError as error:
                logger.info("%s: %s", record.key, error)

    def _stop(self, record: RunRecord) -> None:
        if record.run_id and self._is_alive(record.run_id):
            stop_run(self.address, record.run_id, ca=self._authority())
        self._close(record, "stopped", "Stopped by the operator; `trunkline server run --resume` resumes it.")

    def _end(self, record: RunRecord, text: str) -> None:
        self._close(record, "failed" if text else "completed", text)

    def _close(self, record: RunRecord, state: str, note: str) -> None:
        self.store.change(record.key, state=state, note=note)
        self._report(
            f"{record.name}: {state}{'. ' + note if note else '.'}", record, "failure" if state == "failed" else "note"
        )

    def _status(self, run_id: int) -> tuple[str, str]:
        try:
            return run_status(self.address, run_id, ca=self._authority())
        except DeploymentError as error:
            if "no run" in str(error):  # its database was lost, or restored from a backup
                return "unknown", ""
            raise

    def _is_alive(self, run_id: int) -> bool:
        status, _ = self._status(run_id)
        return status != "unknown" and not status.startswith("finished")

    def _is_late(self, record: RunRecord) -> bool:
        return time.monotonic() - self._submitted.setdefault(record.key, time.monotonic()) > self.timing.start_s

    def _authority(self) -> bytes | None:
        try:
            return self.ca.read_bytes() if self.ca else None
        except OSError as error:
            raise DeploymentError(f"{self.ca}: cannot be read ({error.strerror}).") from None

    def _report(self, text: str, record: RunRecord, kind: Kind, round: int | None = None) -> None:
        self._reported.discard(text)
        self.emit(f"run {text}")
        if self.incidents is not None:
            self.incidents.note(kind, f"run {text}", round=round, about=f"run {record.key}")

    def _report_once(self, text: str) -> None:
        if text not in self._reported:
            self._reported.add(text)
            self.emit(f"run {text}")
            if self.incidents is not None:
                self.incidents.note("failure", f"run {text}")


def newest_round(out: Path) -> int:
    """The newest round with a checkpoint in `out`; -1 where there is none."""
    rounds = Shelf(out / "checkpoint").rounds()
    return rounds[-1] if rounds else -1
