"""docs/, README and examples/: TOML parses; tables know every key, default, kind, metric and option; messages are the code's."""

import itertools
import json
import re
import tomllib
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import pytest
from pydantic import BaseModel
from pydantic_core import PydanticUndefined

from trunkline.config.run import RunConfig, parse_run
from trunkline.config.site import SiteConfig, read_site
from trunkline.config.tasks import LOSSES, ONLY_FOR, TaskConfig
from trunkline.errors import ConfigError
from trunkline.models.tasks import TASKS
from trunkline.protocol.plan import LocalPlan
from trunkline.server.reporting.html import CANDIDATES
from trunkline.simulations.factories import FACTORIES
from trunkline.simulations.search import DEFAULT_SPACE
from trunkline.strategies import STRATEGIES, build_strategy

ROOT = Path(__file__).parents[3]
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", *sorted(DOCS.glob("*.md"))]
ADDED = {"cmapss-small-plants.toml", "hydraulic-rig.toml", "shifts.toml"}  # examples that a data set has beside its own
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
        if type(None) in get_args(inner):  # a table that may be left out
            inner = get_args(inner)[0]
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


def rows_of(text: str, columns: int) -> list[list[str]]:
    """The cells of every table row of so many columns, headings and rules left out."""
    lines = re.findall(r"^\|(.+)\|\n(?!\|-)", text, re.M)
    cells = [[cell.strip() for cell in line.split("|")] for line in lines if not set(line) <= set("-|")]
    return [row for row in cells if len(row) == columns]


def section(page: str, title: str) -> str:
    """What stands below the heading that has `title` among its comma-separated words, up to the next one as high."""
    pieces = re.split(r"^(#+) (.+)\n", (DOCS / page).read_text(), flags=re.M)[1:]
    parts = list(zip(*(iter(pieces),) * 3, strict=True))  # (level, heading, text)
    place = next((at for at, part in enumerate(parts) if title in (part[1], *part[1].split(", "))), None)
    assert place is not None, f"{page} has no section {title!r}"
    below = itertools.takewhile(lambda part: len(part[0]) > len(parts[place][0]), parts[place + 1 :])
    return parts[place][2] + "".join(f"{level} {heading}\n{text}" for level, heading, text in below)


def words_of(annotation: Any) -> set[str]:
    """The words that a key may be set to, where these are fixed."""
    if get_origin(annotation) is Literal:
        return {f"`{json.dumps(one)}`" for one in get_args(annotation)}
    return set().union(*(words_of(one) for one in get_args(annotation)))


@pytest.mark.parametrize(("page", "model"), [("site-toml.md", SiteConfig), ("run-toml.md", RunConfig)])
def test_the_tables_name_every_key_with_its_default(page: str, model: type[BaseModel]) -> None:
    rows = re.findall(r"^\| `([^`]+)` \| [^|]+ \| ([^|]+) \| .+ \|$", (DOCS / page).read_text(), re.M)
    assert len(rows) == len(dict(rows)), "a key is in two rows"
    assert {key: default.strip() for key, default in rows} == {
        key: default_of(field) for key, field in leaves(model).items()
    }


@pytest.mark.parametrize(("page", "model"), [("site-toml.md", SiteConfig), ("run-toml.md", RunConfig)])
def test_the_tables_name_every_word_a_key_may_be_set_to(page: str, model: type[BaseModel]) -> None:
    types = {row[0].strip("`"): row[1] for row in rows_of((DOCS / page).read_text(), 4)}
    said = {key: set(re.findall(r'`"[^`]+"`', types[key])) for key in leaves(model)}
    assert said == {key: words_of(field.annotation) for key, field in leaves(model).items()}


def test_the_row_of_a_task_key_names_the_kinds_that_understand_it() -> None:
    meaning = {row[0].strip("`"): row[3] for row in rows_of((DOCS / "site-toml.md").read_text(), 4)}
    for key, kinds in {**ONLY_FOR, "loss": tuple({kind for some in LOSSES.values() for kind in some})}.items():
        assert set(kinds) <= set(re.findall(r"\w+", meaning[f"tasks.NAME.{key}"])), key


