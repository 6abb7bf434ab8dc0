"""A configuration file that cannot be meant is refused with file, key, value and what is allowed."""

from pathlib import Path
from typing import Any

import pytest

from trunkline.config.parsing import parse_value
from trunkline.config.run import parse_run, read_run
from trunkline.config.site import read_site
from trunkline.errors import ConfigError

SITE = """
name = "press-07"
[data]
files = "*.csv"
channels = ["a", "b"]
window = 8
group = "unit"
order = "cycle"
[tasks.wear]
kind = "regression"
target = "wear"
unit = "mm"
"""


def site_of(tmp_path: Path, old: str = "", new: str = "") -> Path:
    (tmp_path / "site.toml").write_text(SITE.replace(old, new, 1) if old else SITE)
    return tmp_path


def test_a_plain_site_parses_and_is_frozen(tmp_path: Path) -> None:
    site = read_site(site_of(tmp_path))
    assert site.data.channels == ("a", "b")
    with pytest.raises(Exception, match="frozen"):
        site.name = "other"  # type: ignore[misc]


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ('name = "press-07"', 'name = "../press"', ["`name`", "'../press'"]),
        ("window = 8", "windows = 8", ["unknown key `data.windows`", "did you mean 'window'", "Allowed here"]),
        ("window = 8", "window = 0", ["`data.window`", "greater than or equal to 1", "Found 0"]),
        ("[tasks.wear]", "[tasks.wear.wear]", ["`tasks.wear"]),
        ('target = "wear"', 'target = "a"', ["`a` is the target of task 'wear' and an input too"]),
        ('unit = "mm"', 'unit = "mm"\ncapp = 3', ["unknown key `tasks.wear.capp`", "did you mean 'cap'"]),
        ('unit = "mm"', f'unit = "{"m" * 33}"', ["`tasks.wear.unit`", "at most 32"]),
        ('kind = "regression"', 'kind = "binary"\ncap = 3', ["`cap` is for kind 'regression'"]),
        (
            'kind = "regression"',
            'kind = "guess"',
            ["`tasks.wear.kind`", "'regression', 'binary', 'multiclass', 'ordinal'"],
        ),
        ('order = "cycle"', "age = true", ["`age = true` needs `order`"]),
        ('channels = ["a", "b"]', 'channels = ["a", "a"]', ["channel 'a' is listed twice"]),
        ('channels = ["a", "b"]', "", ["`data.channels` is missing"]),
    ],
)
def test_each_mistake_in_a_site_is_named(tmp_path: Path, old: str, new: str, words: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        read_site(site_of(tmp_path, old, new))
    for word in [str(tmp_path / "site.toml"), *words]:
        assert word in str(caught.value)


def test_every_mistake_is_told_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        parse_run({"rouns": 3, "trunk": {"widht": 8}, "cohort": {"quorum": 2}}, "run.toml")
    assert len(str(caught.value).splitlines()) == 3


@pytest.mark.parametrize("part", ["trnk", "head.", "trunk.*", "head"])
def test_only_whole_modules_can_be_lent(part: str) -> None:
    with pytest.raises(ConfigError, match="whole modules only"):
        parse_run({"lend": [part]}, "run.toml")


def test_a_file_that_is_no_toml_or_not_there(tmp_path: Path) -> None:
    (tmp_path / "run.toml").write_text("rounds = = 3")
    with pytest.raises(ConfigError, match=r"run\.toml: not valid TOML"):
        read_run(tmp_path / "run.toml")
    with pytest.raises(ConfigError, match="no such file"):
        read_run(tmp_path / "absent.toml")


@pytest.mark.parametrize(
    ("text", "value"),
    [("3", 3), ("0.5", 0.5), ("true", True), ("fedrep", "fedrep"), ('["trunk", "stem"]', ["trunk", "stem"])],
)
def test_values_on_the_command_line_are_toml_or_a_word(text: str, value: Any) -> None:
    assert parse_value(text) == value


def test_overrides_reach_nested_keys() -> None:
    run = parse_run(
        {"training": {"steps": 3}}, "run.toml", {"training.steps": 7, "strategy": {"name": "fedprox", "mu": 0.5}}
    )
    assert run.training.steps == 7
    assert run.strategy.options == {"mu": 0.5}
    with pytest.raises(ConfigError, match="is not a table"):
        parse_run({"rounds": 3}, "run.toml", {"rounds.deep": 1})
