"""SECURITY.md, CITATION.cff and .pre-commit-config.yaml say what is so."""

import re
import tomllib
from pathlib import Path

import yaml

import trunkline

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def test_the_version_is_the_same_everywhere() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert PROJECT["version"] == trunkline.__version__ == citation["version"]


def test_the_citation_is_a_valid_file_of_format_1_2_0() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert {"cff-version", "message", "title", "authors"} <= set(citation), "the format demands these"
    assert set(citation) <= {
        "cff-version",
        "message",
        "type",
        "title",
        "abstract",
        "version",
        "license",
        "authors",
        "keywords",
    }
    assert (citation["cff-version"], citation["type"], citation["title"]) == ("1.2.0", "software", "Trunkline")
    assert citation["license"] == PROJECT["license"] == "Apache-2.0"
    assert citation["abstract"] == PROJECT["description"]
    assert citation["authors"] == [{"name": "Trunkline maintainers"}]


def test_the_security_policy_supports_the_newest_minor_version() -> None:
    page = (ROOT / "SECURITY.md").read_text()
    newest = ".".join(trunkline.__version__.split(".")[:2])
    assert re.findall(r"^\| ([\d.]+) \| yes \|$", page, re.M) == [newest]
    assert "docs/security.md" in page and "Report a vulnerability" in page


def test_links_of_the_security_policy_lead_somewhere() -> None:
    links = re.findall(r"\]\(([^)#]+)", (ROOT / "SECURITY.md").read_text())
    assert links and all((ROOT / link).is_file() for link in links)


def test_the_hooks_are_local_and_run_the_checks_of_make_check() -> None:
    config = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())
    assert [repository["repo"] for repository in config["repos"]] == ["local"], "no other repository is fetched"
    hooks = config["repos"][0]["hooks"]
    assert all(hook["language"] == "system" and hook["pass_filenames"] is False for hook in hooks)
    recipe = re.search(r"^check:.*\n((?:\t.*\n)+)", (ROOT / "Makefile").read_text(), re.M)
    assert recipe is not None
    made = [line.strip().replace("$(BIN)", ".venv/bin") for line in recipe[1].splitlines()]
    entries = [hook["entry"] for hook in hooks]
    assert set(entries) <= {line.removesuffix(" .") for line in made}
    assert {entry.split()[0].rpartition("/")[2] for entry in entries} == {"ruff", "mypy"}
