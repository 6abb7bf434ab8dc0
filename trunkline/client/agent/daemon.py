"""The site's daemon: a SuperNode that fetches messages, the executor that answers them, and the membership monitor.

The folder of the site's data is set here, on the plant's machine. It reaches the ClientApp in the node's own configuration,
so no message of a server can name another folder.
"""

import json
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path

from trunkline.client.agent import status
from trunkline.client.agent.join import read_membership
from trunkline.client.agent.membership_monitor import MembershipMonitor
from trunkline.client.state.identity import Identity
from trunkline.client.state.permissions import open_seal
from trunkline.client.state.vault import check_whose
from trunkline.config.site import SiteConfig, read_site
from trunkline.errors import DeploymentError, TrustError
from trunkline.flower.control import environment
from trunkline.runtime.child import Child
from trunkline.runtime.programs import is_loopback, make_secret, print_line
from trunkline.runtime.supervisor import Supervisor
from trunkline.security.encryption import environment_without_key
from trunkline.security.keys import check_clock, read_certificate

LOCAL = "127.0.0.1:9140"  # default address of a server on this machine
HEADLINE_S = 1.0
DISK_FULL = "No request is taken and no reply leaves until there is room. The server waits for this site, or continues without it."

state_of = status.state_of


def start(
    site_dir: Path,
    server: str | None = None,
    state: Path | None = None,
    emit: Callable[[str], None] = print_line,
    client_app: str = "trunkline.client.app:app",
    check_egress: bool = True,
) -> None:
    """Run the site's daemon until SIGTERM or SIGINT.

    A site that has joined a federation uses TLS 1.3 with its certificate. A site that has not may only use a server on this
    machine, for a trial.

    Args:
        site_dir: the folder with site.toml.
        server: host:port; default: the server it joined, or 127.0.0.1:9140.
        state: for keys, journal, logs and the private model; not shared by two daemons.
        client_app: module:attribute of the installed ClientApp.
        check_egress: False for a test's ClientApp with another protocol than Trunkline's: no reply is checked then.

    Raises:
        ConfigError: site.toml is invalid.
        DeploymentError: another daemon holds `state`, or the server is elsewhere and this site has not joined.
        TrustError: the identity cannot be used, `state` is sealed and cannot be opened, or the clock is wrong.
        ForeignState: `state` belongs to another site.
    """
    site_dir = site_dir.resolve()
    site = read_site(site_dir)
    state = (state or state_of(site_dir)).resolve()
    identity = Identity.of(state)
    server = server or (read_membership(state).server if identity.joined else "") or LOCAL
    if not server.rpartition(":")[2].isdigit():
        raise DeploymentError(f"server {server!r}: expected host:port, such as server.example.com:9140.")
    if not identity.joined and not is_loopback(server.rpartition(":")[0].strip("[]")):
        raise DeploymentError(
            f"site {site.name} has not joined a federation, and without its certificate nothing would be encrypted on the way to "
            f"{server}. Ask the operator for a code: `trunkline client join {server} --code CODE`."
        )
    check_clock(*([read_certificate(identity.certificate)] if identity.joined else []))
    if identity.joined:
        _check_membership(site, state)
    # fails here, and not in a log at the first message
    check_whose(state, site.name, open_seal(state, emit))
    children = children_of(site, site_dir, server, state, client_app, check_egress)
    info = {"role": "client", "site": site.name, "server": server, "joined": identity.joined, "folder": str(site_dir)}
    supervisor = Supervisor(children, state, info, lambda text: emit(f"site {site.name}: {text}"), DISK_FULL)
    supervisor.emit(f"asking {server} for work; state in {state}. Ctrl-C ends it.")
    monitor = None
    if identity.joined:
        monitor = MembershipMonitor(
            state, server, supervisor.emit, supervisor.retry_now, incidents=supervisor.incidents
        )
    supervisor.run(_watch(supervisor, monitor))


def _watch(supervisor: Supervisor, monitor: MembershipMonitor | None) -> Callable[[], None]:
    """A function, called five times a second, that runs the monitor and keeps readiness and the status line up to date."""
    starts, due = 0, 0.0

    def tick() -> None:
        nonlocal starts, due
        if monitor is not None:
            if supervisor.starts > starts > 0:  # a refused SuperNode ends without a cause; the server may have it
                monitor.hurry()
            starts = supervisor.starts
            if monitor.tick():
                supervisor.info |= monitor.summary
                supervisor.write_status()
        if supervisor.all_running and (monitor is None or monitor.asked):
            supervisor.mark_ready()
        if time.monotonic() >= due:
            due = time.monotonic() + HEADLINE_S
            supervisor.headline = status.headline(supervisor.info, supervisor.state)

    return tick


def _check_membership(site: SiteConfig, state: Path) -> None:
    if (name := read_membership(state).site) != site.name:
        raise TrustError(
            f"{state}: joined as {name!r}, but site.toml has name = {site.name!r}. Change it back, or join again with a code for it."
        )


def children_of(
    site: SiteConfig, site_dir: Path, server: str, state: Path, client_app: str, check_egress: bool = True
) -> list[Child]:
    """The two processes of a site. The SuperNode is first and ends last, so that a last reply can still leave."""
    secret = make_secret(state / "secret")
    runtime = f"127.0.0.1:{_free_port()}"
    identity = Identity.of(state)
    config = f"site={_quoted(site_dir)} state={_quoted(state)} plant=1"
    identity_flags, transport = [], ["--insecure"]
    if identity.joined:
        identity_flags = ["--identity", str(identity.folder)]
        transport = [
            "--root-certificates",
            str(identity.authority),
            "--auth-supernode-private-key",
            str(identity.node_key),
        ]
    node = [
        *(
            sys.executable,
            "-m",
            "trunkline.flower.processes",
            "supernode",
            "--node-file",
            str(state / "node.json"),
            *identity_flags,
        ),
        *transport,
        *("--superlink", server, "--isolation", "process", "--superexec-auth-secret-file", str(secret)),
        *("--host", "127.0.0.1", "--port", runtime.rpartition(":")[2], "--node-config", config),
    ]
    worker = [
        *(sys.executable, "-m", "trunkline.client.agent.executor", "--runtime", runtime, "--secret", str(secret)),
        *("--journal", str(state / "journal.json"), "--pins", str(state / "pins.txt")),
        *("--app", client_app, "--site", site.name),
        *(("--folder", str(site_dir), "--state", str(state), "--server", server) if check_egress else ()),
    ]
    env = environment(state)
    return [
        Child("supernode", node, environment_without_key(env, state), state / "logs" / "supernode.log"),
        Child("executor", worker, env, state / "logs" / "executor.log"),
    ]


def _quoted(path: Path) -> str:
    """A path as Flower's `--node-config` reads it."""
    text = str(path)
    if any(sign in text for sign in "\"'\n\\"):
        raise DeploymentError(f"{text}: Flower cannot pass on a path with quotes, backslashes or line ends. Rename it.")
    return json.dumps(text, ensure_ascii=False)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
