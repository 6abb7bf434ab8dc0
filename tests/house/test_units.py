"""The unit files of docs/deploy.md are units, and start commands that exist."""

import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest
import typer

from trunkline.cli.app import app

PAGE = (Path(__file__).parents[2] / "docs" / "deploy.md").read_text()
UNITS = dict(re.findall(r"`/etc/systemd/system/([\w-]+\.service)`:\n```ini\n(.*?)```", PAGE, re.DOTALL))


def settings(text: str) -> dict[str, dict[str, str]]:
    found: dict[str, dict[str, str]] = {}
    section = ""
    for line in text.splitlines():
        if line.startswith("["):
            section = line.strip("[]")
            found[section] = {}
        elif line and not line.startswith("#"):
            key, _, value = line.partition("=")
            assert key not in found[section], f"{key} twice"
            found[section][key] = value
    return found


def test_both_daemons_have_a_unit_that_restarts_them_always_and_watches_them() -> None:
    assert set(UNITS) == {"trunkline-server.service", "trunkline-client.service"}
    for text in UNITS.values():
        unit, service = settings(text)["Unit"], settings(text)["Service"]
        wanted = {"Type": "notify", "Restart": "always", "RestartSec": "5", "KillMode": "mixed"}
        assert {key: service[key] for key in wanted} == wanted
        assert int(service["WatchdogSec"]) >= 30 and unit["StartLimitIntervalSec"] == "0"
        assert int(service["TimeoutStopSec"]) > 10, "a daemon has 10 s to end its parts"
        assert service["ProtectSystem"] == "strict" and service["UMask"] == "0077"
        assert settings(text)["Install"] == {"WantedBy": "multi-user.target"}


@pytest.mark.parametrize("name", sorted(UNITS))
def test_a_unit_starts_a_command_that_exists_with_options_that_exist(name: str) -> None:
    service = settings(UNITS[name])["Service"]
    program, group, command, *arguments = shlex.split(service["ExecStart"])
    assert program.endswith("/trunkline")
    found = typer.main.get_command(app).commands[group].commands[command]  # type: ignore[attr-defined]
    known = {option for parameter in found.params for option in parameter.opts}
    assert {one for one in arguments if one.startswith("--")} <= known
    state = arguments[arguments.index("--state") + 1]
    assert state == f"/var/lib/{service['StateDirectory']}", "the one folder that ProtectSystem=strict leaves writable"


@pytest.mark.parametrize("name", sorted(UNITS))
def test_systemd_finds_nothing_wrong_with_a_unit(name: str, tmp_path: Path) -> None:
    if shutil.which("systemd-analyze") is None:
        pytest.skip("no systemd-analyze on this machine")
    text = UNITS[name].replace("/opt/trunkline/bin/trunkline", "/bin/true")
    (tmp_path / name).write_text(text)
    done = subprocess.run(
        ["systemd-analyze", "verify", str(tmp_path / name)], capture_output=True, text=True, timeout=60.0, check=False
    )
    about = [line for line in done.stderr.splitlines() if name in line]
    assert done.returncode == 0 and not about, done.stderr
