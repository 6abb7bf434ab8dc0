"""docs/reference.md names every part of the API as it is, and its examples run; so do those of README and examples/."""

import dataclasses
import inspect
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import trunkline as tl

pytestmark = pytest.mark.xdist_group("api")
ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "reference.md").read_text()
SECTIONS = dict(re.findall(r"^## (\w+)\n(.*?)(?=^## |\Z)", PAGE, re.M | re.S))
FUNCTIONS = [name for name in tl.__all__ if inspect.isfunction(getattr(tl, name))]
RESULTS = [name for name in tl.__all__ if dataclasses.is_dataclass(getattr(tl, name))]
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))


def format_signature(name: str) -> str:
    """As the page has it: without types, which its table gives."""
    value = getattr(tl, name)
    if inspect.isclass(value) and issubclass(value, Exception):
        return f"{name}(*args)"
    signature = inspect.signature(value)
    bare = [parameter.replace(annotation=inspect.Parameter.empty) for parameter in signature.parameters.values()]
    return f"{name}{signature.replace(parameters=bare, return_annotation=inspect.Signature.empty)}"


def format_type(annotation: Any) -> str:
    text = inspect.formatannotation(annotation)
    return re.sub(r"pathlib\.|typing\.|collections\.abc\.|'", "", text)


def read_table(name: str) -> list[list[str]]:
    lines = re.findall(r"^\| (`.*) \|$", SECTIONS[name], re.M)
    return [[cell.replace("\\|", "|").strip("`") for cell in re.split(r"(?<!\\) \| ", line)] for line in lines]


def test_the_page_has_a_section_for_every_name_and_lists_it_first() -> None:
    assert set(SECTIONS) == set(tl.__all__)
    intro = PAGE.partition("\n## ")[0]
    assert re.findall(r"^\| \[`(\w+)`\]", intro, re.M) == list(SECTIONS)


@pytest.mark.parametrize("name", tl.__all__)
def test_a_section_begins_with_the_signature(name: str) -> None:
    assert SECTIONS[name].strip().splitlines()[:3] == ["```text", format_signature(name), "```"]


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_function_has_its_arguments_result_errors_and_an_example(name: str) -> None:
    parameters = inspect.signature(getattr(tl, name)).parameters.values()
    expected = [
        [
            parameter.name,
            format_type(parameter.annotation),
            "required" if parameter.default is parameter.empty else repr(parameter.default),
        ]
        for parameter in parameters
    ]
    assert [row[:3] for row in read_table(name)] == expected
    for part in ("**Returns**", "**Raises**", "```python\n"):
        assert part in SECTIONS[name], part


@pytest.mark.parametrize("name", RESULTS)
def test_a_result_has_every_attribute_and_an_example(name: str) -> None:
    kind = getattr(tl, name)
    expected = {field.name: format_type(field.type) for field in dataclasses.fields(kind)}
    for attribute, value in vars(kind).items():
        if isinstance(value, property):
            expected[attribute] = format_type(inspect.signature(value.fget).return_annotation)  # type: ignore[arg-type]
    assert {row[0]: row[1] for row in read_table(name)} == expected
    assert "```python\n" in SECTIONS[name]


@pytest.mark.parametrize("name", tl.__all__)
def test_every_docstring_describes_every_argument(name: str) -> None:
    value = getattr(tl, name)
    text = inspect.getdoc(value) or ""
    if name != "TrunklineError":
        assert all(re.search(rf"^ +{key}: ", text, re.M) for key in inspect.signature(value).parameters), name
    if name in FUNCTIONS:
        assert all(part in text for part in ("Returns:", "Raises:", "Example:")), name


def run_blocks(page: Path, plants: list[Path], folder: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Run the Python blocks of a page in order, in a folder with the built-in factories."""
    for plant in plants:
        shutil.copytree(plant, folder / "plants" / plant.name)
    monkeypatch.chdir(folder)
    names: dict[str, Any] = {}
    blocks = re.findall(r"^```python\n(.*?)^```", page.read_text(), re.M | re.S)
    assert blocks
    for block in blocks:
        exec(compile(block, page.name, "exec"), names)
    return names


def test_the_examples_of_the_page_run(
    plants: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    names = run_blocks(ROOT / "docs" / "reference.md", plants, tmp_path, monkeypatch)
    assert isinstance(names["result"], tl.SimulationResult) and isinstance(names["adapted"], tl.Adaptation)
    output = capsys.readouterr().out
    for words in ("SimulationResult('out/first'): run 'first'", "8 fedprox", "did you mean 'rounds'", "Label next:"):
        assert words in output


def test_the_examples_of_the_readme_run(
    plants: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run_blocks(ROOT / "README.md", plants, tmp_path, monkeypatch)
    assert "kiln-02" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_an_example_script_runs(path: Path, plants: list[Path], tmp_path: Path) -> None:
    for plant in (plants[0], plants[-1]):  # two are enough, and quicker
        shutil.copytree(plant, tmp_path / "sites" / plant.name)
    done = subprocess.run(
        [sys.executable, str(path), str(tmp_path / "sites"), str(tmp_path / "out")],
        capture_output=True, text=True, timeout=200.0, check=False, cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert plants[0].name in done.stdout
    assert (tmp_path / "out").is_dir() or path.stem == "check_sites"


def test_there_are_example_scripts_for_the_three_functions() -> None:
    text = "\n".join(path.read_text() for path in EXAMPLES)
    assert all(f"tl.{name}(" in text for name in ("simulate", "check_site", "adapt"))
