"""Tests that belong on one worker, by their `xdist_group` marks.

pytest-xdist 3.8 writes the group into a node id, which pytest 9.2 no longer lets it: its `loadgroup` deals marked tests out
like any others, and what a group shares is made on every worker. So the marks are read from the source here.
"""

import ast
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from xdist.scheduler import LoadScopeScheduling

ROOT = Path(__file__).parents[1]


class ByGroup(LoadScopeScheduling):
    """One worker for all tests of a group; every other test alone."""

    def _split_scope(self, nodeid: str) -> str:
        return group_of(nodeid) or nodeid


def group_of(nodeid: str) -> str:
    """Name of the group that `FILE::TEST[PARAMETERS]` is marked with; empty where it is not."""
    file, _, test = nodeid.partition("::")
    whole, single = marks(ROOT / file)
    return single.get(test.partition("[")[0], whole)


@cache
def marks(path: Path) -> tuple[str, dict[str, str]]:
    """The group of a whole file (its `pytestmark`), and test -> group of those marked one by one."""
    whole, single = "", {}
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.Assign) and any(getattr(one, "id", "") == "pytestmark" for one in node.targets):
            whole = _named(node.value)
        elif isinstance(node, ast.FunctionDef):
            found = [name for one in node.decorator_list if (name := _named(one))]
            single |= dict.fromkeys([node.name] if found else [], found[0] if found else "")
    return whole, single


def _named(tree: ast.AST) -> str:
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "xdist_group":
            return str(ast.literal_eval(node.args[0]))
    return ""


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> ByGroup | None:
    return ByGroup(config, log) if config.getvalue("dist") == "loadgroup" else None
