"""`trunkline schema`: what an editor accepts is what Trunkline accepts."""

import json
import re
import tomllib
from pathlib import Path
from typing import Any, Literal

import pytest
from jsonschema import Draft202012Validator
from typer.testing import CliRunner

from trunkline.api.schemas import build_schema
from trunkline.cli.app import app
from trunkline.config.run import RunConfig
from trunkline.config.site import SiteConfig
from trunkline.strategies import STRATEGIES

ROOT = Path(__file__).parents[2]
EXAMPLES = sorted((ROOT / "examples").glob("*.toml"))
FILES: tuple[Literal["site", "run"], ...] = ("site", "run")


def complaints(file: Literal["site", "run"], table: dict[str, Any]) -> list[str]:
    return [error.message for error in Draft202012Validator(build_schema(file)).iter_errors(table)]


def read_blocks(page: str) -> list[str]:
    return re.findall(r"```toml\n(.*?)```", (ROOT / "docs" / page).read_text(), re.DOTALL)


@pytest.mark.parametrize("file", FILES)
def test_the_command_prints_a_valid_schema(file: Literal["site", "run"]) -> None:
    result = CliRunner().invoke(app, ["schema", file])
    assert result.exit_code == 0, result.output
    schema = json.loads(result.stdout)
    Draft202012Validator.check_schema(schema)
    assert schema == build_schema(file)
    assert schema["$schema"] == "https://json-schema.org/draft/2020-12/schema"
    assert schema["title"] == f"{file}.toml" and schema["description"]
    for reference in re.findall(r'"\$ref": "([^"]+)"', result.stdout):
        assert reference.removeprefix("#/$defs/") in schema["$defs"]
    assert "null" not in result.stdout, "TOML has no null"


@pytest.mark.parametrize("file", FILES)
def test_descriptions_are_those_of_the_settings(file: Literal["site", "run"]) -> None:
    model = SiteConfig if file == "site" else RunConfig
    schema = build_schema(file)
    tables = [(model, schema)]
    tables += [
        (kind, schema["$defs"][kind.__name__])
        for kind in (type(value) for value in RunConfig().__dict__.values())
        if file == "run" and kind.__name__ in schema["$defs"] and kind.__name__ != "StrategyConfig"
    ]
    compared = 0
    for kind, part in tables:
        for key, field in kind.model_fields.items():
            if field.description:
                assert part["properties"][key]["description"] == field.description
                compared += 1
    assert compared >= (1 if file == "site" else 30)


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_every_example_is_valid(path: Path) -> None:
    assert complaints("run", tomllib.loads(path.read_text())) == []


def test_every_built_in_factory_is_valid(plants: list[Path]) -> None:
    for folder in plants:
        assert complaints("site", tomllib.loads((folder / "site.toml").read_text())) == []


def test_the_smallest_files_are_valid() -> None:
    assert complaints("run", {}) == []
    site = {"name": "a", "data": {"files": "*.csv", "channels": ["x"]}, "tasks": {"t": {"kind": "anomaly"}}}
    assert complaints("site", site) == []


@pytest.mark.parametrize("place", [(), ("data",), ("data", "clean"), ("data", "split"), ("policy",), ("tasks", "rul")])
def test_an_unknown_key_of_a_site_is_refused(plants: list[Path], place: tuple[str, ...]) -> None:
    table = tomllib.loads((plants[-1] / "site.toml").read_text())
    part = table
    for key in place:
        part = part.setdefault(key, {}) if key != "rul" else next(iter(part.values()))
    part["windw"] = 3
    assert any("'windw' was unexpected" in text for text in complaints("site", table))


@pytest.mark.parametrize("table", [{"rouds": 3}, {"training": {"stepz": 3}}, {"cohort": {"quorom": 0.5}}])
def test_an_unknown_key_of_a_run_is_refused(table: dict[str, Any]) -> None:
    assert any("was unexpected" in text for text in complaints("run", table))


@pytest.mark.parametrize("name", sorted(STRATEGIES))
def test_a_strategy_has_its_own_options_and_no_others(name: str) -> None:
    options = {
        key: field.default
        for key, field in STRATEGIES[name].model_fields.items()
        if key != "training" and field.default is not None
    }
    assert complaints("run", {"strategy": json.loads(json.dumps({"name": name, **options}, default=str))}) == []
    assert complaints("run", {"strategy": {"name": name, "nonsense": 1}})


def test_the_default_strategy_needs_no_name_and_an_unknown_one_is_refused() -> None:
    assert complaints("run", {"strategy": {}}) == []
    assert complaints("run", {"strategy": {"nonsense": 1}})
    assert complaints("run", {"strategy": {"name": "fedrap"}})
