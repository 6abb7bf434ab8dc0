"""What a result shows at a prompt and in a notebook."""

import html
from dataclasses import FrozenInstanceError, replace
from html.parser import HTMLParser
from pathlib import Path

import pytest

import trunkline as tl
from trunkline.api.html import draw_lines, draw_table

pytestmark = pytest.mark.xdist_group("api")
Result = tl.SimulationResult | tl.SiteCheck | tl.Adaptation


@pytest.fixture(params=["simulated", "checked", "adapted"])
def result(request: pytest.FixtureRequest, plants: list[Path]) -> Result:
    if request.param == "checked":
        return tl.check_site(plants[-1])
    value: Result = request.getfixturevalue(request.param)
    return value


class Tags(HTMLParser):
    """Open and closed tags, in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.open.append(tag)
        self.seen.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_a_repr_is_a_few_readable_lines(result: Result) -> None:
    lines = repr(result).splitlines()
    assert 2 <= len(lines) <= 12
    assert lines[0].startswith(f"{type(result).__name__}({str(result.path)!r}): ")
    assert all(line.startswith("  ") for line in lines[1:])


def test_a_notebook_gets_a_table_with_every_row(result: Result) -> None:
    tags = Tags(result._repr_html_())
    assert tags.open == []
    assert "table" in tags.seen and tags.seen.count("tr") >= 1 + len(result.rows)


def test_a_result_cannot_be_changed(result: Result) -> None:
    with pytest.raises(FrozenInstanceError):
        result.path = Path("elsewhere")  # type: ignore[misc]


def test_names_of_other_people_are_escaped(result: Result) -> None:
    script = "<script>alert(1)</script>"
    rows = [{**row, "task": script} for row in result.rows]
    key = "sites" if isinstance(result, tl.SimulationResult) else "tasks"
    page = replace(result, report={**result.report, key: rows, "site": script})._repr_html_()
    assert script not in page and html.escape(script) in page


def test_a_long_repr_is_cut_with_a_count(simulated: tl.SimulationResult) -> None:
    rows = [{**simulated.rows[0], "site": f"site-{index}"} for index in range(30)]
    lines = repr(replace(simulated, report={**simulated.report, "sites": rows})).splitlines()
    assert len(lines) == 10 and lines[-1] == "  and 22 more"


def test_a_broken_site_shows_its_problems(plants: list[Path], tmp_path: Path) -> None:
    (tmp_path / "site.toml").write_text('name = "x"\n')
    check = tl.check_site(tmp_path)
    assert "to mend before" in repr(check) and "problem: " in repr(check)
    assert "`tasks` is missing" in check._repr_html_()


def test_a_table_without_rows_is_left_out() -> None:
    assert draw_table(("a",), []) == ""
    assert draw_lines(["", "x < y"]) == "<p>x &lt; y</p>"
