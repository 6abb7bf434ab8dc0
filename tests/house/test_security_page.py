"""docs/security.md names the check behind each sentence; each of them exists."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_every_check_that_the_page_names_exists() -> None:
    page = (ROOT / "docs" / "security.md").read_text()
    named = set(re.findall(r"`(tests/[\w/]+\.py)(?:::(\w+))?`", page))
    assert len(named) > 30
    for file, test in named:
        assert (ROOT / file).is_file(), file
        if test:
            assert f"def {test}(" in (ROOT / file).read_text(), f"{file}::{test}"


def test_no_sentence_stands_without_a_check() -> None:
    page = (ROOT / "docs" / "security.md").read_text()
    promised = page.split("## What is promised")[1].split("\n## ")[0]
    rows = [line for line in promised.splitlines() if line.startswith("| ") and line not in ("| sentence | check |",)]
    assert len(rows) > 20
    assert not [row for row in rows if "`tests/" not in row]
