"""A real federation on one machine whose plants and centre stand for machines of their own: line, disk and clock each."""

import contextlib
import json
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.chaos.machine import GO_ON, KILL, Clock, Disk, command_of, family, send
from tests.chaos.proxy import Proxy
from tests.federation import Federation, within
from trunkline.errors import TrunklineError
from trunkline.server.operations import daemon

CENTRE = "server"  # the name of its daemon, beside those of the plants
COMMON = ("ListRuns", "list-runs", "ListNodes", "list-nodes")  # in lines of a log that say nothing
BACK_S = 1.0  # after which a daemon that ended is started again: systemd's part (docs/deploy.md has Restart=always)
PLANT_MB, CENTRE_MB = 48, 160  # of disk: logs, a vault; and a database and the runs' folders


class World(Federation):
    """A Federation in whose parts faults can be put, and the stand-in for systemd that starts its daemons again.

    Args:
        root: everything is below; short, because the registrar's socket is.
        plants: their site folders. All of them join and are started.
    """

    def __init__(self, root: Path, plants: list[Path]) -> None:
        self.plants = {folder.name: folder for folder in plants}
        states = {name: root / "plants" / name for name in self.plants}
        self.disks = {name: Disk(state, PLANT_MB) for name, state in states.items()}
        self.disks[CENTRE] = Disk(root / "s", CENTRE_MB)
        library = Clock.build(root)
        self.clocks = {name: Clock(root / f"{name}.clock", library) for name in (*self.plants, CENTRE)}
        self.can_move_clocks = library is not None
        self.down: dict[str, float] = {}  # daemon -> monotonic time at which it is started again
        self.starts: dict[str, int] = {}
        self.proxy: Proxy | None = None
        self.running: dict[str, subprocess.Popen[bytes]] = {}
        self._patch = pytest.MonkeyPatch()
        try:
            super().__init__(root)
            # what reads a plant's sealed state here has to find its key where the plant put it
            self._patch.setenv("XDG_CONFIG_HOME", self.environment["XDG_CONFIG_HOME"])
            self.start()
            self.proxy = Proxy(self.port, list(self.plants))
            centre = self.address
            for name, folder in self.plants.items():
                self.states[name] = states[name]
                self.address = f"127.0.0.1:{self.proxy.lines[name].port}"
                self.join(folder, self.invite(name))
                self.plant(folder)
            self.address = centre
        except BaseException:
            self.end()
            raise

    def begin(self, name: str, *arguments: str) -> subprocess.Popen[bytes]:
        """As it is, with the clock of the machine that it is on."""
        own = self.clocks[name].environment if name in self.clocks else {}
        before, self.environment = self.environment, {**self.environment, **own}
        try:
            self.starts[name] = self.starts.get(name, 0) + 1
            return super().begin(name, *arguments)
        finally:
            self.environment = before

    def boot(self, name: str) -> None:
        """Start the daemon of a plant or of the centre again, as systemd would."""
        self.down.pop(name, None)
        if name == CENTRE:
            self.begin(CENTRE, "server", "start", "--port", str(self.port), "--state", str(self.server))
        else:
            self.plant(self.plants[name])

    def tend(self) -> None:
        """Start what has ended, a moment after it did. Call it often."""
        for name in (*self.plants, CENTRE):
            process = self.running.get(name)
            if process is not None and process.poll() is not None:
                self.down.setdefault(name, time.monotonic() + BACK_S)
                if time.monotonic() >= self.down[name]:
                    self.boot(name)

    def state_of(self, name: str) -> Path:
        return self.server if name == CENTRE else self.states[name]

    def pids(self, name: str, part: str = "") -> list[int]:
        """The processes of a machine, or of one part of it by the name that status.json gives it; `serverapp` too."""
        whole = family(self.running[name].pid)
        if not part:
            return whole
        if part == "serverapp":
            return [pid for pid in whole if "trunkline.server.operations.app_guard" in command_of(pid)]
        try:
            status = json.loads((self.state_of(name) / "status.json").read_bytes())
        except (OSError, ValueError):
            return []
        return [pid for one in status["children"] if one["name"] == part and (pid := one["pid"]) in whole]

    def kill(self, name: str, back_s: float) -> None:
        """The whole machine at once, as when its power goes; `tend` starts it again after `back_s`."""
        self.down[name] = time.monotonic() + back_s
        whole = self.pids(name)
        send(whole, signal.SIGSTOP)  # or the daemon would restart one of them between two kills
        send(self.pids(name), KILL)

    def problems(self) -> list[str]:
        """What is not as it should be with nothing wrong any more."""
        found = [
            f"{name}: its daemon is down" for name in (*self.plants, CENTRE) if self.running[name].poll() is not None
        ]
        found += [f"{name}: not online" for name in sorted(set(self.plants) - self.online())]
        return found

    def settle(self, seconds: float) -> None:
        """Wait until everything runs and every plant is online."""
        rest: list[str] = []
        looked = 0.0

        def well() -> bool:
            nonlocal looked, rest
            self.tend()
            if time.monotonic() - looked > 0.5:
                rest, looked = self.problems(), time.monotonic()
                return not rest
            return False

        within(seconds, lambda: f"all is well: {', '.join(rest)}", well)

    def log_tails(self, run: str = "", lines: int = 30) -> str:
        """The ends of the logs of a run and of all daemons and their parts, without what they say all the time."""
        mine = [self.root / f"{name}.log" for name in (run, CENTRE, *self.plants) if name]
        parts = [*self.root.glob("s/logs/*.log"), *self.root.glob("plants/*/logs/*.log")]
        tails = []
        for path in [one for one in (*mine, *parts) if one.exists()]:
            text = path.read_text(errors="replace").splitlines()
            said = [line for line in text if not any(word in line for word in COMMON)][-lines:]
            tails.append("\n".join([f"--- {path.relative_to(self.root)}", *said]))
        return "\n".join(tails)

    def stop_run(self) -> None:
        """End the newest run for good, so that the next drill has the plants to itself."""
        with contextlib.suppress(TrunklineError):
            daemon.stop(self.server, "drill")

    def end(self) -> None:
        for name, process in self.running.items():
            if process.poll() is None:
                send(self.pids(name), GO_ON)
        try:
            super().end()
        finally:
            self._patch.undo()
            if self.proxy is not None:
                self.proxy.close()
            for disk in self.disks.values():
                disk.free()
                disk.close()


@contextmanager
def world(root: Path, plants: list[Path]) -> Iterator[World]:
    """A World that is online, and everything of it gone afterwards."""
    made = World(root, plants)
    try:
        made.settle(90.0)
        yield made
    finally:
        made.end()
