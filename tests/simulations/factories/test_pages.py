"""docs/ and examples/: every TOML block parses, and the tables know every key with its default."""

import json
import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel
from pydantic_core import PydanticUndefined

from trunkline.config import RunConfig, SiteConfig, TaskConfig, parse_run, read_site
from trunkline.errors import ConfigError
from trunkline.exchange import LocalPlan
from trunkline.strategies import STRATEGIES, build_strategy

ROOT = Path(__file__).parents[3]
DOCS = ROOT / "docs"
EXAMPLES = sorted((ROOT / "examples").glob("*.toml"))
BLOCKS = [
    (f"{page.name}, block {number}", block)
    for page in sorted(DOCS.glob("*.md"))
    for number, block in enumerate(re.findall(r"^```toml\n(.*?)^```", page.read_text(), re.M | re.S), start=1)
]


def parse(text: str, origin: str, folder: Path) -> SiteConfig | RunConfig:
    table = tomllib.loads(text)
    if "tasks" in table or "data" in table:
        (folder / "site.toml").write_text(text)
        return read_site(folder)
    run = parse_run(table, origin)
    build_strategy(run.strategy.name, run.strategy.options, run.training)
    return run


@pytest.mark.parametrize(("origin", "text"), BLOCKS, ids=[origin for origin, _ in BLOCKS])
def test_every_toml_block_of_the_docs_parses(origin: str, text: str, tmp_path: Path) -> None:
    parse(text, origin, tmp_path)


@pytest.mark.parametrize("path", EXAMPLES, ids=[path.name for path in EXAMPLES])
def test_every_example_is_a_run(path: Path, tmp_path: Path) -> None:
    assert isinstance(parse(path.read_text(), path.name, tmp_path), RunConfig)


def test_a_block_with_a_misspelt_key_would_be_caught(tmp_path: Path) -> None:
    origin, text = next((origin, text) for origin, text in BLOCKS if origin.startswith("site-toml"))
    with pytest.raises(ConfigError, match="windows"):
        parse(text.replace("window = ", "windows = "), origin, tmp_path)


def leaves(model: type[BaseModel], path: str = "") -> dict[str, Any]:
    """Every key a file may hold -> its field; tables of tables by the name of their inner keys."""
    found: dict[str, Any] = {}
    for name, field in model.model_fields.items():
        inner = field.annotation
        if name == "tasks":
            found |= leaves(TaskConfig, f"{path}tasks.NAME.")
        elif isinstance(inner, type) and issubclass(inner, BaseModel):
            found |= leaves(inner, f"{path}{name}.")
        else:
            found[path + name] = field
    return found


def default_of(field: Any) -> str:
    if field.default is PydanticUndefined:
        return "required"
    if field.default is None:
        return "absent"
    if field.default == LocalPlan().phases:
        return "one phase of all parts"
    value = list(field.default) if isinstance(field.default, tuple) else field.default
    return f"`{json.dumps(value)}`"


@pytest.mark.parametrize(("page", "model"), [("site-toml.md", SiteConfig), ("run-toml.md", RunConfig)])
def test_the_tables_name_every_key_with_its_default(page: str, model: type[BaseModel]) -> None:
    rows = re.findall(r"^\| `([^`]+)` \| [^|]+ \| ([^|]+) \| .+ \|$", (DOCS / page).read_text(), re.M)
    assert {key: default.strip() for key, default in rows} == {
        key: default_of(field) for key, field in leaves(model).items()
    }


def test_the_table_of_strategies_is_the_one_in_the_code() -> None:
    rows = re.findall(r"^\| `(\w+)` \| [^|]+ \| ([^|]*) \|$", (DOCS / "run-toml.md").read_text(), re.M)
    documented = {name: set(re.findall(r"`(\w+)`", options)) for name, options in rows if "." not in name}
    assert documented == {name: set(kind.model_fields) - {"training"} for name, kind in STRATEGIES.items()}