def test_each_kind_of_task_has_its_metrics_its_own_first_and_a_section() -> None:
    text = (DOCS / "site-toml.md").read_text()
    rows = {row[0]: re.findall(r"`(\w+)`", row[2]) for row in rows_of(text, 3) if row[0].endswith(")")}
    assert set(rows) == {f"[{kind}](#{kind})" for kind in TASKS}
    for name, kind in TASKS.items():
        documented = rows[f"[{name}](#{name})"]
        assert set(documented) == set(kind.METRICS), name
        assert documented[0] == kind.primary, name
        told = section("site-toml.md", name)
        assert "aside" in told, f"{name}: what becomes of a bad column"
        assert f"`{kind.primary}`" in told, name


def test_the_table_of_strategies_is_the_one_in_the_code() -> None:
    rows = re.findall(r"^\| `(\w+)` \| [^|]+ \| ([^|]*) \|$", (DOCS / "run-toml.md").read_text(), re.M)
    documented = {name: set(re.findall(r"`(\w+)`", options)) for name, options in rows if "." not in name}
    assert documented == {name: set(kind.model_fields) - {"training"} for name, kind in STRATEGIES.items()}


@pytest.mark.parametrize("name", STRATEGIES)
def test_each_strategy_has_a_section_with_its_options_and_their_defaults(name: str) -> None:
    told = section("strategies.md", name)
    options = {key: field for key, field in STRATEGIES[name].model_fields.items() if key != "training"}
    found = dict(re.findall(r"`(\w+)` \(([^)]+)\)", told))
    assert {key: found.get(key) for key in options} == {
        key: "none" if field.default is None else json.dumps(field.default) for key, field in options.items()
    }
    assert bool(options) != ("**Options:** none." in told)


def test_the_table_of_candidates_is_the_gate_s() -> None:
    assert {row[0] for row in rows_of(section("run-toml.md", "Which model a site uses: the gate"), 3)} == set(
        CANDIDATES
    )


def test_the_table_of_what_is_searched_is_the_one_in_the_code() -> None:
    rows = rows_of(section("search.md", "What is searched if you name nothing"), 2)
    documented = {row[0].strip("`"): [float(one) for one in re.findall(r"[\d.]+", row[1])] for row in rows}
    assert documented == {key: list(values) for key, values in DEFAULT_SPACE.items()}


@pytest.mark.parametrize("name", FACTORIES)
def test_each_data_set_has_a_section_and_a_run_file(name: str) -> None:
    section("data-sets.md", name)
    asked = [re.search(r"trunkline sites (\w+)", path.read_text()) for path in EXAMPLES if path.name not in ADDED]
    assert sum(found is not None and found[1] == name for found in asked) == 1


def said_by_the_code() -> str:
    """Every text of the package on one line, `...` for what is filled in, and single for double quotes."""
    source = "\n".join(path.read_text() for path in sorted((ROOT / "trunkline").rglob("*.py")))
    whole = re.sub(r"""["']\s*\n\s*f?["']""", "", source)  # a text over several lines
    return re.sub(r"\{[^{}\n]*\}", "...", whole).replace('"', "'")


@pytest.mark.parametrize("page", ["site-toml.md", "run-toml.md"])
def test_the_messages_in_the_tables_are_those_of_the_code(page: str) -> None:
    code = said_by_the_code()
    rows = rows_of(section(page, "When something is refused"), 3)
    assert len(rows) > 10
    for message, _, remedy in rows:
        assert remedy, message
        for piece in message.replace('"', "'").split("..."):
            assert piece.strip(" `") in code, f"{page}: {message!r}: no text of the package holds {piece!r}"


def anchors(page: Path) -> set[str]:
    headings = re.findall(r"^#+ (.+)$", re.sub(r"^```.*?^```", "", page.read_text(), flags=re.M | re.S), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=[page.name for page in PAGES])
def test_every_link_within_the_project_leads_somewhere(page: Path) -> None:
    for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if "://" in link:
            continue
        name, _, anchor = link.partition("#")
        target = page.parent / name if name else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


def test_the_readme_links_every_page() -> None:
    linked = set(re.findall(r"\]\(docs/([\w-]+\.md)", (ROOT / "README.md").read_text()))
    assert linked == {page.name for page in DOCS.glob("*.md")}
