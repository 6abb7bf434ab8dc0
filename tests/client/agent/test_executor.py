"""A real SuperLink, its launcher, a SuperNode and the executor, all on loopback, by the daemons that ship."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.federation import TRUNKLINE, free_port, within
from trunkline.errors import DeploymentError
from trunkline.flower.app_archive import app_digest
from trunkline.flower.control import list_nodes, run_status, submit
from trunkline.runtime.incidents import read_incidents
from trunkline.runtime.lock import read_status

pytestmark = [
    pytest.mark.processes,
    pytest.mark.xdist_group("processes"),
    pytest.mark.filterwarnings("ignore:GitWildMatchPattern:DeprecationWarning"),  # Flower with pathspec 1.x
]
ROOT = Path(__file__).parents[3]  # not `tests`: a module in it may have the name of a package
SITE_TOML = """
name = "press-07"
[data]
files = "*.csv"
channels = ["a"]
window = 8
[tasks.wear]
kind = "regression"
target = "wear"
unit = "mm"
"""
APP = """
[project]
name = "tiny"
version = "1.0.0"
description = "x"
license = "Apache-2.0"
dependencies = []
[tool.flwr.app]
publisher = "tests"
[tool.flwr.app.components]
serverapp = "tests.tiny_apps:server_app"
clientapp = "{client}"
[tool.flwr.app.config]
out = ""
header = "{{}}"
rounds = 1
nodes = 1
retries = 0
"""


def daemon(code: str, log: Path, systemd: str = "") -> "subprocess.Popen[bytes]":
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    with log.open("ab") as file:
        return subprocess.Popen(
            [sys.executable, "-c", code],
            env={**os.environ, "PYTHONPATH": path, "NOTIFY_SOCKET": systemd},
            stdout=file,
            stderr=file,
        )


class Deployment:
    """One centre and one plant."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.port = free_port()
        self.address = f"127.0.0.1:{self.port}"
        self.server_state, self.site = root / "server", root / "a plant"
        self.client_state = self.site / ".trunkline"
        self.site.mkdir()
        (self.site / "site.toml").write_text(SITE_TOML)
        self.thin = self.app("tests.tiny_apps:client_app")
        self.client_state.mkdir()
        self.server_state.mkdir()
        for state in (self.client_state, self.server_state):
            self.pin(state, self.thin)
        self.systemd = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.systemd.bind(str(root / "n"))
        self.server = daemon(
            "from pathlib import Path; from trunkline.server.operations import daemon; "
            f"daemon.start(Path({str(self.server_state)!r}), port={self.port})",
            root / "server.log",
            str(root / "n"),
        )
        self.client = daemon(
            "from pathlib import Path; from trunkline.client.agent import daemon; "
            f"daemon.start(Path({str(self.site)!r}), server={self.address!r}, client_app='tests.tiny_apps:client_app', check_egress=False)",
            root / "client.log",
        )

    @staticmethod
    def pin(state: Path, app: Path) -> None:
        with (state / "pins.txt").open("a") as file:
            file.write(f"{app_digest(app)}  # the tests' app\n")

    def app(self, client: str, code: dict[str, str] | None = None) -> Path:
        folder = self.root / f"app-{len(list(self.root.glob('app-*')))}"
        for name, text in {"pyproject.toml": APP.format(client=client), **(code or {})}.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_text(text)
        return folder

    def start(self, folder: Path, **config: str | int) -> tuple[int, Path]:
        out = self.root / f"out-{len(list(self.root.glob('out-*')))}.jsonl"
        out.touch()
        return submit(self.address, folder, {"out": str(out), **config}), out

    def finish(self, run: int, out: Path, seconds: float = 40.0) -> list[dict[str, Any]]:
        def finished() -> bool:
            return run_status(self.address, run)[0].startswith("finished")

        within(seconds, f"run {run}", finished)
        assert run_status(self.address, run)[0] == "finished:completed", self.logs()
        return [json.loads(line) for line in out.read_text().splitlines()]

    def child(self, name: str) -> int | None:
        status = read_status(self.client_state)
        return {one["name"]: one["pid"] for one in status["children"]}[name]

    def logs(self) -> str:
        files = [*self.root.glob("*.log"), *self.root.glob("*/.trunkline/logs/*"), *self.server_state.glob("logs/*")]
        return "\n".join(f"--- {file}\n{file.read_text(errors='replace')[-3000:]}" for file in files)

    def online(self) -> list[int]:
        try:
            return [node["node"] for node in list_nodes(self.address) if node["status"] == "online"]
        except DeploymentError:
            return []

    def told_systemd(self) -> list[str]:
        """What the server has told systemd since this was last asked."""
        self.systemd.setblocking(False)
        heard: list[str] = []
        with contextlib.suppress(BlockingIOError):
            while True:
                heard += self.systemd.recv(4096).decode().split("\n")
        return heard

    def status(self, *arguments: str, columns: int = 100) -> tuple[str, int]:
        """Output and exit code of a `status` command."""
        done = subprocess.run(
            [*TRUNKLINE, *arguments], env={**os.environ, "COLUMNS": str(columns)}, capture_output=True, text=True, timeout=60.0, check=False
        )  # fmt: skip
        assert "Traceback" not in done.stderr, done.stderr
        return done.stdout, done.returncode

    def end(self) -> None:
        self.systemd.close()
        for process in (self.client, self.server):
            process.terminate()
        for process in (self.client, self.server):
            try:
                process.wait(12.0)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait(5.0)
                raise


