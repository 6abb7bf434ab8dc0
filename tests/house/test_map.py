"""The pages that show the way name files that exist."""

import re
from pathlib import Path

import pytest

from tests.house.code import PACKAGE, modules, tree_of
from tests.house.test_imports import ROOMS

ROOT = PACKAGE.parent
PAGES = ("docs/architecture.md", "docs/glossary.md", "CONTRIBUTING.md")


def paths_of(page: str) -> list[str]:
    """Every `path/with.suffix` or `room/` of a page; NAME stands for what a recipe adds."""
    text = re.sub(r"```.*?```", "", (ROOT / page).read_text(), flags=re.DOTALL)
    spans = re.findall(r"`([\w./-]+)`", text)
    return [
        span for span in spans if re.search(r"\.(py|md|toml)$|/$", span) and "NAME" not in span and "STATE" not in span
    ]


@pytest.mark.parametrize("page", PAGES)
def test_every_file_that_a_page_names_exists(page: str) -> None:
    loose = {path.name for path in modules().values()} | {"site.toml", "run.toml", "policy.toml"}
    state = {"logs/", "runs/", "journal/", "stems/"}  # folders of a state, not of the house
    missing = [
        path
        for path in paths_of(page)
        if not any((base / path).exists() for base in (ROOT, PACKAGE, PACKAGE / "server" / "rounds"))
        and path not in loose | state
    ]
    assert missing == [], f"{page} names what is not there"


def test_the_page_of_the_architecture_draws_every_wing() -> None:
    picture = (ROOT / "docs" / "house.svg").read_text()
    rooms = {room.split("/")[-1] for room in ROOMS} - {
        # told in one box with another room, or too small for one of its own
        "folders", "central", "newcomers", "search", "simulate", "workers", "in_process", "handlers", "site", "check", "round_models",
        "availability",
    }  # fmt: skip
    assert [room for room in sorted(rooms) if room not in picture] == []


@pytest.mark.parametrize("seam", ["Transport", "Guard", "Strategy", "Task"])
def test_the_seams_of_the_page_are_classes(seam: str) -> None:
    row = next(
        line for line in (ROOT / "docs" / "architecture.md").read_text().splitlines() if f"| `{seam}` in" in line
    )
    file = re.findall(r"`([\w/]+\.py)`", row)[0]
    names = {getattr(node, "name", "") for node in tree_of(Path(PACKAGE / file)).body}
    assert seam in names, f"{file} has no {seam}"
