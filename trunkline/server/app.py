"""The ServerApp: the same in a deployment, over Ray and in the tests."""

import hashlib
import json
import logging
import time
import tomllib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from trunkline.config.renames import current
from trunkline.config.run import RunConfig, parse_run, read_run
from trunkline.errors import ConfigError, StorageError, TrunklineError
from trunkline.flower.replies import LINK_LOST
from trunkline.release import RELEASE
from trunkline.runtime.events import Event, Note, OnEvent, ReportWritten, RunFailed
from trunkline.runtime.incidents import Incidents
from trunkline.runtime.progress import EVENTS
from trunkline.security.signatures import Sign
from trunkline.server.membership import audit_log as audit
from trunkline.server.membership.authority import is_federation
from trunkline.server.membership.registry import Registry
from trunkline.server.operations.run_store import RunLock, write_outcome
from trunkline.server.operations.status import note_event
from trunkline.server.releases.signing import find_signer
from trunkline.server.reporting.report import write_report
from trunkline.server.rounds.disk_wait import DiskWait, EventFile
from trunkline.server.rounds.run import run_rounds
from trunkline.server.rounds.superlink import transport_of

app = ServerApp()
logger = logging.getLogger(__name__)


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run what `run-toml` says and leave checkpoints, events and the report in `out`.

    run_config:
        run-toml: the text of a run.toml (or the same as JSON), or the path of one on this machine; empty: all defaults.
        out: folder of the run; empty: a folder of the run's name below the home of the server's user.
        page: 0 to write report.json without report.html, for a caller that draws the page itself or has no use for it.
        resume: 1 to go on from the newest checkpoint in `out`.
        state: the server's folder. Where it holds a federation, only sites that are enrolled there take part, each under the
            name it was invited as, and the release is signed. Empty: neither.
    """
    config = context.run_config
    run = _run_of(str(config.get("run-toml", "")))
    out = Path(str(config.get("out") or Path.home() / ".trunkline" / "runs" / run.name))
    out.mkdir(parents=True, exist_ok=True)
    state = str(config.get("state", ""))
    transport = transport_of(grid)
    durable = transport.durable
    hold = RunLock(out, context.run_id) if durable else None
    events = EventFile(out / EVENTS)
    incidents = Incidents(Path(state)) if durable and state else None

    def on_event(event: Event) -> None:
        line = {**event.to_json(), **transport.stamp()}
        events.write(json.dumps({"at": time.time(), **line} if durable else line))
        if incidents is not None:
            note_event(incidents, run.name, line)

    def note(text: str) -> None:
        on_event(Note(text))

    disk_wait = DiskWait(out, note, run.cohort.outage_s if durable else 0.0)

    def write_end(text: str = "") -> None:
        """Record that the run has ended by itself; a run without this record is taken up again."""
        if hold is not None:
            disk_wait(lambda: write_outcome(out, context.run_id, text))

    try:
        resume = bool(config.get("resume", 0))
        report = run_rounds(
            transport, run, out, resume=resume, on_event=on_event, roster=_roster(state), sign=_signer(state, on_event)
        )
        disk_wait(lambda: write_report(report, out, page=bool(config.get("page", 1))))
        _audit(state, "run finished", run, rounds=run.total_rounds, trunk=_digest_of(out / RELEASE))
        on_event(ReportWritten(str(out)))
        write_end()
    except LINK_LOST as error:
        note(
            f"The SuperLink let go of this run ({type(error).__name__}); the daemon takes it up again from its last checkpoint."
        )
        raise
    except TrunklineError as error:
        on_event(RunFailed(str(error)))
        _audit(state, "run stopped", run, because=str(error)[:500])
        write_end(str(error))
        raise
    except Exception as error:
        text = f"{type(error).__name__}: {error}. This is a defect of Trunkline; the server's log has the traceback."
        on_event(RunFailed(text))
        raise
    finally:
        events.close()
        if hold is not None:
            hold.release()


def _audit(state: str, entry: str, run: RunConfig, **about: object) -> None:
    """Write a line to the server's audit log. A failure is logged; it does not undo a run that has ended."""
    try:
        if state:
            audit.note(Path(state), entry, run=run.name, **about)
    except TrunklineError as error:
        logger.error("%s", error)


def _digest_of(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest() if file.exists() else ""


def _roster(state: str) -> Callable[[], Mapping[int, str]] | None:
    """Gives node -> site of all that are enrolled at the moment; None where no site has to be."""
    if not (state and is_federation(Path(state))):
        return None
    registry = Registry(Path(state))
    enrolled: dict[int, str] = {}

    def nodes() -> Mapping[int, str]:
        """The sites of the last registry that could be read: an unreadable registry lets no site in and throws none out."""
        try:
            nodes = registry.read().nodes()
        except StorageError as error:
            logger.error("%s", error)
            return dict(enrolled)
        enrolled.clear()
        enrolled.update(nodes)
        return nodes

    return nodes


def _signer(state: str, on_event: OnEvent) -> Sign | None:
    """Found before the first round: a key that cannot be used should be reported then, not after days of training."""
    if not state:
        return None
    signer = find_signer(Path(state))
    if signer is None:
        text = (
            f"{state} has no release.key, so the release of this run is not signed. A server with a federation has one."
        )
        on_event(Note(text))
        return None
    if warning := signer.warning():
        on_event(Note(warning))
    return signer.sign


def _stored(text: str) -> dict[str, Any]:
    """A run that `trunkline server run` stored as JSON, perhaps of an older version."""
    return current(RunConfig, json.loads(text))


def _run_of(text: str) -> RunConfig:
    if text.endswith(".toml") and "\n" not in text:
        return read_run(Path(text))
    try:
        return parse_run(_stored(text) if text.startswith("{") else tomllib.loads(text), "run.toml")
    except (tomllib.TOMLDecodeError, json.JSONDecodeError) as error:
        raise ConfigError(f"run-toml: neither TOML nor JSON: {error}.") from None
