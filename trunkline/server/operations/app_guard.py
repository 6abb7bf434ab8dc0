"""Replaces `flwr-serverapp` at the server and runs nothing but the installed app.

Whoever reaches a SuperLink's control interface can submit an app, and Flower starts its server side with the daemon's
rights. This program compares the archive's digest with that of the installed thin app before anything is unpacked. A run
with any other app ends as failed, and the audit log records it.

Run as `python -m trunkline.server.operations.app_guard STATE ...`, through `STATE/bin/flwr-serverapp`, which is first in
the PATH of the process that starts ServerApps.
"""

import logging
import shlex
import sys
from pathlib import Path

import trunkline
from trunkline.errors import DeploymentError, TrunklineError
from trunkline.flower.app_archive import app_digest, fab_digest
from trunkline.flower.processes import serverapp_main
from trunkline.runtime.incidents import Incidents
from trunkline.runtime.programs import pinned_digests
from trunkline.runtime.storage import write_atomic
from trunkline.server.membership import audit_log as audit

logger = logging.getLogger("trunkline.app_guard")


def install(state: Path) -> Path:
    """Write the replacement program; the folder that has to be first in PATH."""
    folder = state / "bin"
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    script = folder / "flwr-serverapp"
    text = f'#!/bin/sh\nexec {shlex.quote(sys.executable)} -m trunkline.server.operations.app_guard {shlex.quote(str(state))} "$@"\n'
    write_atomic(script, text.encode(), mode=0o700)  # a full disk must not leave an empty one, which would run nothing
    return folder


def check(state: Path, fab: bytes) -> None:
    """Raises DeploymentError for any app but the installed one and those that the operator has pinned."""
    digest = fab_digest(fab)
    if digest in pinned_digests(app_digest(Path(trunkline.__file__).parent / "app"), state / "pins.txt"):
        return
    try:
        audit.note(state, "refuse app", app=digest)
    except TrunklineError as error:  # the refusal stands even if it cannot be recorded
        logger.error("%s", error)
    text, remedy = f"refused the app {digest}: none of its code was run", "Submit runs with `trunkline server run`."
    Incidents(state).note("refusal", text, remedy=remedy, about=f"app {digest}")
    raise DeploymentError(
        f"the app {digest[:16]} is not the one installed at this server; none of its code was run. Submit runs with `trunkline "
        f"server run`, or pin it: one digest a line in {state / 'pins.txt'}."
    )


if __name__ == "__main__":
    _state = Path(sys.argv[1])
    sys.argv = ["flwr-serverapp", *sys.argv[2:]]
    serverapp_main(lambda fab: check(_state, fab))