@pytest.fixture(scope="module")
def deployment(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployment]:
    made = Deployment(tmp_path_factory.mktemp("deployment"))
    try:
        within(40.0, "the plant is online", made.online)
        yield made
    finally:
        made.end()


def test_one_executor_answers_every_round(deployment: Deployment) -> None:
    lines = deployment.finish(*deployment.start(deployment.thin, rounds=3))
    assert [line["value"] for line in lines] == [1.0, 2.0, 3.0], deployment.logs()
    assert {line["pid"] for line in lines} == {deployment.child("executor")}
    assert [line["calls"] for line in lines] == [1, 2, 3]
    assert {line["site"] for line in lines} == {str(deployment.site)}, "the folder is the one the plant named"


@pytest.mark.slow
def test_a_foreign_app_is_refused_and_nothing_of_it_runs(deployment: Deployment) -> None:
    marker = deployment.root / "was-run"
    code = f"""
from pathlib import Path
Path({str(marker)!r}).write_text("import")
from flwr.clientapp import ClientApp
app = ClientApp()
"""
    folder = deployment.app("evil.client:app", {"evil/__init__.py": "", "evil/client.py": code})
    run, out = deployment.start(folder)
    within(40.0, "the centre has refused it", lambda: run_status(deployment.address, run)[0] == "finished:failed")
    assert "is not the one installed at this server" in run_status(deployment.address, run)[1]
    assert not out.read_text(), "nothing of its server side ran"
    deployment.pin(deployment.server_state, folder)  # an operator who lets it pass has not spoken for the plant
    (line,) = deployment.finish(*deployment.start(folder))
    assert line["error"] == 400 and "not pinned" in line["reason"] and line["to_request"]
    assert not marker.exists()
    assert not (deployment.client_state / "flwr" / "apps").exists(), "nothing is unpacked at the plant"
    (line,) = deployment.finish(*deployment.start(deployment.thin))
    assert line["value"] == 1.0, "the site serves on"


def test_a_site_that_raises_answers_with_an_error_and_no_path(deployment: Deployment) -> None:
    (line,) = deployment.finish(*deployment.start(deployment.thin, header='{"fail": 1}'))
    assert line["error"] == 2 and "rows.csv: asked to fail" in line["reason"]
    assert "secret" not in line["reason"]


def test_what_is_not_a_reply_becomes_an_error_reply_and_the_site_serves_on(deployment: Deployment) -> None:
    (line,) = deployment.finish(*deployment.start(deployment.thin, header='{"not_a_reply": 1}'))
    assert line["error"] == 2 and "not a reply" in line["reason"]


def test_an_answer_that_the_disk_does_not_take_is_asked_for_again(deployment: Deployment) -> None:
    marker = deployment.root / "full"
    run, out = deployment.start(
        deployment.thin, header=json.dumps({"full_once": str(marker), "run": "pumps"}), retries=2
    )
    lines = deployment.finish(run, out)
    assert [line.get("error") for line in lines] == [405, None] and lines[0]["reason"] == "its disk is full; ask again"
    notes = [one for one in read_incidents(deployment.client_state, 100) if one.get("about") == "room"]
    assert [one["kind"] for one in notes] == ["failure", "recovery"] and "its disk is full" in notes[0]["text"]


