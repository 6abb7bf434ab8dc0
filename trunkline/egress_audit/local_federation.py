"""A real server and real clients as processes on this machine, for the length of an audit."""

import contextlib
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from trunkline.config.run import RunConfig
from trunkline.errors import DeploymentError
from trunkline.runtime.programs import accepts_connections
from trunkline.server.operations import daemon as server_daemon
from trunkline.server.operations.run_store import RunStore

READY_S, RUN_S, END_S = 60.0, 240.0, 20.0  # s that a process may take to be ready, to run, and to end
APP = "trunkline.client.app:app"


@contextlib.contextmanager
def python_process(code: str, log: Path) -> Iterator["subprocess.Popen[bytes]"]:
    """A child process of this Python, ended by SIGTERM, or killed if that takes too long."""
    with log.open("ab") as file:
        child = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.DEVNULL, stdout=file, stderr=file)
        try:
            yield child
        finally:
            child.send_signal(signal.SIGTERM)
            try:
                child.wait(END_S)
            except subprocess.TimeoutExpired:
                child.kill()
                child.wait(END_S)


@contextlib.contextmanager
def server_process(root: Path) -> Iterator[int]:
    """The server's daemon, its state in `root`/server; the port it listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = int(probe.getsockname()[1])
    code = f"from pathlib import Path; from trunkline.server.operations import daemon; daemon.start(Path({str(root / 'server')!r}), port={port})"
    with python_process(code, root / "server.log") as child:
        _until(READY_S, "the server", root / "server.log", lambda: accepts_connections(f"127.0.0.1:{port}"), child)
        yield port


def client_process(
    folder: Path, state: Path, port: int, app: str = APP
) -> contextlib.AbstractContextManager["subprocess.Popen[bytes]"]:
    """A client's daemon that asks the server at 127.0.0.1:`port` for work."""
    code = (
        "from pathlib import Path; from trunkline.client.agent import daemon; "
        f"daemon.start(Path({str(folder)!r}), server='127.0.0.1:{port}', state=Path({str(state)!r}), client_app={app!r})"
    )
    return python_process(code, state.parent / f"{state.name}.log")


def run_to_end(root: Path, run: RunConfig) -> Path:
    """Submit `run` to the server of `root` and wait until it is completed; its folder.

    Raises:
        DeploymentError: it failed, was stopped, or did not end in time.
    """
    out = root / "out"
    record = server_daemon.run(root / "server", run.model_dump_json(), out)
    end = time.monotonic() + RUN_S
    store = RunStore(root / "server")
    while (record := store.get(record.key)).open:
        if time.monotonic() > end:
            raise DeploymentError(
                f"the run did not end within {RUN_S:.0f} s: {record.state}. {_tail(root / 'server.log')}"
            )
        time.sleep(0.2)
    if record.state != "completed":
        raise DeploymentError(f"the run ended as {record.state}: {server_daemon.last_error(out) or record.note}")
    return out


def _until(
    seconds: float, name: str, log: Path, done: Callable[[], bool], child: "subprocess.Popen[bytes] | None" = None
) -> None:
    end = time.monotonic() + seconds
    while not done():
        if time.monotonic() > end or (child is not None and child.poll() is not None):
            raise DeploymentError(f"{name} is not ready. {_tail(log)}")
        time.sleep(0.05)


def _tail(log: Path) -> str:
    return f"{log.name}: {log.read_text(errors='replace')[-800:]}" if log.exists() else ""
