"""The whole life of a federation with real processes: made, joined, trained, one turned away and back, certificates renewed."""

import contextlib
import json
import os
import signal
import socket
import ssl
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.federation import events, federation, rounds, within
from trunkline.client.state.identity import Identity
from trunkline.flower.processes import client_context
from trunkline.runtime.lock import read_status
from trunkline.security.keys import fingerprint, load_certificate, read_certificate

pytestmark = [pytest.mark.processes, pytest.mark.xdist_group("federation")]
RUN = """
name = "life"
rounds = 14
seed = 5
[trunk]
width = 16
[training]
steps = 3
batch_size = 32
[cohort]
min_sites = 4
quorum = 0.5
deadline_s = 60
gather_s = 120
[report]
baseline = false
"""


@pytest.mark.timeout(280)
def test_the_whole_life_of_a_federation(plants: list[Path], tmp_path: Path) -> None:
    with federation(tmp_path) as made:
        made.start()
        for plant in plants:
            said = made.join(plant)
            assert f"{plant.name} has joined 'North presses'" in said
            made.plant(plant)
        out = tmp_path / "out"
        running = made.run(RUN, out)
        within(120.0, lambda: f"two rounds\n{made.logs()}", lambda: len(rounds(out)) >= 2)
        gone, stays = plants[0], plants[1]
        assert rounds(out)[-1]["sites"] == 4

        made.command("server", "revoke", gone.name, "--reason", "the plant was sold")
        revoked = time.monotonic()
        within(60.0, lambda: f"{gone.name} offline\n{made.logs()}", lambda: gone.name not in made.online())
        within(60.0, lambda: f"three sites\n{made.logs()}", lambda: rounds(out)[-1]["sites"] == 3)
        assert time.monotonic() - revoked < 60.0
        identity = Identity.of(made.states[stays.name])
        serial, before = read_certificate(identity.certificate).serial_number, of_server(made.port, identity)
        with held(made.states[stays.name]):  # the round waits for this plant, so the run does not end meanwhile
            within(
                60.0,
                lambda: f"it is told why\n{made.log(gone.name)}",
                lambda: "the plant was sold" in made.log(gone.name),
            )
            # the revoked plant's daemon is still there and takes up its new identity by itself
            assert "has joined" in made.join(gone)
            within(60.0, lambda: f"{gone.name} is back\n{made.logs()}", lambda: gone.name in made.online())
            made.command("server", "rotate")
            within(10.0, "the gateway shows its new certificate", lambda: of_server(made.port, identity) != before)
            made.command("client", "renew", str(stays), "--state", str(made.states[stays.name]))
            assert read_certificate(identity.certificate).serial_number != serial
        at = len(rounds(out))
        within(90.0, lambda: f"four sites again\n{made.logs()}", lambda: rounds(out)[-1]["sites"] == 4)
        assert "certificate was renewed" in (made.states[stays.name] / "logs" / "supernode.log").read_text()
        within(60.0, lambda: f"rounds go on\n{made.logs()}", lambda: len(rounds(out)) > at + 2)
        assert rounds(out)[-1]["sites"] == 4

        running.wait(200.0)
        assert running.returncode == 0, made.log("out") + made.logs()
        assert events(out)[-1]["event"] == "done"
        report = json.loads((out / "report.json").read_text())
        assert {row["site"] for row in report["sites"]} == {plant.name for plant in plants}

        listed = made.command("server", "sites")
        assert all(plant.name in listed for plant in plants)
        audited = made.command("server", "audit")
        for word in ("init", "invite", "enrol", "revoke", "rotate", "renew", "run", "intact"):
            assert word in audited, audited


@contextlib.contextmanager
def held(state: Path) -> Iterator[None]:
    """A plant whose worker stands still, as on a machine that is busy with something else."""
    (pid,) = (one["pid"] for one in read_status(state)["children"] if one["name"] == "executor")
    os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(pid, signal.SIGCONT)


def of_server(port: int, identity: Identity) -> str:
    """Fingerprint of the certificate that the gateway shows now."""
    context = client_context(identity.folder)
    with (
        socket.create_connection(("127.0.0.1", port), timeout=5.0) as raw,
        context.wrap_socket(raw, server_hostname="127.0.0.1") as secured,
    ):
        return fingerprint(
            load_certificate(ssl.DER_cert_to_PEM_cert(secured.getpeercert(True) or b"").encode(), "server")
        )
