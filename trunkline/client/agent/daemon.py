"""The plant's daemon: a SuperNode that fetches messages, the executor that answers them, and who keeps the membership fresh.

Which folder holds the plant's data is said here, on the plant, and travels to the ClientApp in the node's own
configuration: no message of a server can name another.
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

LOCAL = "127.0.0.1:9140"  # where a centre on this machine listens unless told otherwise
HEADLINE_S = 1.0
STANDS_STILL = (
    "No order is taken and no answer leaves until there is room; the centre waits for this site, or goes on without it."
)

state_of = status.state_of


def start(
    site_dir: Path,
    server: str | None = None,
    state: Path | None = None,
    tell: Callable[[str], None] = print_line,
    client_app: str = "trunkline.client.app:app",
    door: bool = True,
) -> None:
    """Run the plant's daemon until SIGTERM or SIGINT.

    A site that has joined a federation speaks TLS 1.3 with its certificate; one that has not reaches a centre on this machine
    only, which is for trying things out.

    Args:
        site_dir: the folder with site.toml.
        server: host:port of the centre; default: the one it joined, or 127.0.0.1:9140.
        state: for keys, journal, logs and the private model; not shared by two daemons.
        client_app: module:attribute of the installed ClientApp.
        door: False for a ClientApp that speaks another language than Trunkline's own, in a test: nothing is checked then.

    Raises:
        ConfigError: site.toml says something that cannot be meant.
        DeploymentError: another daemon holds `state`, or the server is elsewhere and this site has not joined.
        TrustError: an identity is there and cannot be used, `state` is sealed and cannot be opened, or the clock is wrong.
        ForeignState: `state` is another site's.
    """
    site_dir = site_dir.resolve()
    site = read_site(site_dir)
    state = (state or state_of(site_dir)).resolve()
    identity = Identity.of(state)
    server = server or (read_membership(state).server if identity.joined else "") or LOCAL
    if not server.rpartition(":")[2].isdigit():
        raise DeploymentError(f"server {server!r}: expected host:port, such as centre.example.com:9140.")
    if not identity.joined and not is_loopback(server.rpartition(":")[0].strip("[]")):
        raise DeploymentError(
            f"site {site.name} has not joined a federation, and without its certificate nothing would be encrypted on the way to "
            f"{server}. Ask the operator for a code: `trunkline client join {server} --code CODE`."
        )
    check_clock(*([read_certificate(identity.certificate)] if identity.joined else []))
    if identity.joined:
        _check_membership(site, state)
    # both said here and now, and not in a log at the first message
    check_whose(state, site.name, open_seal(state, tell))
    children = children_of(site, site_dir, server, state, client_app, door)
    info = {"role": "client", "site": site.name, "server": server, "joined": identity.joined, "folder": str(site_dir)}
    supervisor = Supervisor(children, state, info, lambda text: tell(f"site {site.name}: {text}"), STANDS_STILL)
    supervisor.emit(f"asking {server} for work; state in {state}. Ctrl-C ends it.")
    keeper = None
    if identity.joined:
        keeper = MembershipMonitor(state, server, supervisor.emit, supervisor.retry_now, incidents=supervisor.incidents)
    supervisor.run(_watch(supervisor, keeper))


def _watch(supervisor: Supervisor, keeper: MembershipMonitor | None) -> Callable[[], None]:
    """What the daemon looks at five times a second beside its children."""
    starts, due = 0, 0.0

    def tick() -> None:
        nonlocal starts, due
        if keeper is not None:
            if supervisor.starts > starts > 0:  # a SuperNode that is turned away ends, and says nothing
                keeper.hurry()
            starts = supervisor.starts
            if keeper.tick():
                supervisor.info |= keeper.found
                supervisor.write_status()
        if supervisor.all_running and (keeper is None or keeper.asked):
            supervisor.mark_ready()
        if time.monotonic() >= due:
            due = time.monotonic() + HEADLINE_S
            supervisor.headline = status.headline(supervisor.info, supervisor.state)

    return tick


def _check_membership(site: SiteConfig, state: Path) -> None:
    if (name := read_membership(state).site) != site.name:
        raise TrustError(
            f"{state}: joined as {name!r}, and site.toml says name = {site.name!r}. Change it back, or join again with a code for it."
        )


def children_of(
    site: SiteConfig, site_dir: Path, server: str, state: Path, client_app: str, door: bool = True
) -> list[Child]:
    """The two processes of a plant, SuperNode first: ended last, so that a last answer still gets out."""
    secret = make_secret(state / "secret")
    runtime = f"127.0.0.1:{_free_port()}"
    identity = Identity.of(state)
    config = f"site={_quoted(site_dir)} state={_quoted(state)} plant=1"
    own, transport = [], ["--insecure"]
    if identity.joined:
        own = ["--identity", str(identity.folder)]
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
            *own,
        ),
        *transport,
        *("--superlink", server, "--isolation", "process", "--superexec-auth-secret-file", str(secret)),
        *("--host", "127.0.0.1", "--port", runtime.rpartition(":")[2], "--node-config", config),
    ]
    worker = [
        *(sys.executable, "-m", "trunkline.client.agent.executor", "--runtime", runtime, "--secret", str(secret)),
        *("--journal", str(state / "journal.json"), "--pins", str(state / "pins.txt")),
        *("--app", client_app, "--site", site.name),
        *(("--folder", str(site_dir), "--state", str(state), "--centre", server) if door else ()),
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
