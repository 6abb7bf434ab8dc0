"""The server's daemon: gateway, registrar, a SuperLink and the process that starts its ServerApps.

Flower 1.41 does not authenticate whoever submits a run at a SuperLink's port. The SuperLink therefore always listens on
loopback, and only the gateway is reachable from outside.
"""

import contextlib
import json
import logging
import os
import socket
import sqlite3
import sys
import time
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path

import trunkline
from trunkline.errors import DeploymentError
from trunkline.flower.control import environment
from trunkline.runtime.child import Child
from trunkline.runtime.lock import read_status
from trunkline.runtime.programs import accepts_connections, find_program, is_loopback, make_secret, print_line
from trunkline.runtime.supervisor import Supervisor
from trunkline.security.encryption import environment_without_key
from trunkline.security.keys import check_clock
from trunkline.server.gateway.routes import PORT, socket_path
from trunkline.server.membership import audit_log as audit
from trunkline.server.membership.authority import Authority, is_federation, warnings
from trunkline.server.operations import app_guard
from trunkline.server.operations.run_store import RunRecord, RunStore
from trunkline.server.operations.run_supervisor import RunSupervisor
from trunkline.server.operations.status import headline, superlink_of
from trunkline.server.operations.status import status as status

POLL_S = 1.0
SILENCE_S = 900.0  # how long a command that follows a run waits for a server that is down
BEGIN_S = 30.0  # for the daemon to submit a run
HEADLINE_S = 5.0
DISK_FULL = "No round can end and no site can join until there is room. The updates that the sites sent are not lost."
APP = Path(trunkline.__file__).parent / "app"

logger = logging.getLogger(__name__)


def start(state: Path, host: str = "127.0.0.1", port: int = PORT, emit: Callable[[str], None] = print_line) -> None:
    """Run the server until SIGTERM or SIGINT.

    With a federation (`server init`) the gateway listens at `host`:`port` and everything else on loopback. Without one there
    is neither encryption nor authentication, so the SuperLink listens on loopback only.

    Args:
        state: database, secret, keys, logs and the runs' folders; not shared by two daemons.

    Raises:
        DeploymentError: a federation is needed and missing, the port is taken, or another daemon holds `state`.
        TrustError: the federation's keys cannot be opened, or the clock of this machine is wrong.
    """
    check_clock()
    state = state.resolve()
    if not is_federation(state) and not is_loopback(host):
        raise DeploymentError(
            f"host {host}: without a federation the server listens on loopback only, because anybody who reaches it could join. "
            f"Make one first: `trunkline server init --state {state}`."
        )
    _check_port(host, port)
    outside = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    gated = is_federation(state)
    local = f"127.0.0.1:{_free_port()}" if gated else outside if is_loopback(host) else f"127.0.0.1:{port}"
    children = _gated(state, local, outside) if gated else _open(state, local)
    ca = state / "loopback.crt" if gated else None
    info = {"role": "server", "address": local, "listens": outside, "ca": str(ca) if ca else ""}
    supervisor = Supervisor(children, state, info, emit, DISK_FULL)
    mend_database(state / "superlink.db", supervisor.emit)
    runs = RunSupervisor(state, local, ca, APP, supervisor.emit, supervisor.incidents)
    watch = _watch(supervisor, local, outside)

    def tick() -> None:
        runs.tick()
        watch()

    supervisor.run(tick)


def _watch(supervisor: Supervisor, local: str, outside: str) -> Callable[[], None]:
    """A function that reports readiness and keeps the status line for systemd up to date."""
    state, late, due = supervisor.state, time.monotonic() + 60.0, 0.0

    def tick() -> None:
        nonlocal late, due
        now = time.monotonic()
        if supervisor.is_ready:
            if now >= due:
                due = now + HEADLINE_S
                supervisor.headline = headline(supervisor.info, state)
        elif accepts_connections(local) and accepts_connections(outside):
            supervisor.mark_ready()
            supervisor.emit(f"ready: the server listens on {outside}; state in {state}. Ctrl-C ends it.")
            for warning in warnings(state) if is_federation(state) else ():
                supervisor.emit(f"Note: {warning}")
        elif now > late:
            late = float("inf")
            supervisor.emit(f"nothing listens on {outside} yet; the daemon keeps trying. See {state / 'logs'}.")

    return tick


