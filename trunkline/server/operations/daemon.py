"""The centre's daemon: gateway, registrar, a SuperLink and the process that starts its ServerApps; runs are submitted to it.

Whoever reaches a SuperLink's port may submit a run to it (Flower 1.41 authenticates nobody there), so it listens on
loopback always, and the gateway is all that the outside sees.
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
from typing import TYPE_CHECKING

import trunkline
from trunkline.errors import DeploymentError
from trunkline.flower.control import environment, list_nodes
from trunkline.runtime.lock import read_status
from trunkline.runtime.programs import accepts, is_loopback, make_secret, program, say
from trunkline.runtime.supervisor import Child, Supervisor
from trunkline.security.encryption import without_key
from trunkline.security.keys import check_clock
from trunkline.server.gateway.routes import socket_path
from trunkline.server.membership import audit_log as audit
from trunkline.server.membership.authority import Authority, is_federation, read_federation, sites, warnings
from trunkline.server.operations import app_guard as launcher
from trunkline.server.operations.run_store import Entry, Ledger
from trunkline.server.operations.run_supervisor import Conductor
from trunkline.server.operations.status import headline
from trunkline.server.operations.status import status as status
from trunkline.server.operations.status import where as _where

if TYPE_CHECKING:
    from rich.table import Table

POLL_S = 1.0
SILENCE_S = 900.0  # longest that whoever follows a run waits for a server that is down
BEGIN_S = 30.0  # for the daemon to take up a run
HEADLINE_S = 5.0
STANDS_STILL = "No round can end and no site can join until there is room; what the sites have sent is not lost."
APP = Path(trunkline.__file__).parent / "app"

logger = logging.getLogger(__name__)


def start(state: Path, host: str = "127.0.0.1", port: int = 9140, tell: Callable[[str], None] = say) -> None:
    """Run the centre until SIGTERM or SIGINT.

    Where `server init` has made a federation, the gateway listens at `host`:`port` and everything else on loopback. Without one
    there is no encryption and nobody is asked who he is, so it listens on loopback only.

    Args:
        state: database, secret, keys, logs and the runs' folders; not shared by two daemons.

    Raises:
        DeploymentError: no federation where there must be one, the port is taken, or another daemon holds `state`.
        TrustError: the federation's keys cannot be opened, or the clock of this machine is wrong.
    """
    check_clock()
    state = state.resolve()
    if not is_federation(state) and not is_loopback(host):
        raise DeploymentError(
            f"host {host}: without a federation the server listens on loopback only, because anybody who reached it could join. "
            f"Make one first: `trunkline server init --state {state}`."
        )
    _check_port(host, port)
    outside = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    gated = is_federation(state)
    local = f"127.0.0.1:{_free_port()}" if gated else outside if is_loopback(host) else f"127.0.0.1:{port}"
    children = _gated(state, local, outside) if gated else _open(state, local)
    ca = state / "loopback.crt" if gated else None
    info = {"role": "server", "address": local, "listens": outside, "ca": str(ca) if ca else ""}
    supervisor = Supervisor(children, state, info, tell, STANDS_STILL)
    mend_database(state / "superlink.db", supervisor.tell)
    conductor = Conductor(state, local, ca, APP, supervisor.tell, supervisor.incidents)
    serving = _watch(supervisor, local, outside)

    def tick() -> None:
        conductor.tick()
        serving()

    supervisor.run(tick)


def _watch(supervisor: Supervisor, local: str, outside: str) -> Callable[[], None]:
    """What the daemon looks at beside its children: whether it serves, and where its runs are."""
    state, late, due = supervisor.state, time.monotonic() + 60.0, 0.0

    def tick() -> None:
        nonlocal late, due
        now = time.monotonic()
        if supervisor.is_ready:
            if now >= due:
                due = now + HEADLINE_S
                supervisor.headline = headline(supervisor.info, state)
        elif accepts(local) and accepts(outside):
            supervisor.ready()
            supervisor.tell(f"ready: the centre listens on {outside}; state in {state}. Ctrl-C ends it.")
            for warning in warnings(state) if is_federation(state) else ():
                supervisor.tell(f"Note: {warning}")
        elif now > late:
            late = float("inf")
            supervisor.tell(f"nobody listens on {outside} yet; it is tried again. See {state / 'logs'}.")

    return tick


def _open(state: Path, local: str) -> list[Child]:
    """SuperLink and launcher on loopback, for trying things out on one machine."""
    return _flower(state, local, ["--insecure"], ["--insecure"])


def _gated(state: Path, local: str, outside: str) -> list[Child]:
    """Behind a gateway: nothing but it is reached from outside, and Flower lets in nodes only that the registrar named."""
    Authority.open(state)  # a missing key is told now, not by a part that keeps ending
    socket_path(state)
    own = str(state / "loopback.crt")
    flags = ["--ssl-ca-certfile", own, "--ssl-certfile", own, "--ssl-keyfile", str(state / "loopback.key")]
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
        *_flower(state, local, [*flags, "--enable-supernode-auth"], ["--root-certificates", own]),
        Child("registrar", registrar, env, logs / "registrar.log"),
        Child(
            "gateway",
            [*gateway, "--listen", outside, "--upstream", local],
            without_key(env, state),
            logs / "gateway.log",
            needs=local,
        ),
    ]


def _flower(state: Path, local: str, flags: list[str], dial: list[str]) -> list[Child]:
    shared = ["--superexec-auth-secret-file", str(make_secret(state / "secret"))]
    host, _, port = local.rpartition(":")
    link = [
        *(program("flower-superlink"), *flags, "--host", host.strip("[]"), "--port", port),
        *("--database", str(state / "superlink.db"), "--isolation", "process", *shared),
        "--disable-runtime-dependency-installation",
    ]
    starter = [program("flower-superexec"), *dial, "--runtime-api-address", local, *shared]
    env = environment(state)
    ours = {**env, "PATH": os.pathsep.join((str(launcher.install(state)), env["PATH"]))}
    return [
        Child("superlink", link, without_key(env, state), state / "logs" / "superlink.log"),
        Child("superexec", starter, ours, state / "logs" / "superexec.log", needs=local),
    ]


def mend_database(path: Path, tell: Callable[[str], None] = say) -> None:
    """Set a damaged database of the SuperLink aside: the sites' keys and the runs are in files of our own, and a new one is made."""
    if not path.exists():
        return
    try:
        with contextlib.closing(sqlite3.connect(path, timeout=5.0)) as database:
            (found,) = database.execute("PRAGMA quick_check(1)").fetchone()
        if found == "ok":
            return
        why = str(found)
    except sqlite3.OperationalError as error:  # locked, or the disk: nothing is said of what is in it
        logger.warning("%s: %s", path, error)
        return
    except sqlite3.DatabaseError as error:
        why = str(error)
    aside = path.with_name(f"{path.name}.damaged-{time.strftime('%Y%m%d-%H%M%S')}")
    for ending in ("", "-wal", "-shm"):
        with contextlib.suppress(FileNotFoundError):
            path.with_name(path.name + ending).rename(aside.with_name(aside.name + ending))
    tell(
        f"{path}: damaged ({why[:200]}); it is set aside as {aside.name} and made anew. Sites connect again, runs go on."
    )


