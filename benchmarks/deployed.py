"""What a deployed round costs beyond its training, and what the gateway costs where trunks are large: real processes on loopback.

python benchmarks/deployed.py [--case round large] [--rounds 12] [--megabytes 50] [--repeats 6] [--out FILE.json]

`round`: a federation of the four built-in plants and a small trunk, made and joined by the commands that ship; of each round its seconds,
and the longest that a plant's ClientApp took in it. `large`: two plants through the gateway and two straight at the same SuperLink (TLS and
node authentication there too) are sent and send back arrays of so many megabytes, in turns.
"""

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from flwr.app import Context, Message
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp

from trunkline.flower.app_archive import app_digest
from trunkline.flower.control import run_status, submit
from trunkline.flower.records import open_records, to_records
from trunkline.server.rounds.messaging import ask
from trunkline.server.rounds.superlink import transport_of

TRUNKLINE = [sys.executable, "-m", "trunkline.cli.app"]
RUN = """
name = "round"
rounds = {rounds}
seed = 5
[training]
steps = 3
batch_size = 32
[trunk]
width = 16
[cohort]
min_sites = 4
[report]
baseline = false
"""
SITE = """
name = "{name}"
[data]
files = "*.csv"
channels = ["a"]
[tasks.wear]
kind = "regression"
target = "wear"
unit = "mm"
"""
APP = """
[project]
name = "large"
version = "1.0.0"
description = "x"
license = "Apache-2.0"
dependencies = []
[tool.flwr.app]
publisher = "benchmarks"
[tool.flwr.app.components]
serverapp = "deployed:server_app"
clientapp = "deployed:client_app"
[tool.flwr.app.config]
out = ""
groups = ""
megabytes = 50
repeats = 1
"""
client_app = ClientApp()
server_app = ServerApp()


@client_app.train()
def echo(message: Message, context: Context) -> Message:
    """The arrays back, changed: what is equal to what a SuperLink has already is not sent again."""
    arrays, header, _ = open_records(message.content)
    return Message(to_records({name: array + os.getpid() for name, array in arrays.items()}, header), reply_to=message)


@server_app.main()
def measure(grid: Grid, context: Context) -> None:
    """Ask each group in turn; the seconds until all of it have answered, as JSON in `out`."""
    config = context.run_config
    groups: dict[str, list[int]] = json.loads(str(config["groups"]))
    nodes = {node for group in groups.values() for node in group}
    wait(120.0, "all plants online", lambda: nodes <= set(grid.get_node_ids()))
    rng = np.random.default_rng(0)
    seconds: dict[str, list[float]] = {name: [] for name in groups}
    for repeat in range(int(config["repeats"]) + 1):
        for name in list(groups) if repeat % 2 else list(groups)[::-1]:  # neither is always the one that comes first
            array = rng.normal(size=int(config["megabytes"]) * 250_000).astype(np.float32)
            content = to_records({"w": array}, "{}")
            began = time.monotonic()
            answers = ask(
                transport_of(grid), "train", {node: lambda content=content: content for node in groups[name]},
                round=repeat, deadline_s=300.0, resend_s=300.0,
            )  # fmt: skip
            failures = [one.failure for one in answers if one.content is None]
            assert not failures, failures
            if repeat:  # the first warms up
                seconds[name].append(time.monotonic() - began)
    Path(str(config["out"])).write_text(json.dumps(seconds))


def wait(seconds: float, what: str, found: Callable[[], Any]) -> Any:
    end = time.monotonic() + seconds
    while not (value := found()):
        if time.monotonic() > end:
            raise TimeoutError(f"{what}: not within {seconds:g} s")
        time.sleep(0.2)
    return value


