"""Loopback, Ray and a real deployment end with the same bytes for the same seed."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

import trunkline
from tests.loopback import QUICK, federate, trunk_of
from tests.server.signed import Federation
from trunkline.client.state.vault import Vault
from trunkline.release import RELEASE, verify_release
from trunkline.server.reporting.report import read_report

TRUNKLINE = [sys.executable, "-m", "trunkline.cli.app"]
pytestmark = pytest.mark.xdist_group("worlds")  # one worker: the reference run is made once
RUN = """
name = "worlds"
rounds = 3
seed = 5
[trunk]
width = 16
[training]
steps = 3
batch_size = 32
[strategy]
name = "fedrep"
[cohort]
min_sites = 4
deadline_s = 180
gather_s = 180
"""


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def daemon(log: Path, *arguments: str) -> Iterator[subprocess.Popen[bytes]]:
    """One of our daemons as a real process, ended by SIGTERM as systemd would, within its promised 10 s."""
    with log.open("wb") as file:
        process = subprocess.Popen([*TRUNKLINE, *arguments], stdout=file, stderr=subprocess.STDOUT)
        try:
            yield process
        finally:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(timeout=20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait(timeout=10)
                raise


def private_digests(states: dict[str, Path], run: str = "") -> dict[str, list[bytes]]:
    """Every site's stem and heads after the last round, and its personal model where it has one.

    Args:
        run: what the name of the run's folder in the vaults starts with, where a site took part in several.
    """
    found = {}
    for site, state in states.items():
        folder = sorted((state / "vault").glob(f"{run}*"))[0]
        entry = Vault(state, folder.name).before(10**6)
        assert entry is not None
        found[site] = [part[name].tobytes() for part in (entry.private, entry.personal) for name in sorted(part)]
    return found


@pytest.fixture(scope="module")
def reference(plants: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("loopback")
    settings = {
        **QUICK,
        "name": "worlds",
        "strategy": {"name": "fedrep"},
        "cohort": {"min_sites": 4, "deadline_s": 180.0, "gather_s": 180.0},
    }
    federate(plants, out, **{**settings, "report": {"baseline": True}})
    return out


def assert_same(one: Path, one_states: dict[str, Path], reference: Path, plants: list[Path]) -> None:
    assert trunk_of(one).digest() == trunk_of(reference).digest()
    assert private_digests(one_states) == private_digests(
        {plant.name: reference / "state" / plant.name for plant in plants}
    )
    assert read_report(one)["sites"] == read_report(reference)["sites"]


def simulate(plants: list[Path], tmp_path: Path, workers: str) -> list[str]:
    """The command line of a simulation into tmp_path/out."""
    (tmp_path / "run.toml").write_text(RUN)
    folders = ["--sites", str(plants[0].parent), "--out", str(tmp_path / "out")]
    return [*TRUNKLINE, "simulate", str(tmp_path / "run.toml"), *folders, "--workers", workers]


@pytest.mark.processes
@pytest.mark.parametrize("workers", ["2", *(pytest.param(count, marks=pytest.mark.slow) for count in ("0", "1", "3"))])
def test_a_simulated_run_ends_with_the_bytes_of_the_loopback_run(
    plants: list[Path], tmp_path: Path, reference: Path, workers: str
) -> None:
    command = simulate(plants, tmp_path, workers)
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "is federation worth it?" in done.stdout
    assert_same(
        tmp_path / "out", {plant.name: tmp_path / "out" / "state" / plant.name for plant in plants}, reference, plants
    )


@pytest.mark.slow
@pytest.mark.processes
@pytest.mark.timeout(280)
def test_a_deployed_run_ends_with_the_bytes_of_the_loopback_run(
    plants: list[Path], tmp_path: Path, reference: Path
) -> None:
    (tmp_path / "run.toml").write_text(RUN)
    server_state = tmp_path / "server"
    federation = Federation.of("north")
    federation.centre(server_state)
    with deployed(plants, tmp_path) as (port, states):
        run_there(tmp_path, tmp_path / "run.toml", tmp_path / "out")
        status = subprocess.run(
            [*TRUNKLINE, "server", "status", "--state", str(server_state)],
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert status.returncode == 0
        assert "superlink" in status.stdout
        by_flwr_run(port, tmp_path)
    assert trunk_of(tmp_path / "by-flwr-run").digest() == trunk_of(reference).digest()
    assert_same(tmp_path / "out", states, reference, plants)
    assert verify_release(tmp_path / "out" / RELEASE, federation.authority).right
    assert "nobody signed it" in verify_release(tmp_path / "by-flwr-run" / RELEASE, federation.authority).text
    events = [json.loads(line) for line in (tmp_path / "out" / "events.jsonl").read_text().splitlines()]
    assert events[-1]["event"] == "done"
    for plant in plants:  # the plant's folder is as it was: state lies where it was told to
        assert not (plant / ".trunkline").exists()


@contextmanager
def deployed(plants: list[Path], tmp_path: Path) -> Iterator[tuple[int, dict[str, Path]]]:
    """The server's daemon and every plant's as processes below tmp_path: the server's port, and plant -> state folder."""
    port = free_port()
    states = {plant.name: tmp_path / "plants" / plant.name for plant in plants}
    with ExitStack() as running:
        server = ("server", "start", "--state", str(tmp_path / "server"), "--port", str(port))
        running.enter_context(daemon(tmp_path / "server.log", *server))
        wait_for_port(port, tmp_path / "server.log")
        for plant in plants:
            client = (
                "client",
                "start",
                str(plant),
                "--server",
                f"127.0.0.1:{port}",
                "--state",
                str(states[plant.name]),
            )
            running.enter_context(daemon(tmp_path / f"{plant.name}.log", *client))
        yield port, states