def run(state: Path, run_toml: str, out: Path, *, resume: bool = False, patience_s: float = BEGIN_S) -> Entry:
    """Hand a run to the daemon of `state`, which sees to it that it ends; as it stands once it is submitted.

    Args:
        run_toml: a run.toml as JSON, or its text.
        out: absolute folder on this machine for checkpoints, events and the report.
        resume: go on from the newest checkpoint in `out`.
        patience_s: how long to wait for the submission; the run is written down and begins later otherwise.

    Raises:
        DeploymentError: no daemon runs on `state`, or an unfinished run works in `out`.
    """
    _where(state)
    ledger = Ledger(state.resolve())
    entry = ledger.add(_name_of(run_toml) or "run", run_toml, out.resolve(), resume=resume)
    audit.note(state, "run", run=entry.name, key=entry.key, out=entry.out, resume=resume)
    end = time.monotonic() + patience_s
    while entry.state == "wanted" and time.monotonic() < end:
        time.sleep(0.1)
        entry = ledger.get(entry.key)
    return entry


def stop(state: Path, name: str) -> Entry:
    """Ask the daemon to end a run (by key, or the newest of that name); its state stays on disk.

    Raises:
        DeploymentError: there is no such run, or it has ended.
    """
    ledger = Ledger(state.resolve())
    entry = ledger.find(name)
    if not entry.open:
        raise DeploymentError(f"run {entry.key} has ended already: {entry.state} since {entry.since}.")
    audit.note(state, "stop run", run=entry.name, key=entry.key)
    return ledger.change(entry.key, stop=True)


