"""Transports: every way to the sites has one interface, and no other module asks which one it has."""

import ast
from pathlib import Path

import pytest
from flwr.clientapp import ClientApp

import trunkline
from trunkline.flower.grid import LoopbackGrid
from trunkline.server.rounds.messaging import Transport
from trunkline.server.rounds.superlink import SuperLinkTransport, transport_of
from trunkline.simulations.in_process import InProcessGrid
from trunkline.simulations.ray.grid import RayGrid
from trunkline.simulations.world.network import WorldGrid

PACKAGE = Path(trunkline.__file__).parent
GRIDS = {"Grid", "LocalGrid", "LoopbackGrid", "RayGrid", "WorldGrid", "InProcessGrid"}
MEMBERS = {name for name in vars(Transport) if not name.startswith("_")}


def test_a_grid_of_a_simulation_is_its_own_transport_and_flowers_grid_gets_one() -> None:
    grid = LoopbackGrid(ClientApp(), [{}])
    assert transport_of(grid) is grid
    flower = transport_of(object())  # type: ignore[arg-type]
    assert isinstance(flower, SuperLinkTransport)
    assert isinstance(flower, Transport)
    assert flower.durable


@pytest.mark.parametrize("kind", [LoopbackGrid, InProcessGrid, RayGrid, WorldGrid, SuperLinkTransport])
def test_every_transport_has_every_member(kind: type) -> None:
    assert {"clock", "durable", "complete", "send", "inbox", "stacks"} <= MEMBERS
    missing = MEMBERS - set(dir(kind))
    assert missing <= {"clock"}, missing  # a clock is made with the object


def sniffs(path: Path, package: Path = PACKAGE) -> list[str]:
    """The places where a module asks which kind of grid it has."""
    places = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Name) or not node.args:
            continue
        of_grid = ast.unparse(node.args[0]).rpartition(".")[2] in ("grid", "transport")
        kinds = {name.id for arg in node.args[1:] for name in ast.walk(arg) if isinstance(name, ast.Name)}
        if (node.func.id in ("getattr", "hasattr") and of_grid) or (node.func.id == "isinstance" and kinds & GRIDS):
            places.append(f"{path.relative_to(package)}:{node.lineno}")
    return places


def test_no_module_asks_which_grid_it_has() -> None:
    assert [place for path in sorted(PACKAGE.rglob("*.py")) for place in sniffs(path)] == []


def test_the_search_for_such_places_finds_them(tmp_path: Path) -> None:
    path = tmp_path / "module.py"
    path.write_text("getattr(self.grid, 'clock', None)\nisinstance(grid, LocalGrid | str)\ngetattr(site, 'grid')\n")
    assert sniffs(path, tmp_path) == ["module.py:1", "module.py:2"]
