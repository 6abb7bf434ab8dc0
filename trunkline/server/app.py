"""The ServerApp: the same at the centre of a deployment, over Ray and in the tests."""

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
from trunkline.server.rounds.disk_wait import Lines, Room
from trunkline.server.rounds.messaging import is_far
from trunkline.server.rounds.run import run_rounds

app = ServerApp()
logger = logging.getLogger(__name__)


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run what `run-toml` says and leave checkpoints, events and the report in `out`.

    run_config:
        run-toml: the text of a run.toml (or the same as JSON), or the path of one on this machine; empty: all defaults.
        out: folder of the run; empty: a folder of the run's name below the home of the server's user.
        resume: 1 to go on from the newest checkpoint in `out`.
        state: the centre's folder: where it is a federation, only who is enrolled there takes part, under the name it was invited
            as, and what is released is signed; empty: neither.
    """
    config = context.run_config
    run = _run_of(str(config.get("run-toml", "")))
    out = Path(str(config.get("out") or Path.home() / ".trunkline" / "runs" / run.name))
    out.mkdir(parents=True, exist_ok=True)
    state = str(config.get("state", ""))
    stamp = getattr(grid, "stamp", dict)  # a simulated world says when it was on its own clock
    far = is_far(grid)
    hold = RunLock(out, context.run_id) if far else None
    events = Lines(out / EVENTS)
    incidents = Incidents(Path(state)) if far and state else None

    def tell(event: Mapping[str, Any]) -> None:
        told = stamp(event)
        events.write(json.dumps({"at": time.time(), **told} if far else told))
        if incidents is not None:
            note_event(incidents, run.name, told)

    def note(text: str) -> None:
        tell({"event": "note", "text": text})

    room = Room(out, note, run.cohort.outage_s if far else 0.0)

    def over(text: str = "") -> None:
        """Leave word that the run has ended by itself; without it, it is taken up again."""
        if hold is not None:
            room(lambda: write_outcome(out, context.run_id, text))

    try:
        resume = bool(config.get("resume", 0))
        report = run_rounds(
            grid, run, out, resume=resume, tell=tell, roster=_roster(state), sign=_signer(state, tell)
        )  # fmt: skip
        room(lambda: write_report(report, out))
        _audit(state, "run finished", run, rounds=run.total_rounds, trunk=_digest_of(out / RELEASE))
        tell({"event": "done", "out": str(out)})
        over()
    except LINK_LOST as error:
        note(
            f"The SuperLink let go of this run ({type(error).__name__}); the daemon takes it up again from its last checkpoint."
        )
        raise
    except TrunklineError as error:
        tell({"event": "error", "text": str(error)})
        _audit(state, "run stopped", run, because=str(error)[:500])
        over(str(error))
        raise
    except Exception as error:
        tell(
            {
                "event": "error",
                "text": f"{type(error).__name__}: {error}. This is a defect of Trunkline; the server's log has the traceback.",
            }
        )
        raise
    finally:
        events.close()
        if hold is not None:
            hold.release()


def _audit(state: str, what: str, run: RunConfig, **about: object) -> None:
    """A line in the centre's log; that it cannot be written is told and does not undo a run that is over."""
    try:
        if state:
            audit.note(Path(state), what, run=run.name, **about)
    except TrunklineError as error:
        logger.error("%s", error)


def _digest_of(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest() if file.exists() else ""


def _roster(state: str) -> Callable[[], Mapping[int, str]] | None:
    """Who is enrolled at any moment, where somebody has to be."""
    if not (state and is_federation(Path(state))):
        return None
    registry = Registry(Path(state))
    known: dict[int, str] = {}

    def nodes() -> Mapping[int, str]:
        """Who was enrolled when the register could last be read: that it cannot be just now lets nobody in and throws nobody out."""
        try:
            found = registry.read().nodes()
        except StorageError as error:
            logger.error("%s", error)
            return dict(known)
        known.clear()
        known.update(found)
        return found

    return nodes


def _signer(state: str, tell: Callable[[Mapping[str, Any]], None]) -> Sign | None:
    """Looked for before the first round: a key that cannot be used should be known then, not after days of training."""
    if not state:
        return None
    signer = find_signer(Path(state))
    if signer is None:
        text = (
            f"{state} has no release.key, so what this run releases is not signed. A centre with a federation has one."
        )
        tell({"event": "note", "text": text})
        return None
    if warning := signer.warning():
        tell({"event": "note", "text": warning})
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
