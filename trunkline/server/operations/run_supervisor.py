"""Sees to it that every run of the centre goes on until it has ended by itself: submits, watches, submits again.

Flower ends a run with whatever dies: with its ServerApp, which nobody starts again; with the process that starts
ServerApps; with a SuperLink that is away for a minute. What a run has reached is on disk, so it is submitted again and
goes on from there. A ServerApp that has ended by itself, well or not, leaves its word in the run's folder.
"""

import logging
import threading
import time
from collections.abc import Callable
from pathlib import Path

from trunkline.errors import DeploymentError, TrunklineError
from trunkline.flower.control import run_status, stop_run, submit
from trunkline.runtime.incidents import Incidents, Kind
from trunkline.runtime.storage import Shelf
from trunkline.server.operations.run_store import Entry, Ledger, held_by, read_outcome

LOOK_S = 0.5  # between two looks at the list of runs
BEGIN_S = 45.0  # from a submission until its ServerApp must have begun; it loads torch, on a busy machine
TRIES = 12  # submissions in a row without a new round until a run is given up
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.5, 60.0  # between them, doubling
FORMER = 20  # numbers of earlier submissions that are remembered, to tell them from runs of somebody else

logger = logging.getLogger(__name__)


class Conductor:
    """Call `tick` often; the work is done in a thread of its own, because the SuperLink may take its time.

    Args:
        state: of the centre; address, ca: its SuperLink, see `flower.submit`.
        app: folder of the app that is submitted.
        tell: takes a sentence with the run's name whenever something went wrong or right again.
        incidents: gets the same.
    """

    def __init__(
        self,
        state: Path,
        address: str,
        ca: Path | None,
        app: Path,
        tell: Callable[[str], None] = lambda text: None,
        incidents: Incidents | None = None,
    ) -> None:
        self.incidents = incidents
        self.state = state
        self.address = address
        self.ca = ca
        self.app = app
        self.tell = tell
        self.ledger = Ledger(state)
        self._thread: threading.Thread | None = None
        self._due = 0.0
        self._again: dict[str, float] = {}  # key -> monotonic time of its next submission
        self._begun: dict[str, float] = {}  # key -> when it was submitted, by this process's clock
        self._told: set[str] = set()

    def tick(self) -> None:
        """Start a look when it is time."""
        if self._thread is not None and self._thread.is_alive():
            return
        if time.monotonic() >= self._due:
            self._due = time.monotonic() + LOOK_S
            self._thread = threading.Thread(target=self.look, name="conductor", daemon=True)
            self._thread.start()

    def look(self) -> None:
        """Bring every unfinished run one step further."""
        for path in self.ledger.damaged():
            self._say_once(f"{path}: damaged, so this run is not watched. Restore a backup, or remove the file.")
        for entry in self.ledger.entries():
            if not entry.open:
                continue
            try:
                self._advance(entry)
            except DeploymentError as error:  # the SuperLink is away: its own daemon starts it again
                logger.info("%s: %s", entry.key, error)
            except TrunklineError as error:  # a full disk, say; looked at again in a moment
                self._say_once(f"{entry.name}: {error}")
            except Exception:  # whatever it is, the other runs are still to be watched
                logger.exception("%s", entry.key)

    def _advance(self, entry: Entry) -> None:
        out = Path(entry.out)
        if entry.stop:
            self._stop(entry)
            return
        if entry.state in ("wanted", "waiting"):
            if time.monotonic() >= self._again.get(entry.key, 0.0):
                self._submit(entry, out)
            return
        held, number = held_by(out)
        ended = read_outcome(out, entry.number)
        if ended is not None and not held:
            self._end(entry, ended)
            return
        status, details = self._status(entry.number)
        if status.startswith("finished"):
            if held and number == entry.number:
                return  # it is writing its last words
            if (ended := read_outcome(out, entry.number)) is not None:
                self._end(entry, ended)
            elif status == "finished:stopped":
                self._settle(entry, "stopped", "It was stopped through Flower's own control interface.")
            elif status == "finished:completed":
                self._end(entry, "")
            else:
                self._retry(entry, out, f"its ServerApp ended without a word ({details[:200] or status})")
        elif status == "unknown":
            self._retry(entry, out, "the SuperLink does not know it any more")
        elif number == entry.number and not held:
            self._retry(entry, out, "its ServerApp was killed", stop=True)
        elif number != entry.number and status != "pending" and self._late(entry):
            self._retry(entry, out, f"its ServerApp did not begin within {BEGIN_S:g} s", stop=True)
        elif held and entry.tries and (at := newest_round(out)) > entry.round:
            self.ledger.change(entry.key, tries=0, round=at)
            self._say(f"{entry.name}: goes on, round {at} is done.", entry, "recovery")

    def _submit(self, entry: Entry, out: Path) -> None:
        held, number = held_by(out)
        if held and number and number != entry.number and self._alive(number):
            self._running(entry, number, "taken up where it was")  # this daemon was killed before it wrote that down
            return
        if entry.number and self._alive(entry.number):  # a database from a backup may still have it, in folders of then
            stop_run(self.address, entry.number, ca=self._authority())
        values: dict[str, str | int | float] = {
            "run-toml": entry.toml,
            "out": entry.out,
            "resume": int(entry.resume or entry.number > 0 or newest_round(out) >= 0),
            "state": str(self.state),
        }
        try:
            submitted = submit(self.address, self.app, values, ca=self._authority())
        except DeploymentError as error:
            if entry.note != str(error):
                self.ledger.change(entry.key, note=str(error))
            raise
        self._running(entry, submitted, f"goes on after round {max(0, newest_round(out))}" if values["resume"] else "")

    def _running(self, entry: Entry, number: int, how: str) -> None:
        self._begun[entry.key] = time.monotonic()
        former = (*entry.former, entry.number)[-FORMER:] if entry.number else entry.former
        self.ledger.change(entry.key, state="running", number=number, former=former, note=how)
        if how:
            self._say(f"{entry.name}: {how}.", entry, "recovery")

    def _retry(self, entry: Entry, out: Path, why: str, *, stop: bool = False) -> None:
        at = newest_round(out)
        tries = 1 if at > entry.round else entry.tries + 1
        if tries > TRIES:
            self._settle(
                entry, "failed", f"It came no further than round {max(0, at)} in {TRIES} attempts; at last: {why}."
            )
            return
        pause = min(FIRST_PAUSE_S * 2.0 ** (tries - 1), LONGEST_PAUSE_S)
        self._again[entry.key] = time.monotonic() + pause
        # written down before it is stopped: who dies in between must not take the stop for an operator's
        self.ledger.change(entry.key, state="waiting", note=why, tries=tries, round=at)
        again = f"it is submitted again in {pause:g} s and goes on after round {max(0, at)}."
        self._say(f"{entry.name}: {why}; {again}", entry, "failure", at)
        if stop:
            try:
                stop_run(self.address, entry.number, ca=self._authority())
            except DeploymentError as error:
                logger.info("%s: %s", entry.key, error)

    def _stop(self, entry: Entry) -> None:
        if entry.number and self._alive(entry.number):
            stop_run(self.address, entry.number, ca=self._authority())
        self._settle(entry, "stopped", "Stopped by the operator; `trunkline server run --resume` goes on.")

    def _end(self, entry: Entry, text: str) -> None:
        self._settle(entry, "failed" if text else "completed", text)

    def _settle(self, entry: Entry, state: str, note: str) -> None:
        self.ledger.change(entry.key, state=state, note=note)
        self._say(
            f"{entry.name}: {state}{'. ' + note if note else '.'}", entry, "failure" if state == "failed" else "note"
        )

    def _status(self, number: int) -> tuple[str, str]:
        try:
            return run_status(self.address, number, ca=self._authority())
        except DeploymentError as error:
            if "no run" in str(error):  # its database was lost, or put back from before
                return "unknown", ""
            raise

    def _alive(self, number: int) -> bool:
        status, _ = self._status(number)
        return status != "unknown" and not status.startswith("finished")

    def _late(self, entry: Entry) -> bool:
        return time.monotonic() - self._begun.setdefault(entry.key, time.monotonic()) > BEGIN_S

    def _authority(self) -> bytes | None:
        try:
            return self.ca.read_bytes() if self.ca else None
        except OSError as error:
            raise DeploymentError(f"{self.ca}: cannot be read ({error.strerror}).") from None

    def _say(self, text: str, entry: Entry, kind: Kind, round: int | None = None) -> None:
        self._told.discard(text)
        self.tell(f"run {text}")
        if self.incidents is not None:
            self.incidents.note(kind, f"run {text}", round=round, about=f"run {entry.key}")

    def _say_once(self, text: str) -> None:
        if text not in self._told:
            self._told.add(text)
            self.tell(f"run {text}")
            if self.incidents is not None:
                self.incidents.note("failure", f"run {text}")


def newest_round(out: Path) -> int:
    """The newest round with a checkpoint in `out`; -1 where there is none."""
    rounds = Shelf(out / "checkpoint").rounds()
    return rounds[-1] if rounds else -1