def _open(state: Path, local: str) -> list[Child]:
    """SuperLink and the starter of ServerApps on loopback, for a trial on one machine."""
    return _flower(state, local, ["--insecure"], ["--insecure"])


def _gated(state: Path, local: str, outside: str) -> list[Child]:
    """With a gateway: only it is reachable from outside, and Flower accepts only nodes that the registrar has registered."""
    Authority.open(state)  # reports a missing key now; else the registrar would end again and again
    socket_path(state)
    certificate = str(state / "loopback.crt")
    flags = [
        "--ssl-ca-certfile",
        certificate,
        "--ssl-certfile",
        certificate,
        "--ssl-keyfile",
        str(state / "loopback.key"),
    ]
    env, logs = environment(state), state / "logs"
    registrar = [
        sys.executable,
        "-m",
        "trunkline.server.gateway.registrar",
        "--state",
        str(state),
        "--superlink",
        local,
    ]
    gateway = [sys.executable, "-m", "trunkline.server.gateway.gateway", "--state", str(state)]
    return [
        *_flower(state, local, [*flags, "--enable-supernode-auth"], ["--root-certificates", certificate]),
        Child("registrar", registrar, env, logs / "registrar.log"),
        Child(
            "gateway",
            [*gateway, "--listen", outside, "--upstream", local],
            environment_without_key(env, state),
            logs / "gateway.log",
            needs=local,
        ),
    ]


def _flower(state: Path, local: str, flags: list[str], dial: list[str]) -> list[Child]:
    shared = ["--superexec-auth-secret-file", str(make_secret(state / "secret"))]
    host, _, port = local.rpartition(":")
    link = [
        *(find_program("flower-superlink"), *flags, "--host", host.strip("[]"), "--port", port),
        *("--database", str(state / "superlink.db"), "--isolation", "process", *shared),
        "--disable-runtime-dependency-installation",
    ]
    starter = [find_program("flower-superexec"), *dial, "--runtime-api-address", local, *shared]
    env = environment(state)
    ours = {**env, "PATH": os.pathsep.join((str(app_guard.install(state)), env["PATH"]))}
    return [
        Child("superlink", link, environment_without_key(env, state), state / "logs" / "superlink.log"),
        Child("superexec", starter, ours, state / "logs" / "superexec.log", needs=local),
    ]


def mend_database(path: Path, emit: Callable[[str], None] = print_line) -> None:
    """Set a damaged database of the SuperLink aside. Flower makes a new one; keys and runs are in files of our own."""
    if not path.exists():
        return
    try:
        with contextlib.closing(sqlite3.connect(path, timeout=5.0)) as database:
            (verdict,) = database.execute("PRAGMA quick_check(1)").fetchone()
        if verdict == "ok":
            return
        cause = str(verdict)
    except sqlite3.OperationalError as error:  # locked, or a disk error: says nothing about the content
        logger.warning("%s: %s", path, error)
        return
    except sqlite3.DatabaseError as error:
        cause = str(error)
    aside = path.with_name(f"{path.name}.damaged-{time.strftime('%Y%m%d-%H%M%S')}")
    for ending in ("", "-wal", "-shm"):
        with contextlib.suppress(FileNotFoundError):
            path.with_name(path.name + ending).rename(aside.with_name(aside.name + ending))
    emit(
        f"{path}: damaged ({cause[:200]}). It was renamed to {aside.name}, and a new one is made. Sites reconnect, runs resume."
    )


