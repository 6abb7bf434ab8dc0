"""A whole federation on loopback, by the commands that ship: real processes, real sockets, real certificates."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

TRUNKLINE = [sys.executable, "-m", "trunkline.cli.app"]
CODE = re.compile(r"^ +((?:[A-Z2-7]{5}-){10}[A-Z2-7]{5})$", re.MULTILINE)


def within(seconds: float, what: Callable[[], str] | str, found: Callable[[], Any]) -> Any:
    """Poll until `found` is truthy; fail by name when it never is."""
    end = time.monotonic() + seconds
    while not (value := found()):
        if time.monotonic() > end:
            raise AssertionError(f"{what if isinstance(what, str) else what()}: not within {seconds} s")
        time.sleep(0.1)
    return value


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Federation:
    """One centre and the plants that joined it, below `root`.

    Args:
        init: further arguments of `server init`.
    """

    def __init__(self, root: Path, *init: str) -> None:
        self.root = root
        self.server = root / "s"
        self.port = free_port()
        self.address = f"127.0.0.1:{self.port}"
        self.states: dict[str, Path] = {}
        self.running: dict[str, subprocess.Popen[bytes]] = {}
        self.environment = {**os.environ, "XDG_CONFIG_HOME": str(root / "config")}
        self.command("server", "init", "--host", "127.0.0.1", "--name", "North presses", *init)

    def command(self, *arguments: str, fails: bool = False, seconds: float = 60.0) -> str:
        """A command's whole output; it must succeed, or fail where it should."""
        where = ["--state", str(self.server)] if arguments[0] == "server" else []
        done = subprocess.run(
            [*TRUNKLINE, *arguments, *where], env=self.environment, capture_output=True, text=True, timeout=seconds, check=False
        )  # fmt: skip
        said = done.stdout + done.stderr
        assert "Traceback" not in said, said
        assert (done.returncode != 0) == fails, f"{arguments}: rc {done.returncode}\n{said}"
        return said

    def begin(self, name: str, *arguments: str) -> subprocess.Popen[bytes]:
        """A command that goes on; its output in `<name>.log`."""
        with (self.root / f"{name}.log").open("ab") as log:
            self.running[name] = subprocess.Popen(
                [*TRUNKLINE, *arguments], env=self.environment, stdout=log, stderr=subprocess.STDOUT
            )
        return self.running[name]

    def start(self) -> None:
        self.begin("server", "server", "start", "--port", str(self.port), "--state", str(self.server))
        within(60.0, lambda: f"the centre is ready\n{self.logs()}", lambda: "ready: " in self.log("server"))

    def invite(self, site: str, *arguments: str) -> str:
        found = CODE.search(said := self.command("server", "invite", site, *arguments))
        assert found, said
        return found[1]

    def join(self, folder: Path, code: str | None = None, **options: Any) -> str:
        state = self.states.setdefault(folder.name, self.root / "plants" / folder.name)
        code = code or self.invite(folder.name)
        return self.command(
            "client", "join", str(folder), self.address, "--code", code, "--state", str(state), **options
        )

    def plant(self, folder: Path) -> None:
        """The daemon of a site that has joined."""
        self.begin(folder.name, "client", "start", str(folder), "--state", str(self.states[folder.name]))

    def run(self, toml: str, out: Path) -> subprocess.Popen[bytes]:
        path = self.root / f"{out.name}.toml"
        path.write_text(toml)
        return self.begin(out.name, "server", "run", str(path), "--out", str(out), "--state", str(self.server))

    def online(self) -> set[str]:
        from trunkline.errors import TrunklineError
        from trunkline.server.membership.registry import Registry
        from trunkline.server.operations import daemon

        try:
            nodes = {one["node"] for one in daemon.status(self.server)["nodes"] if one["status"] == "online"}
        except TrunklineError:
            return set()
        return {site for node, site in Registry(self.server).read().nodes().items() if node in nodes}

    def log(self, name: str) -> str:
        path = self.root / f"{name}.log"
        return path.read_text(errors="replace") if path.exists() else ""

    def logs(self) -> str:
        files = [*self.root.glob("*.log"), *self.root.glob("*/logs/*"), *self.root.glob("plants/*/logs/*")]
        return "\n".join(f"--- {file}\n{file.read_text(errors='replace')[-3000:]}" for file in files)

    def end(self) -> None:
        late = []
        for process in reversed(self.running.values()):
            process.send_signal(signal.SIGTERM)
        for name, process in self.running.items():
            try:
                process.wait(20.0)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait(5.0)
                late.append(name)
        assert not late, f"{late} did not end within 20 s of SIGTERM\n{self.logs()}"


@contextmanager
def federation(root: Path, *init: str) -> Iterator[Federation]:
    made = Federation(root, *init)
    try:
        yield made
    finally:
        made.end()


def events(out: Path) -> list[dict[str, Any]]:
    """What a run has told so far; a line that is being written is left for the next look."""
    try:
        text = (out / "events.jsonl").read_text()
    except FileNotFoundError:
        return []
    return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]


def rounds(out: Path) -> list[dict[str, Any]]:
    return [event for event in events(out) if event["event"] == "round_end"]
