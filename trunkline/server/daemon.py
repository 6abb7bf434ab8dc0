"""The centre's daemon: a SuperLink and the process that starts its ServerApps; runs are submitted to it and watched.

Whoever reaches a SuperLink's port may submit a run to it (Flower 1.41 authenticates nobody there), so it listens on
loopback unless TLS files say that the operator has thought about the network; docs/deploy.md has the rest.
"""

import ipaddress
import json
import logging
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import trunkline
from trunkline.errors import DeploymentError
from trunkline.flower import environment, list_nodes, list_runs, run_status, submit
from trunkline.supervise import Child, Supervisor, accepts, make_secret, program, read_status, say, status_table

if TYPE_CHECKING:
    from rich.console import Console

POLL_S = 1.0
SILENCE_S = 120.0  # a SuperLink that restarts is back within 20 s, so this much silence is more than a restart
APP = Path(trunkline.__file__).parent / "app"

logger = logging.getLogger(__name__)


def start(
    state: Path,
    host: str = "127.0.0.1",
    port: int = 9140,
    tls_ca: Path | None = None,
    tls_cert: Path | None = None,
    tls_key: Path | None = None,
    tell: Callable[[str], None] = say,
) -> None:
    """Run the centre until SIGTERM or SIGINT.

    Args:
        state: database, secret, logs and the runs' folders; not shared by two daemons.
        host: where to listen; anything but loopback needs the three TLS files (PEM).
        tls_cert: its names must cover 127.0.0.1 too, because the centre's own parts dial it there.

    Raises:
        DeploymentError: no TLS where it is needed, the port is taken, or another daemon holds `state`.
    """
    state = state.resolve()
    tls = _tls_files(host, tls_ca, tls_cert, tls_key)
    _check_port(host, port)
    local = f"127.0.0.1:{port}" if not _is_loopback(host) or ":" not in host else f"[{host}]:{port}"
    secret = make_secret(state / "secret")
    flags = ["--insecure"] if tls is None else []
    dial = ["--insecure"]
    if tls is not None:
        ca, cert, key = (str(file) for file in tls)
        flags = ["--ssl-ca-certfile", ca, "--ssl-certfile", cert, "--ssl-keyfile", key]
        dial = ["--root-certificates", ca]
    shared = ["--superexec-auth-secret-file", str(secret)]
    link = [
        *(program("flower-superlink"), *flags, "--host", host, "--port", str(port)),
        *("--database", str(state / "superlink.db"), "--isolation", "process", *shared),
        "--disable-runtime-dependency-installation",
    ]
    launcher = [program("flower-superexec"), *dial, "--runtime-api-address", local, *shared]
    env = environment(state)
    children = [
        Child("superlink", link, env, state / "logs" / "superlink.log"),
        Child("superexec", launcher, env, state / "logs" / "superexec.log", needs=local),
    ]
    info = {"role": "server", "address": local, "listens": f"{host}:{port}", "ca": str(tls[0]) if tls else ""}
    waiting = [time.monotonic() + 60.0]

    def announce() -> None:
        if not waiting:
            return
        if accepts(local):
            waiting.clear()
            tell(f"ready: the centre listens on {host}:{port}; state in {state}. Ctrl-C ends it.")
        elif time.monotonic() > waiting[0]:
            waiting.clear()
            tell(f"the SuperLink does not listen on {host}:{port} yet; it is tried again. See {children[0].log}.")

    Supervisor(children, state, info).run(announce)


def run(state: Path, run_toml: str, out: Path, *, resume: bool = False) -> int:
    """Submit a run to the daemon of `state`; its run id.

    Args:
        run_toml: the text of a run.toml, or the same as JSON.
        out: absolute folder on this machine for checkpoints, events and the report.
        resume: go on from the newest checkpoint in `out`.

    Raises:
        DeploymentError: no daemon runs on `state`, or it refuses the run.
    """
    address, ca = _where(state)
    overrides: dict[str, str | int | float] = {
        "run-toml": run_toml,
        "out": str(out.resolve()),
        "resume": int(resume),
        "state": str(state.resolve()),
    }
    return submit(address, APP, overrides, ca=ca)