class Stage:
    """A centre and what was started beside it; everything ends with it."""

    def __init__(self, root: Path) -> None:
        self.root, self.server = root, root / "s"
        self.port = free_port()
        self.environment = {
            **os.environ,
            "XDG_CONFIG_HOME": str(root / "config"),
            "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]),
        }
        self.running: list[subprocess.Popen[bytes]] = []

    def __enter__(self) -> "Stage":
        self.command("server", "init", "--host", "127.0.0.1", "--state", str(self.server))
        self.begin("server", [*TRUNKLINE, "server", "start", "--port", str(self.port), "--state", str(self.server)])
        wait(60.0, "the centre", lambda: "ready: " in (self.root / "server.log").read_text())
        return self

    def __exit__(self, *failure: object) -> None:
        for process in reversed(self.running):
            process.terminate()
        for process in self.running:
            process.wait(20.0)

    def command(self, *arguments: str) -> str:
        done = subprocess.run(
            [*TRUNKLINE, *arguments], env=self.environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def begin(self, name: str, argv: list[str]) -> None:
        with (self.root / f"{name}.log").open("ab") as log:
            self.running.append(subprocess.Popen(argv, env=self.environment, stdout=log, stderr=log))

    def join(self, folder: Path) -> Path:
        code = re.findall(
            r"^ +(\S+-\S+)$", self.command("server", "invite", folder.name, "--state", str(self.server)), re.M
        )
        state = self.root / "plants" / folder.name
        self.command("client", "join", str(folder), f"127.0.0.1:{self.port}", "--code", code[0], "--state", str(state))
        return state


def free_port() -> int:
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def small_rounds(root: Path, rounds: int) -> dict[str, Any]:
    """Of each round but the first: seconds, the slowest plant's ClientApp, and the difference."""
    from trunkline.simulations.factories import write_sites

    plants = sorted(write_sites("synthetic", root / "sites", groups=12))
    with Stage(root) as stage:
        states = [stage.join(plant) for plant in plants]
        for plant, state in zip(plants, states, strict=True):
            stage.begin(plant.name, [*TRUNKLINE, "client", "start", str(plant), "--state", str(state)])
        (root / "run.toml").write_text(RUN.format(rounds=rounds))
        out = root / "out"
        stage.command("server", "run", str(root / "run.toml"), "--out", str(out), "--state", str(stage.server))
        events = [json.loads(line) for line in (out / "events.jsonl").read_text().splitlines()]
        took = [event["seconds"] for event in events if event["event"] == "round_end"][1:]
        apps = []
        for state in states:
            log = (state / "logs" / "executor.log").read_text()
            apps.append([float(found) for found in re.findall(r"train: a reply .* app took ([\d.]+) s", log)][1:])
        longest = [max(one) for one in zip(*apps, strict=True)]
        beyond = [whole - app for whole, app in zip(took, longest, strict=True)]
    return {
        "case": "round", "rounds": len(took), "round_s": statistics.median(took), "app_s": statistics.median(longest),
        "beyond_s": statistics.median(beyond), "beyond_worst_s": max(beyond),
    }  # fmt: skip


NEAR = """
import sys
from pathlib import Path
from trunkline.client.agent import daemon
from trunkline.config.site import read_site
from trunkline.runtime.supervisor import Supervisor
site, state, server, ca = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3], sys.argv[4]
children = daemon.children_of(read_site(site), site, server or "127.0.0.1:1", state, "deployed:client_app", door=False)
if ca:  # straight at the SuperLink: its own certificate to trust, and none of ours to show
    argv = list(children[0].argv)
    at = argv.index("--identity")
    del argv[at : at + 2]
    argv[argv.index("--root-certificates") + 1] = ca
    children[0] = type(children[0])(children[0].name, argv, children[0].env, children[0].log)
Supervisor(children, state).run()
"""


def large_trunks(root: Path, megabytes: int, repeats: int) -> dict[str, Any]:
    """Throughput through the gateway relative to straight at the SuperLink; medians of the same run."""
    from trunkline.server.membership.registry import Registry
    from trunkline.server.operations.daemon import status

    app = root / "app"
    app.mkdir()
    (app / "pyproject.toml").write_text(APP)
    with Stage(root) as stage:
        address, ca = status(stage.server)["address"], stage.server / "loopback.crt"
        (stage.server / "pins.txt").write_text(app_digest(app) + "\n")
        groups: dict[str, list[str]] = {"gateway": ["far-1", "far-2"], "direct": ["near-1", "near-2"]}
        for way, names in groups.items():
            for name in names:
                folder = root / "sites" / name
                folder.mkdir(parents=True)
                (folder / "site.toml").write_text(SITE.format(name=name))
                state = stage.join(folder)
                (state / "pins.txt").write_text(app_digest(app) + "\n")
                there = [f"127.0.0.1:{stage.port}", ""] if way == "gateway" else [address, str(ca)]
                stage.begin(name, [sys.executable, "-c", NEAR, str(folder), str(state), *there])
        sites = {site: node for node, site in Registry(stage.server).read().nodes().items()}
        nodes = {way: [sites[name] for name in names] for way, names in groups.items()}
        out = root / "large.json"
        config = {"out": str(out), "groups": json.dumps(nodes), "megabytes": megabytes, "repeats": repeats}
        run = submit(address, app, config, ca=ca.read_bytes())
        wait(1500.0, "the run", lambda: run_status(address, run, ca=ca.read_bytes())[0].startswith("finished"))
        assert out.exists(), run_status(address, run, ca=ca.read_bytes())
    seconds = json.loads(out.read_text())
    pairs = [direct / gateway for direct, gateway in zip(seconds["direct"], seconds["gateway"], strict=True)]
    return {
        "case": "large", "megabytes": megabytes, "repeats": repeats, "ratio": statistics.median(pairs),
        "ratio_low": min(pairs), "ratio_high": max(pairs),
        **{f"{way}_s": statistics.median(found) for way, found in seconds.items()},
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--case", nargs="+", choices=("round", "large"), default=["round", "large"])
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--megabytes", type=int, default=50)
    parser.add_argument("--repeats", type=int, default=6)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    rows = []
    for case in options.case:
        with tempfile.TemporaryDirectory(prefix="tl-") as folder:
            root = Path(folder)
            if case == "round":
                row = small_rounds(root, options.rounds)
                print(
                    f"four plants, small trunk: a round {row['round_s']:.2f} s, of which the slowest plant's app {row['app_s']:.2f} s; "
                    f"beyond it {row['beyond_s']:.2f} s (worst of {row['rounds']}: {row['beyond_worst_s']:.2f} s)"
                )
            else:
                row = large_trunks(root, options.megabytes, options.repeats)
                print(
                    f"two plants, {options.megabytes} MB each way: straight {row['direct_s']:.2f} s, through the gateway {row['gateway_s']:.2f} s; "
                    f"gateway/direct throughput {row['ratio']:.2f} ({row['ratio_low']:.2f} to {row['ratio_high']:.2f})"
                )
            rows.append(row)
    if options.out:
        options.out.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