def _name_of(text: str) -> str:
    """The `name` in the text of a run.toml, or the same as JSON; of what cannot be read, nothing."""
    try:
        found = json.loads(text) if text.startswith("{") else tomllib.loads(text)
        return str(found.get("name", ""))
    except ValueError:
        return ""


def follow(state: Path, key: str, silence_s: float = SILENCE_S, poll_s: float = POLL_S) -> Iterator[Entry]:
    """The entry of a run each time its state or note changes, until it has ended.

    A run may take days, so there is no bound on the whole; there is one on how long no server runs.

    Raises:
        DeploymentError: no server has run on `state` for `silence_s` seconds. The run goes on once one does.
    """
    state = state.resolve()
    ledger = Ledger(state)
    before: tuple[str, str] | None = None
    heard = time.monotonic()
    while True:
        entry = ledger.get(key)
        if (entry.state, entry.note) != before:
            before = entry.state, entry.note
            yield entry
        if not entry.open:
            return
        if _runs(state):
            heard = time.monotonic()
        elif time.monotonic() - heard > silence_s:
            raise DeploymentError(
                f"no server has run on {state} for {silence_s:.0f} s. The run {key} goes on by itself once one does: "
                f"`trunkline server start --state {state}`."
            )
        time.sleep(poll_s)


def _runs(state: Path) -> bool:
    """Whether a daemon holds `state`; a status.json that cannot be read is written anew at its next start."""
    try:
        return bool(read_status(state)["running"])
    except DeploymentError:
        return False


def wait(state: Path, key: str, out: Path) -> str:
    """Return when the run has completed.

    Raises:
        DeploymentError: it ended otherwise; the text is what the run said last, or where to look.
    """
    for entry in follow(state, key):
        logger.info("run %s: %s %s", key, entry.state, entry.note)
    if entry.state == "completed":
        return entry.state
    reason = entry.note or last_error(out) or f"see {state / 'logs' / 'superexec.log'}"
    raise DeploymentError(f"run {key} {entry.state}: {reason}")


def sites_table(state: Path) -> "Table":
    """Every site of the federation, with who is online as far as a running daemon tells."""
    from rich.table import Table

    online: set[int] = set()
    try:
        address, ca = _where(state)
        online = {node["node"] for node in list_nodes(address, ca=ca) if node["status"] == "online"}
        title = f"sites of {read_federation(state).name}"
    except DeploymentError:
        title = f"sites of {read_federation(state).name} (the server is not running, so nobody is online)"
    table = Table(
        "site", "state", "since (UTC)", "valid until", "online", "key", "note", title=title, title_justify="left"
    )
    table.columns[-1].overflow = "fold"
    for row in sites(state):
        on = "yes" if row["node"] in online else "no" if row["state"] == "enrolled" else ""
        since, until = (row[key][:10] for key in ("since", "until"))
        table.add_row(row["site"], row["state"], since, until, on, row["key"][:8], row["note"])
    return table


def upstream_of(state: Path) -> str:
    """host:port of the SuperLink behind the gateway, for another gateway.

    Raises:
        DeploymentError: no daemon runs on `state`.
    """
    return _where(state)[0]


def last_error(out: Path) -> str:
    """What a run wrote to its events before it ended; empty where it ended well."""
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
                f"{host}:{port}: cannot listen there ({error.strerror}). Another server may run on it; choose --port."
            ) from None
