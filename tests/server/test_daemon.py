"""The centre refuses to listen where anybody could submit code, and tells what became of a run."""

import json
import socket
import tomllib
from pathlib import Path

import pytest

from trunkline.errors import DeploymentError
from trunkline.server import daemon


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
    monkeypatch.setattr(daemon, "_where", lambda state: ("127.0.0.1:1", None))
    monkeypatch.setattr(daemon, "submit", lambda address, app, overrides, ca: told.append(overrides) or 7)
    monkeypatch.chdir(tmp_path)
    assert daemon.run(Path("centre"), "{}", Path("out")) == 7
    assert told[0]["state"] == str(tmp_path / "centre")  # the ServerApp has another working directory
    app = tomllib.loads((daemon.APP / "pyproject.toml").read_text())
    assert set(told[0]) == set(app["tool"]["flwr"]["app"]["config"])


def watched(monkeypatch: pytest.MonkeyPatch, *found: tuple[str, str] | DeploymentError) -> None:
    monkeypatch.setattr(daemon, "_where", lambda state: ("127.0.0.1:1", None))
    script = list(found)

    def status(address: str, run_id: int, *, ca: bytes | None) -> tuple[str, str]:
        one = script.pop(0)
        if isinstance(one, DeploymentError):
            raise one
        return one

    monkeypatch.setattr(daemon, "run_status", status)
    monkeypatch.setattr(daemon, "POLL_S", 0.0)


def test_a_run_that_failed_says_why_in_its_own_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    watched(monkeypatch, ("running", ""), ("finished:failed", "exit code 1"))
    events = [{"event": "round"}, {"event": "error", "text": "2 of 5 sites answered"}]
    (tmp_path / "events.jsonl").write_text("\n".join([*map(json.dumps, events), '{"event": "er']))
    with pytest.raises(DeploymentError, match="run 7 ended as finished:failed: 2 of 5 sites answered"):
        daemon.wait(tmp_path, 7, tmp_path)


def test_a_superlink_that_restarts_is_waited_for_and_one_that_stays_away_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gone = DeploymentError("127.0.0.1:1: asking for a run failed")
    watched(monkeypatch, ("running", ""), gone, ("running", ""), ("finished:completed", ""))
    seen = list(daemon.follow(tmp_path, 7, silence_s=60.0, poll_s=0.0))
    assert seen == [("running", ""), ("finished:completed", "")], "each change once"
    watched(monkeypatch, ("running", ""), gone, gone)
    with pytest.raises(DeploymentError, match="asking for a run failed"):
        list(daemon.follow(tmp_path, 7, silence_s=0.0, poll_s=0.01))
