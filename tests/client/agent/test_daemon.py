"""What the plant's daemon refuses before it starts anything."""

import json
from pathlib import Path
from typing import ClassVar

import pytest

from trunkline.client.agent import daemon, status
from trunkline.errors import ConfigError, DeploymentError, TrustError
from trunkline.runtime.lock import Lock
from trunkline.runtime.supervisor import Supervisor
from trunkline.security.encryption import make_seal


def test_a_site_folder_that_cannot_be_passed_on_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / 'a "plant"'
    folder.mkdir()
    with pytest.raises(ConfigError, match=r"site\.toml"):
        daemon.start(folder)
    (folder / "site.toml").write_text(
        'name = "p"\n[data]\nfiles = "*.csv"\nchannels = ["a"]\n[tasks.t]\nkind = "regression"\ntarget = "t"\nunit = "mm"\n'
    )
    with pytest.raises(DeploymentError, match="quotes"):
        daemon.start(folder)
    with pytest.raises(DeploymentError, match="host:port"):
        daemon.start(folder, server="centre")


def test_a_site_that_has_not_joined_talks_to_nobody_beyond_this_machine(tmp_path: Path) -> None:
    (tmp_path / "site.toml").write_text(
        'name = "p"\n[data]\nfiles = "*.csv"\nchannels = ["a"]\n[tasks.t]\nkind = "regression"\ntarget = "t"\nunit = "mm"\n'
    )
    with pytest.raises(DeploymentError, match=r"has not joined.*trunkline client join 192\.0\.2\.7:9140"):
        daemon.start(tmp_path, server="192.0.2.7:9140")
    assert not (tmp_path / ".trunkline" / "status.json").exists()


def test_a_sealed_state_that_cannot_be_opened_is_told_before_anything_starts(tmp_path: Path) -> None:
    folder, key = tmp_path / "plant", tmp_path / "key"
    folder.mkdir()
    (folder / "site.toml").write_text(
        'name = "p"\n[data]\nfiles = "*.csv"\nchannels = ["a"]\n[tasks.t]\nkind = "regression"\ntarget = "t"\nunit = "mm"\n'
    )
    make_seal(folder / ".trunkline", f"file:{key}")
    before = sorted(folder.rglob("*"))
    (folder / ".trunkline").chmod(0o755)
    with pytest.raises(TrustError, match="chmod 700"):
        daemon.start(folder)
    (folder / ".trunkline").chmod(0o700)
    key.unlink()
    with pytest.raises(TrustError, match="the key file is gone"):
        daemon.start(folder)
    assert sorted(folder.rglob("*")) == before


def test_systemd_is_told_when_all_parts_are_up_and_the_centre_was_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Asking:
        asked = False
        summary: ClassVar[dict[str, object]] = {}

        def tick(self) -> bool:
            return False

        def hurry(self) -> None: ...

    monitor = Asking()
    supervisor = Supervisor([], tmp_path, {"site": "p", "server": "centre:1", "joined": True})
    up = False
    monkeypatch.setattr(Supervisor, "all_running", property(lambda self: up))
    tick = daemon._watch(supervisor, monitor)  # type: ignore[arg-type]
    tick()
    assert not supervisor.is_ready and supervisor.headline == "asks centre:1 for the first time; starts"
    up = True
    tick()
    assert not supervisor.is_ready
    monitor.asked = True
    tick()
    assert supervisor.is_ready


def test_status_of_a_daemon_that_has_not_asked_the_centre_yet(tmp_path: Path) -> None:
    state = tmp_path / ".trunkline"
    state.mkdir()
    found = {"role": "client", "site": "p", "server": "centre:1", "joined": True, "pid": 1, "since": ""}
    (state / "status.json").write_text(json.dumps({**found, "ended": "", "children": []}))
    (tmp_path / "site.toml").write_text("name = ")  # somebody is editing it
    with Lock(state):
        assert status.status(tmp_path)["well"]
        line = status.headline({**found, "folder": str(tmp_path)}, state)
        assert line == "asks centre:1 for the first time; starts"
