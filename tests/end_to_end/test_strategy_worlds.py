"""Strategies that ask a site for more than training end alike over loopback and deployed: probes, several trunks, own models."""

from pathlib import Path
from typing import Any

import pytest

from tests.end_to_end.test_worlds import deployed, private_digests, run_there
from tests.loopback import QUICK, federate
from trunkline.release import read_release
from trunkline.server.reporting.report import read_report
from trunkline.server.rounds.checkpoint import Checkpoint

pytestmark = pytest.mark.xdist_group("strategy-worlds")
# several trunks and a probe between rounds; a personal model in the vault
STRATEGIES: dict[str, dict[str, Any]] = {
    "clustered": {"count": 2, "warm_rounds": 1, "assign": "validation", "every": 1},
    "ditto": {},
}
ROUNDS = {"clustered": 2, "ditto": 1}
PLANTS = 3  # the first three: two of them end in one cohort


def settings_of(name: str) -> dict[str, Any]:
    return {
        **QUICK,
        "name": f"worlds-{name}",
        "rounds": ROUNDS[name],
        "strategy": {"name": name, **STRATEGIES[name]},
        "cohort": {"min_sites": PLANTS, "deadline_s": 60.0, "gather_s": 120.0},
    }


def run_file(path: Path, name: str) -> Path:
    """The same settings as a run.toml."""
    table = settings_of(name)
    lines = []
    for key, value in table.items():
        if not isinstance(value, dict):
            lines.insert(0, f"{key} = {_toml(value)}")
        else:
            lines += [f"[{key}]", *(f"{option} = {_toml(one)}" for option, one in value.items())]
    path.write_text("\n".join(lines) + "\n")
    return path


def _toml(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else repr(value)


@pytest.mark.processes
@pytest.mark.slow
@pytest.mark.timeout(280)
def test_strategies_with_hooks_of_their_own_end_deployed_with_the_bytes_of_the_loopback_run(
    plants: list[Path], tmp_path: Path
) -> None:
    plants = plants[:PLANTS]
    with deployed(plants, tmp_path) as (_, states):
        for name in STRATEGIES:
            run_there(tmp_path, run_file(tmp_path / f"{name}.toml", name), tmp_path / name)
    for name in STRATEGIES:
        there, here = tmp_path / name, tmp_path / "loopback" / name
        federate(plants, here, **settings_of(name))
        found, wanted = (Checkpoint(out).load() for out in (there, here))
        assert found is not None
        assert wanted is not None
        assert found[0].trunk.digest() == wanted[0].trunk.digest()
        assert found[0].notes == wanted[0].notes
        assert {key: one.digest() for key, one in found[0].moments.items()} == {
            key: one.digest() for key, one in wanted[0].moments.items()
        }
        at_home = {plant.name: here / "state" / plant.name for plant in plants}
        assert private_digests(states, f"worlds-{name}-") == private_digests(at_home)
        assert read_report(there)["sites"] == read_report(here)["sites"]
        releases = sorted(path.name for path in here.glob("trunk*.safetensors"))
        assert len(releases) == (3 if name == "clustered" else 1)
        for release in releases:  # their cards differ in the key of the run, which holds the time
            assert read_release(there / release)[0].digest() == read_release(here / release)[0].digest()
    assert (
        read_report(tmp_path / "clustered")["cohorts"] == Checkpoint(tmp_path / "clustered").load()[0].notes["cohorts"]
    )  # type: ignore[index]