def run_there(tmp_path: Path, run: Path, out: Path) -> None:
    """`trunkline server run` on the daemons of `deployed`, to its end."""
    command = [*TRUNKLINE, "server", "run", str(run), "--state", str(tmp_path / "server"), "--out", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, check=False)
    logs = "\n".join(f"--- {path.name}\n{path.read_text()[-2000:]}" for path in tmp_path.glob("*.log"))
    assert done.returncode == 0, done.stdout + done.stderr + logs


def by_flwr_run(port: int, tmp_path: Path) -> None:
    """Who already has Flower submits the same app with Flower's own command."""
    home = tmp_path / "flwr-home"
    home.mkdir()
    (home / "config.toml").write_text(
        f'[superlink]\ndefault = "ours"\n[superlink.ours]\naddress = "127.0.0.1:{port}"\ninsecure = true\n'
    )
    out = tmp_path / "by-flwr-run"
    settings = f'run-toml="{tmp_path / "run.toml"}" out="{out}"'
    flwr = Path(sys.executable).with_name("flwr")
    environment = {
        **os.environ,
        "FLWR_HOME": str(home),
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
    }
    app = Path(trunkline.__file__).parent / "app"
    done = subprocess.run(
        [flwr, "run", str(app), "ours", "-c", settings],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        env=environment,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    end = time.monotonic() + 120
    while not (out / "report.json").exists():
        assert time.monotonic() < end, done.stdout
        time.sleep(0.2)


def wait_for_port(port: int, log: Path) -> None:
    end = time.monotonic() + 60
    while time.monotonic() < end:
        with socket.socket() as probe:
            probe.settimeout(1)
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.2)
    raise AssertionError(f"the server did not listen on {port}:\n{log.read_text()[-3000:]}")


@pytest.mark.processes
@pytest.mark.slow
def test_ctrl_c_ends_a_simulation_cleanly_and_resume_goes_on_to_the_same_bytes(
    plants: list[Path], tmp_path: Path, reference: Path
) -> None:
    out = tmp_path / "out"
    command = simulate(plants, tmp_path, "1")
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    end = time.monotonic() + 120
    while time.monotonic() < end and not (out / "checkpoint" / "round-000001.safetensors").exists():
        assert process.poll() is None, process.communicate()
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    _, complaint = process.communicate(timeout=60)
    assert process.returncode == 130, complaint
    assert "--resume" in complaint
    assert "Traceback" not in complaint
    again = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert again.returncode == 1
    assert "unfinished run" in again.stderr
    done = subprocess.run(
        [*command, "--resume"], capture_output=True, text=True, timeout=200, check=False, env={**os.environ}
    )
    assert done.returncode == 0, done.stderr
    assert_same(out, {plant.name: out / "state" / plant.name for plant in plants}, reference, plants)