@pytest.mark.slow
def test_status_says_in_plain_words_what_each_part_does(deployment: Deployment) -> None:
    deployment.finish(*deployment.start(deployment.thin, header=json.dumps({"run": "pumps", "round": 7})))
    plant = ("client", "status", str(deployment.site))
    said, code = deployment.status(*plant)
    assert f"asks {deployment.address} for work" in said and "idle since" in said, said
    assert "last: training round 7 of pumps answered at" in said and code == 0, said
    found = json.loads(deployment.status(*plant, "--json")[0])
    assert found["well"] and found["activity"]["last"]["run"] == "pumps" and found["disk"]["free_bytes"] > 0

    centre = ("server", "status", "--state", str(deployment.server_state))
    said, code = deployment.status(*centre, columns=80)
    assert f"serving 1 of 1 sites at {deployment.address}" in said.replace("\n" + 14 * " ", " "), said
    assert max(map(len, said.splitlines())) <= 80 and code == 0, said
    found = json.loads(deployment.status(*centre, "--json")[0])
    assert found["well"] and found["runs"] and {one["status"] for one in found["nodes"]} >= {"online"}

    pid = deployment.child("executor")
    assert pid is not None
    os.kill(pid, signal.SIGSTOP)
    try:
        within(10.0, "it is seen", lambda: read_status(deployment.client_state)["troubles"])
        said, code = deployment.status(*plant)
        assert code == 1 and "executor stands still: somebody has stopped it" in said
    finally:
        os.kill(pid, signal.SIGCONT)
    within(10.0, "it goes on", lambda: not read_status(deployment.client_state)["troubles"])


def test_systemd_is_told_when_the_centre_serves(deployment: Deployment) -> None:
    heard = deployment.told_systemd()
    assert heard.count("READY=1") == 1 and heard.index("READY=1") > heard.index("STATUS=starting")
    assert f"STATUS=serving at {deployment.address}; no run under way" in heard


def test_an_executor_killed_within_a_task_costs_seconds(deployment: Deployment) -> None:
    marker = deployment.root / "killed" / "pid"
    run, out = deployment.start(deployment.thin, header=json.dumps({"sleep_once": str(marker)}), retries=2)
    pid = int(within(20.0, "the task has begun", lambda: marker.exists() and marker.read_text()))
    assert pid == deployment.child("executor")
    os.kill(pid, signal.SIGKILL)
    killed = time.monotonic()
    lines = deployment.finish(run, out)
    assert time.monotonic() - killed < 25.0, deployment.logs()
    assert [line.get("error") for line in lines] == [401, None]
    assert lines[-1]["pid"] != pid


@pytest.mark.slow
def test_an_executor_told_to_end_within_a_task_answers_first(deployment: Deployment) -> None:
    marker = deployment.root / "told" / "pid"
    run, out = deployment.start(deployment.thin, header=json.dumps({"sleep_once": str(marker)}), retries=2)
    pid = int(within(20.0, "the task has begun", lambda: marker.exists() and marker.read_text()))
    os.kill(pid, signal.SIGTERM)
    within(10.0, "the executor has ended", lambda: deployment.child("executor") != pid)
    lines = deployment.finish(run, out)
    assert [line.get("error") for line in lines] == [401, None] and "shutting down" in lines[0]["reason"]


@pytest.mark.slow
def test_a_killed_supernode_leaves_no_ghost(deployment: Deployment) -> None:
    (before,) = deployment.online()
    pid = deployment.child("supernode")
    assert pid is not None
    os.kill(pid, signal.SIGKILL)
    (after,) = within(20.0, "a new session", lambda: [one for one in deployment.online() if one != before])
    within(5.0, "the old one is signed off", lambda: deployment.online() == [after])
    (line,) = deployment.finish(*deployment.start(deployment.thin))
    assert line["value"] == 1.0


def test_a_second_daemon_on_one_state_folder_is_refused(deployment: Deployment) -> None:
    from trunkline.client.agent import daemon

    with pytest.raises(DeploymentError, match=f"pid {deployment.client.pid}"):
        daemon.start(deployment.site, server=deployment.address, emit=lambda text: None)