def run(state: Path, run_toml: str, out: Path, *, resume: bool = False, patience_s: float = BEGIN_S) -> RunRecord:
    """Hand a run to the daemon of `state`, which keeps it going until it ends; its record once it is submitted.

    Args:
        run_toml: a run.toml as JSON, or its text.
        out: absolute folder on this machine for checkpoints, events and the report.
        resume: start from the newest checkpoint in `out`.
        patience_s: how long to wait for the submission; after that the run starts later by itself.

    Raises:
        DeploymentError: no daemon runs on `state`, or an unfinished run works in `out`.
    """
    superlink_of(state)
    store = RunStore(state.resolve())
    record = store.add(_name_of(run_toml) or "run", run_toml, out.resolve(), resume=resume)
    audit.note(state, "run", run=record.name, key=record.key, out=record.out, resume=resume)
    end = time.monotonic() + patience_s
    while record.state == "wanted" and time.monotonic() < end:
        time.sleep(0.1)
        record = store.get(record.key)
    return record


def stop(state: Path, name: str) -> RunRecord:
    """Ask the daemon to end a run (by key, or the newest of that name); its state stays on disk.

    Raises:
        DeploymentError: there is no such run, or it has ended.
    """
    store = RunStore(state.resolve())
    record = store.find(name)
    if not record.open:
        raise DeploymentError(f"run {record.key} has ended already: {record.state} since {record.since}.")
    audit.note(state, "stop run", run=record.name, key=record.key)
    return store.change(record.key, stop=True)


def _name_of(text: str) -> str:
    """The `name` in the text of a run.toml, or the same as JSON; empty if the text cannot be parsed."""
    try:
        table = json.loads(text) if text.startswith("{") else tomllib.loads(text)
        return str(table.get("name", ""))
    except ValueError:
        return ""


def follow(state: Path, key: str, silence_s: float = SILENCE_S, poll_s: float = POLL_S) -> Iterator[RunRecord]:
    """The record of a run at each change of its state or note, until the run has ended.

    A run may take days, so the whole has no time limit; the time without a running server has one.

    Raises:
        DeploymentError: no server has run on `state` for `silence_s` seconds. The run resumes once one does.
    """
    state = state.resolve()
    store = RunStore(state)
    before: tuple[str, str] | None = None
    last_seen = time.monotonic()
    while True:
        record = store.get(key)
        if (record.state, record.note) != before:
            before = record.state, record.note
            yield record
        if not record.open:
            return
        if _is_running(state):
            last_seen = time.monotonic()
        elif time.monotonic() - last_seen > silence_s:
            raise DeploymentError(
                f"no server has run on {state} for {silence_s:.0f} s. The run {key} resumes by itself once one does: "
                f"`trunkline server start --state {state}`."
            )
        time.sleep(poll_s)


def _is_running(state: Path) -> bool:
    """Whether a daemon holds `state`; the next start replaces a status.json that cannot be read."""
    try:
        return bool(read_status(state)["running"])
    except DeploymentError:
        return False


def wait(state: Path, key: str, out: Path) -> str:
    """Return when the run has completed.

    Raises:
        DeploymentError: it ended otherwise; the text is the run's last note, or the log to read.
    """
    for record in follow(state, key):
        logger.info("run %s: %s %s", key, record.state, record.note)
    if record.state == "completed":
        return record.state
    reason = record.note or last_error(out) or f"see {state / 'logs' / 'superexec.log'}"
    raise DeploymentError(f"run {key} {record.state}: {reason}")


def upstream_of(state: Path) -> str:
    """host:port of the SuperLink behind the gateway, for another gateway.

    Raises:
        DeploymentError: no daemon runs on `state`.
    """
    return superlink_of(state)[0]


def last_error(out: Path) -> str:
    """The last error in a run's events; empty if it ended well."""
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


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _check_port(host: str, port: int) -> None:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as the server itself does
        try:
            probe.bind((host, port))
        except OSError as error:
            raise DeploymentError(
                f"{host}:{port}: cannot listen on this address ({error.strerror}). Another server may use it; choose --port."
            ) from None
