"""The functions of the API: what they accept, what they refuse, and that the command line does the same."""

import json
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import trunkline as tl
from tests.api.conftest import RUN
from trunkline.api.calls import list_sites
from trunkline.cli.app import app
from trunkline.config.run import RunConfig

pytestmark = pytest.mark.xdist_group("api")
RUN_TOML = 'name = "small"\nrounds = 1\n[training]\nsteps = 2\nkeep = "last"\n[cohort]\nmin_sites = 1\n'
HEAVY = ("torch", "ray", "flwr", "numpy", "polars", "pydantic", "rich", "typer")


def run_python(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60.0, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_import_is_quick_and_loads_nothing_heavy() -> None:
    """The figure is measured by benchmarks/commands.py too; here the cause is held."""
    code = (
        "import sys, time\nstart = time.perf_counter()\nimport trunkline\nseconds = time.perf_counter() - start\n"
        f"dir(trunkline)\nprint(seconds, *(set({HEAVY!r}) & set(sys.modules)))"
    )
    seconds, *loaded = min((run_python(code).split() for _ in range(3)), key=lambda words: float(words[0]))
    assert not loaded
    assert float(seconds) < 0.3


def test_functions_load_nothing_heavy_until_they_are_called() -> None:
    code = f"import sys\nimport trunkline as tl\ntl.simulate, tl.SiteCheck\nprint(*(set({HEAVY!r}) & set(sys.modules)))"
    assert run_python(code).split() == []


def test_the_package_lists_its_names_and_refuses_others() -> None:
    assert set(tl.__all__) <= set(dir(tl))
    with pytest.raises(AttributeError, match="'trunkline' has no attribute 'simulat'"):
        _ = tl.simulat  # type: ignore[attr-defined]


def test_a_run_is_a_path_a_dictionary_or_a_run(tmp_path: Path) -> None:
    (tmp_path / "run.toml").write_text(RUN_TOML)
    table = tomllib.loads(RUN_TOML)
    runs = [tl.read_run(tmp_path / "run.toml"), tl.read_run(str(tmp_path / "run.toml")), tl.read_run(table)]
    runs.append(tl.read_run(runs[0]))
    assert all(run == runs[0] for run in runs)
    assert isinstance(runs[0], RunConfig)


@pytest.mark.parametrize("kind", ["path", "table", "run"])
def test_overrides_are_laid_over_a_copy(tmp_path: Path, kind: str) -> None:
    (tmp_path / "run.toml").write_text(RUN_TOML)
    table = tomllib.loads(RUN_TOML)
    run: Any = {"path": tmp_path / "run.toml", "table": table, "run": tl.read_run(table)}[kind]
    changed = tl.read_run(run, {"training.steps": 7, "strategy": {"name": "fedprox"}})
    assert (changed.training.steps, changed.training.keep, changed.strategy.name) == (7, "last", "fedprox")
    assert table == tomllib.loads(RUN_TOML)
    assert tl.read_run(run).training.steps == 2


@pytest.mark.parametrize(
    ("run", "words"),
    [
        ({"rouds": 3}, "run: unknown key `rouds`; did you mean 'rounds'"),
        ({"strategy": {"name": "fedrap"}}, "did you mean 'fedrep'"),
        ({"strategy": {"name": "fedavg", "nonsense": 1}}, "'nonsense' is not an option"),
        ("absent.toml", "absent.toml: no such file"),
    ],
)
def test_a_wrong_run_is_an_error_of_the_package(run: Any, words: str) -> None:
    with pytest.raises(tl.TrunklineError, match=words):
        tl.read_run(run)


def test_a_site_is_read(plants: list[Path]) -> None:
    assert tl.read_site(plants[0]).name == tl.read_site(str(plants[0])).name == plants[0].name
    with pytest.raises(tl.TrunklineError, match="no such folder"):
        tl.read_site("nowhere")


def test_sites_are_a_folder_or_a_list_in_any_order(plants: list[Path]) -> None:
    assert list_sites(plants[0].parent) == list_sites(str(plants[0].parent)) == plants
    assert list_sites(list(reversed(plants))) == list_sites([str(folder) for folder in plants]) == plants


def test_wrong_lists_of_sites_are_refused(plants: list[Path], tmp_path: Path) -> None:
    with pytest.raises(tl.TrunklineError, match="empty"):
        list_sites([])
    with pytest.raises(tl.TrunklineError, match=r"no site\.toml"):
        list_sites([plants[0], tmp_path])
    copy = shutil.copytree(plants[0], tmp_path / plants[0].name)
    with pytest.raises(tl.TrunklineError, match="one name"):
        list_sites([plants[0], copy])


def test_a_simulation_writes_what_it_returns(simulated: tl.SimulationResult, plants: list[Path]) -> None:
    assert json.loads((simulated.path / "report.json").read_text()) == simulated.report
    assert simulated.page.is_file() and simulated.trunk.is_file()
    assert {row["site"] for row in simulated.rows} == {folder.name for folder in plants[:2]}


def test_the_command_line_gives_the_same_figures(
    simulated: tl.SimulationResult, plants: list[Path], tmp_path: Path
) -> None:
    for folder in plants[:2]:
        shutil.copytree(folder, tmp_path / "sites" / folder.name)
    (tmp_path / "run.toml").write_text(RUN_TOML)
    arguments = ["simulate", tmp_path / "run.toml", "--sites", tmp_path / "sites", "--out", tmp_path / "out"]
    result = CliRunner().invoke(app, [*map(str, arguments), "--workers", "0"])
    assert result.exit_code == 0, result.output
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["sites"] == simulated.report["sites"]
    assert "round 1 of 1" in result.output  # the progress that the API was told to leave out


def test_a_simulation_reports_its_progress_unless_told_otherwise(
    plants: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tl.simulate(RUN, plants[:1], tmp_path / "shown", workers=0)
    assert "round 1 of 1" in capsys.readouterr().out
    tl.simulate(RUN, plants[:1], tmp_path / "quiet", workers=0, progress=False)
    assert capsys.readouterr().out == ""


def test_an_earlier_run_is_kept_unless_overwrite_is_given(simulated: tl.SimulationResult, plants: list[Path]) -> None:
    before = simulated.page.read_bytes()
    with pytest.raises(tl.TrunklineError, match="--overwrite"):
        tl.simulate(RUN, plants[:2], simulated.path, workers=0, progress=False)
    assert simulated.page.read_bytes() == before


def test_a_check_collects_problems_and_writes_nothing(plants: list[Path], tmp_path: Path) -> None:
    site = shutil.copytree(plants[-1], tmp_path / plants[-1].name)
    before = sorted(site.rglob("*"))
    check = tl.check_site(site)
    assert check.ok and check.report["problems"] == []
    assert check.report["samples"]["train"] > 0
    assert json.loads(json.dumps(check.report)) == check.report
    config = site / "site.toml"
    config.write_text(config.read_text().replace("window =", "windw ="))
    broken = tl.check_site(str(site))
    assert not broken.ok and "did you mean 'window'" in broken.report["problems"][0]["what"]
    assert sorted(site.rglob("*")) == before


def test_an_adaptation_writes_what_it_returns(adapted: tl.Adaptation) -> None:
    assert adapted.model.is_file() and adapted.page.is_file() and not adapted.sealed
    assert json.loads((adapted.path / "evidence.json").read_text()) == json.loads(json.dumps(adapted.report))
    assert adapted.report["labelled_groups"] == 2
    assert adapted.choice in ("as_is", "probe", "lp_ft", "lora", "full", "interpolated", "scratch")


def test_an_adaptation_lies_below_the_site_unless_told_otherwise(
    plants: list[Path], simulated: tl.SimulationResult, tmp_path: Path
) -> None:
    with pytest.raises(tl.TrunklineError, match=r"absent\.safetensors"):
        tl.adapt(plants[-1], tmp_path / "absent.safetensors")
    assert not (plants[-1] / ".trunkline").exists()
