"""The centre refuses to listen where anybody could submit code, and tells what became of a run."""

import json
import re
import socket
import tomllib
from pathlib import Path

import pytest
from typer.testing import CliRunner

from trunkline.cli.app import app
from trunkline.errors import DeploymentError
from trunkline.runtime.lock import Lock
from trunkline.runtime.supervisor import Supervisor
from trunkline.server.membership import authority
from trunkline.server.operations import daemon, run_supervisor
from trunkline.server.operations.run_store import RunStore


@pytest.mark.parametrize("host", ["0.0.0.0", "192.0.2.7", "::", "centre.example"])
def test_without_a_federation_the_server_listens_on_loopback_only(tmp_path: Path, host: str) -> None:
    with pytest.raises(DeploymentError, match=r"loopback only.*server init"):
        daemon.start(tmp_path, host=host)
    assert not (tmp_path / "status.json").exists()


def test_a_port_that_is_taken_is_named(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(DeploymentError, match=f"127.0.0.1:{port}: cannot listen"):
            daemon.start(tmp_path, port=port)


def test_without_a_daemon_nothing_is_submitted(tmp_path: Path) -> None:
    with pytest.raises(DeploymentError, match="no daemon has run"):
        daemon.run(tmp_path, "{}", tmp_path / "out")
    (tmp_path / "status.json").write_text(json.dumps({"role": "server", "address": "127.0.0.1:1", "children": []}))
    with pytest.raises(DeploymentError, match="no server runs on this state folder"):
        daemon.run(tmp_path, "{}", tmp_path / "out")


def test_a_run_is_told_the_state_folder_whose_key_signs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[dict[str, object]] = []
    monkeypatch.setattr(run_supervisor, "submit", lambda address, app, overrides, ca: told.append(overrides) or 7)
    monkeypatch.setattr(daemon, "superlink_of", lambda state: ("127.0.0.1:1", None))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "centre").mkdir()
    record = daemon.run(Path("centre"), '{"name": "r"}', Path("out"), patience_s=0.0)
    run_supervisor.RunSupervisor(tmp_path / "centre", "127.0.0.1:1", None, daemon.APP).look()
    assert RunStore(tmp_path / "centre").get(record.key).run_id == 7
    assert told[0]["state"] == str(tmp_path / "centre")  # the ServerApp has another working directory
    assert (told[0]["resume"], told[0]["out"]) == (0, str(tmp_path / "out"))
    app = tomllib.loads((daemon.APP / "pyproject.toml").read_text())
    assert set(told[0]) == set(app["tool"]["flwr"]["app"]["config"])


def test_a_run_that_failed_says_why_in_its_own_words(tmp_path: Path) -> None:
    store = RunStore(tmp_path)
    record = store.add("r", "{}", tmp_path / "out", resume=False)
    store.change(record.key, state="failed", note="2 of 5 sites answered")
    with pytest.raises(DeploymentError, match="failed: 2 of 5 sites answered"):
        daemon.wait(tmp_path, record.key, tmp_path / "out")


def test_a_server_that_is_down_is_waited_for_and_one_that_stays_away_is_not(tmp_path: Path) -> None:
    store = RunStore(tmp_path)
    record = store.add("r", "{}", tmp_path / "out", resume=False)
    (tmp_path / "status.json").write_text(json.dumps({"role": "server", "children": []}))
    with pytest.raises(DeploymentError, match="resumes by itself once one does"):
        list(daemon.follow(tmp_path, record.key, silence_s=0.0, poll_s=0.01))
    (tmp_path / "status.json").write_text("{ torn by a power cut")
    seen = []
    for one in daemon.follow(tmp_path, record.key, silence_s=60.0, poll_s=0.0):
        seen.append(one.state)
        steps: dict[str, dict[str, object]] = {
            "wanted": {"state": "running", "run_id": 3},
            "running": {"state": "completed"},
        }
        if one.state in steps:
            store.change(record.key, **steps[one.state])
    assert seen == ["wanted", "running", "completed"]


def test_systemd_is_told_only_when_gateway_and_superlink_both_accept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    supervisor = Supervisor([], tmp_path, {"listens": "127.0.0.1:2"}, said.append)
    open_ports: set[str] = set()
    monkeypatch.setattr(daemon, "accepts_connections", lambda address: address in open_ports)
    tick = daemon._watch(supervisor, "127.0.0.1:1", "127.0.0.1:2")
    for address, ready in (("", False), ("127.0.0.1:2", False), ("127.0.0.1:1", True)):
        open_ports.add(address)
        tick()
        assert supervisor.is_ready == ready
    tick()
    assert supervisor.headline == "serving at 127.0.0.1:2; no run under way"
    assert [line for line in said if line.startswith("ready: ")] == said


def test_an_invitation_names_the_port_of_the_server(tmp_path: Path) -> None:
    state = tmp_path / "s"
    authority.init(state, "north", ("server.example.com",), key=f"file:{tmp_path / 'key'}")

    def invited_to(*arguments: str) -> str:
        done = CliRunner().invoke(app, ["server", "invite", "press-07", "--state", str(state), *arguments])
        assert done.exit_code == 0, done.output
        return re.findall(r"join SITE_DIR (\S+) --code", done.output)[0]

    assert invited_to() == "server.example.com:9140", "no server has run here"
    for listens, address in (("0.0.0.0:9555", "server.example.com:9555"), ("[::]:9556", "server.example.com:9556")):
        (state / "status.json").write_text(json.dumps({"role": "server", "listens": listens}))
        assert invited_to() == address, "the port of the last server"
        with Lock(state):
            assert invited_to() == address, "the port of the running server"
    assert invited_to("--port", "443") == "server.example.com:443"
    (state / "status.json").write_text("{ torn by a power cut")
    assert invited_to() == "server.example.com:9140"