def follow(state: Path, run_id: int, silence_s: float = SILENCE_S, poll_s: float = POLL_S) -> Iterator[tuple[str, str]]:
    """Status and details of a run each time they change, until it has finished.

    A run may take days, so there is no bound on the whole; there is one on how long the SuperLink may stay silent.

    Raises:
        DeploymentError: the SuperLink has not answered for `silence_s` seconds, or does not know the run.
    """
    address, ca = _where(state)
    before = ("", "")
    heard = time.monotonic()
    while not before[0].startswith("finished"):
        try:
            now = run_status(address, run_id, ca=ca)
        except DeploymentError as error:
            if time.monotonic() - heard > silence_s or "no run" in str(error):
                raise
            logger.warning("%s", error)
        else:
            heard = time.monotonic()
            if now != before:
                before = now
                yield now
        if not before[0].startswith("finished"):
            time.sleep(poll_s)


def wait(state: Path, run_id: int, out: Path) -> str:
    """Return when the run has completed.

    Raises:
        DeploymentError: it ended otherwise; the text is what the run wrote to its events, or where to look.
    """
    last, details = "unknown", ""
    for last, details in follow(state, run_id):
        logger.info("run %d: %s %s", run_id, last, details)
    if last == "finished:completed":
        return last
    reason = _last_error(out) or details or f"see {state / 'logs' / 'superexec.log'}"
    raise DeploymentError(f"run {run_id} ended as {last}: {reason}")


def status(state: Path) -> dict[str, Any]:
    """The supervisor's status.json with `running`, and of a running one `nodes`, `runs`, or `problem` if it is mute."""
    found = read_status(state.resolve())
    found.update(nodes=[], runs=[], problem="")
    if found["running"]:
        try:
            address, ca = _where(state)
            found["nodes"] = [node for node in list_nodes(address, ca=ca) if node["status"] != "unregistered"]
            found["runs"] = list_runs(address, ca=ca)
        except DeploymentError as error:
            found["problem"] = str(error)
    return found


def print_status(found: dict[str, Any], console: "Console") -> None:
    """What `status` found, for a person."""
    from rich.table import Table

    console.print(status_table(found))
    if not found["running"]:
        return
    if found["problem"]:
        console.print(found["problem"], markup=False)
        return
    online = sum(node["status"] == "online" for node in found["nodes"])
    console.print(f"{online} of {len(found['nodes'])} known sites online at {found['listens']}")
    if found["runs"]:
        table = Table("run", "status", "started", "details")
        for one in found["runs"]:
            table.add_row(str(one["run"]), one["status"], one["started"][:19], one["details"][:120])
        console.print(table)


def _where(state: Path) -> tuple[str, bytes | None]:
    """Address and certificate authority of the daemon that runs on `state`."""
    found = read_status(state.resolve())
    if not found["running"] or found.get("role") != "server":
        raise DeploymentError(
            f"{state}: no server runs on this state folder. `trunkline server start --state {state}`."
        )
    ca = Path(found["ca"]).read_bytes() if found.get("ca") else None
    return str(found["address"]), ca


def _last_error(out: Path) -> str:
    try:
        lines = (out / "events.jsonl").read_text(encoding="utf-8").splitlines()
    except OSError:
        return ""
    for line in reversed(lines):
        try:
            event = json.loads(line)
        except ValueError:  # a line cut short by a kill
            continue
        if event.get("event") == "error":
            return str(event.get("text", ""))
    return ""


def _tls_files(host: str, *files: Path | None) -> tuple[Path, ...] | None:
    given = tuple(file.resolve() for file in files if file is not None)
    if not given and _is_loopback(host):
        return None
    if len(given) < len(files):
        raise DeploymentError(
            f"host {host}: {'without encryption the server listens on loopback only; ' if not given else ''}"
            "TLS needs all of --tls-ca, --tls-cert and --tls-key. Or keep 127.0.0.1 and reach it through a VPN or tunnel."
        )
    if missing := [file for file in given if not file.is_file()]:
        raise DeploymentError(f"{missing[0]}: no such file. Give the PEM file, readable by the server's account.")
    return given


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _check_port(host: str, port: int) -> None:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as the server itself does
        try:
            probe.bind((host, port))
        except OSError as error:
            raise DeploymentError(
                f"{host}:{port}: cannot listen there ({error.strerror}). Another server may run on it; choose --port."
            ) from None
