"""The plant's daemon: a SuperNode that fetches messages, and the executor that answers them.

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
from trunkline.config import SiteConfig, read_site
from trunkline.errors import DeploymentError
from trunkline.flower import environment
from trunkline.supervise import Child, Supervisor, make_secret, read_status, say, status_table

if TYPE_CHECKING:
    from rich.console import Console


def state_of(site_dir: Path) -> Path:
    """Where a site's daemon keeps its state unless told otherwise."""
    return site_dir / ".trunkline"


def start(
    site_dir: Path,
    server: str = "127.0.0.1:9140",
    state: Path | None = None,
    tls_ca: Path | None = None,
    tell: Callable[[str], None] = say,
    client_app: str = "trunkline.client.app:app",
) -> None:
    """Run the plant's daemon until SIGTERM or SIGINT.

    Args:
        site_dir: the folder with site.toml.
        server: host:port of the centre's SuperLink.
        state: for keys, journal, logs and the private model; not shared by two daemons.
        tls_ca: the certificate authority in PEM that signed the server's certificate; without it nothing is encrypted.
        client_app: module:attribute of the installed ClientApp.

    Raises:
        ConfigError: site.toml says something that cannot be meant.
        DeploymentError: another daemon holds `state`, or a file is missing.
        TrustError: `state` is sealed and cannot be opened, or other accounts can reach it.
    """
    site_dir = site_dir.resolve()
    site = read_site(site_dir)
    state = (state or state_of(site_dir)).resolve()
    if tls_ca is not None and not tls_ca.is_file():
        raise DeploymentError(f"{tls_ca}: no such file. Give the certificate authority of the server, in PEM.")
    if not server.rpartition(":")[2].isdigit():
        raise DeploymentError(f"server {server!r}: expected host:port, such as 10.0.0.5:9140.")
    open_seal(state, tell)  # said here and now, and not in a log at the first message
    children = children_of(site, site_dir, server, state, tls_ca, client_app)
    tell(f"site {site.name}: asking {server} for work; state in {state}. Ctrl-C ends it.")
    Supervisor(children, state, {"role": "client", "site": site.name, "server": server}).run()


def children_of(
    site: SiteConfig, site_dir: Path, server: str, state: Path, tls_ca: Path | None, client_app: str
) -> list[Child]:
    """The two processes of a plant, SuperNode first: ended last, so that a last answer still gets out."""
    secret = make_secret(state / "secret")
    runtime = f"127.0.0.1:{_free_port()}"
    transport = ["--root-certificates", str(tls_ca.resolve())] if tls_ca else ["--insecure"]
    config = f"site={_quoted(site_dir)} state={_quoted(state)}"
    node = [
        *(sys.executable, "-m", "trunkline.flower", "supernode", "--node-file", str(state / "node.json")),
        *transport,
        *("--superlink", server, "--isolation", "process", "--superexec-auth-secret-file", str(secret)),
        *("--host", "127.0.0.1", "--port", runtime.rpartition(":")[2], "--node-config", config),
    ]
    worker = [
        *(sys.executable, "-m", "trunkline.client.executor", "--runtime", runtime, "--secret", str(secret)),
        *("--journal", str(state / "journal.json"), "--pins", str(state / "pins.txt")),
        *("--app", client_app, "--site", site.name),
    ]
    env = environment(state)
    return [
        Child("supernode", node, env, state / "logs" / "supernode.log"),
        Child("executor", worker, env, state / "logs" / "executor.log"),
    ]


def status(site_dir: Path, state: Path | None = None) -> dict[str, Any]:
    """What this site's daemon last wrote: running, site, server, children (name, pid, since, restarts, last_exit)."""
    return read_status((state or state_of(site_dir)).resolve())


def print_status(found: dict[str, Any], console: "Console") -> None:
    """What `status` found, for a person."""
    console.print(f"site {found['site']}, server {found['server']}", markup=False)
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
