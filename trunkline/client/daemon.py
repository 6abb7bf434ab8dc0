"""The plant's daemon: a SuperNode that fetches messages, the executor that answers them, and who keeps the membership fresh.

Which folder holds the plant's data is said here, on the plant, and travels to the ClientApp in the node's own
configuration: no message of a server can name another.
"""

import json
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trunkline.client.access import open_seal
from trunkline.client.identity import Identity
from trunkline.client.join import read_membership
from trunkline.client.keeper import Keeper
from trunkline.client.pausing import in_words
from trunkline.config import SiteConfig, read_site
from trunkline.errors import DeploymentError, TrustError
from trunkline.flower import environment
from trunkline.sealing import without_key
from trunkline.supervise import Child, Supervisor, is_loopback, make_secret, read_status, say, status_table

if TYPE_CHECKING:
    from rich.console import Console

LOCAL = "127.0.0.1:9140"  # where a centre on this machine listens unless told otherwise


def state_of(site_dir: Path) -> Path:
    """Where a site's daemon keeps its state unless told otherwise."""
    return site_dir / ".trunkline"


def start(
    site_dir: Path,
    server: str | None = None,
    state: Path | None = None,
    tell: Callable[[str], None] = say,
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
        TrustError: an identity is there and cannot be used, or `state` is sealed and cannot be opened.
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
    if identity.joined:
        _check_membership(site, state)
    open_seal(state, tell)  # said here and now, and not in a log at the first message
    children = children_of(site, site_dir, server, state, client_app, door)
    tell(f"site {site.name}: asking {server} for work; state in {state}. Ctrl-C ends it.")
    supervisor = Supervisor(children, state, {"role": "client", "site": site.name, "server": server})
    keeper = None
    if identity.joined:
        keeper = Keeper(state, server, lambda text: tell(f"site {site.name}: {text}"), supervisor.wake)

    starts = len(children)

    def tick() -> None:
        nonlocal starts
        if keeper is None:
            return
        if supervisor.starts > starts:  # a SuperNode that is turned away ends, and says nothing
            starts = supervisor.starts
            keeper.hurry()
        if keeper.tick():
            supervisor.info |= keeper.found
            supervisor.write_status()

    supervisor.run(tick)


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
        *(sys.executable, "-m", "trunkline.flower", "supernode", "--node-file", str(state / "node.json"), *own),
        *transport,
        *("--superlink", server, "--isolation", "process", "--superexec-auth-secret-file", str(secret)),
        *("--host", "127.0.0.1", "--port", runtime.rpartition(":")[2], "--node-config", config),
    ]
    worker = [
        *(sys.executable, "-m", "trunkline.client.executor", "--runtime", runtime, "--secret", str(secret)),
        *("--journal", str(state / "journal.json"), "--pins", str(state / "pins.txt")),
        *("--app", client_app, "--site", site.name),
        *(("--folder", str(site_dir), "--state", str(state), "--centre", server) if door else ()),
    ]
    env = environment(state)
    return [
        Child("supernode", node, without_key(env, state), state / "logs" / "supernode.log"),
        Child("executor", worker, env, state / "logs" / "executor.log"),
    ]


def status(site_dir: Path, state: Path | None = None) -> dict[str, Any]:
    """What this site's daemon last wrote: running, site, server, children (name, pid, since, restarts, last_exit); and `away`, why
    it does not train now, in words, or empty."""
    state = (state or state_of(site_dir)).resolve()
    return {**read_status(state), "away": in_words(site_dir, state)}


def print_status(found: dict[str, Any], console: "Console") -> None:
    """What `status` found, for a person."""
    console.print(f"site {found['site']}, server {found['server']}", markup=False)
    for sentence in (found.get("link", ""), *found.get("warnings", [])):
        if sentence:
            console.print(sentence, markup=False)
    if found.get("away"):
        console.print(f"not training: {found['away']}", markup=False)
    console.print(status_table(found))


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
