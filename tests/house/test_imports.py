"""Who may import whom. The house stands as long as this passes."""

import ast
from pathlib import Path

import pytest

import trunkline

ROOT = Path(trunkline.__file__).parent
VOCABULARY = {
    *(
        "errors",
        "exchange",
        "config",
        "storage",
        "release",
        "signature",
        "guards",
        "keys",
        "sealing",
        "chain",
        "enrolment",
        "disk",
        "incidents",
        "hours",
    ),
}
MAY = {
    "errors": set(),
    "exchange": {"errors"},
    "config": {"exchange", "errors"},
    "hours": {"exchange", "errors"},
    "storage": {"errors"},
    "release": {"exchange", "storage", "signature", "errors"},
    "signature": {"exchange", "keys", "errors"},
    "guards": {"exchange", "errors"},
    "keys": {"storage", "errors"},
    "enrolment": {"exchange", "keys", "errors"},
    "sealing": {"keys", "storage", "errors"},
    "chain": {"keys", "sealing", "storage", "errors"},
    "progress": {"errors"},
    "disk": set(),
    "incidents": set(),
    "flower": {"disk", "errors"},
    "supervise": {"disk", "incidents", "storage", "errors"},
    "status": {"supervise", "disk", "incidents"},
    "models": {"exchange", "config", "errors"},
    "strategies": {"exchange", "errors"},
    "client": {"models", "flower", "supervise", "status", *VOCABULARY},
    "server": {"models", "strategies", "flower", "supervise", "status", "progress", *VOCABULARY},
    "simulations": {
        "client",
        "server",
        "models",
        "strategies",
        "flower",
        "supervise",
        "status",
        "progress",
        *VOCABULARY,
    },
}
FOREIGN = {
    "strategies": {"torch", "flwr", "ray"},
    "models": {"flwr", "ray"},
    "client": {"ray"},
    "server": {"torch", "ray"},
}


def room(module: str) -> str:
    return module.removeprefix("trunkline").removeprefix(".").split(".")[0]


def imported(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
            found |= {
                f"trunkline.{alias.name}"
                for alias in node.names
                if node.module == "trunkline" and alias.name != "__version__"
            }
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return found


FILES = sorted(
    path for path in ROOT.rglob("*.py") if (path.name != "cli.py" and path.parent != ROOT) or path.stem in MAY
)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_point_downwards(path: Path) -> None:
    here = room(".".join(path.relative_to(ROOT).with_suffix("").parts))
    modules = imported(path)
    ours = {room(module) for module in modules if module.split(".")[0] == "trunkline"} - {"", here}
    assert ours <= MAY[here], f"{here} may not import {ours - MAY[here]}"
    foreign = {module.split(".")[0] for module in modules} & FOREIGN.get(here, set())
    assert not foreign, f"{here} may not import {foreign}"


def test_only_flower_py_knows_flowers_private_names() -> None:
    public = ("flwr.app", "flwr.serverapp", "flwr.clientapp")
    for path in ROOT.rglob("*.py"):
        if path.name != "flower.py":
            private = [m for m in imported(path) if m.split(".")[0] == "flwr" and m not in public]
            assert not private, f"{path.name} imports {private}"


def test_every_package_is_in_the_table() -> None:
    rooms = {
        path.stem
        for path in ROOT.iterdir()
        if (path.is_dir() and (path / "__init__.py").exists()) or path.suffix == ".py"
    }
    assert rooms - {"__init__", "cli", "app", "py"} - set(MAY) == set()
