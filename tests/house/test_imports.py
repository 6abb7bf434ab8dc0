"""Who may import whom. The house stands as long as this passes; docs/architecture.md draws it.

A room is a sub-package, or a module that stands by itself in a wing (`client/site.py`). A room may import what its line
names, and nothing else of the package. A line that ends in "/" names a wing with all its rooms.
"""

import sys

import pytest

from tests.house.code import circles, imports_of, modules, reached_at_import

WINGS = ("client", "server", "simulations", "plant")
VALUES = ("errors", "protocol")  # what every room may use
STATE = (*VALUES, "runtime", "security")
MAY: dict[str, tuple[str, ...]] = {
    "errors": (),
    "protocol": ("errors",),
    "runtime": ("errors",),
    "config": (*VALUES, "privacy"),
    "privacy": VALUES,
    "security": (*VALUES, "runtime"),
    "flower": ("errors", "runtime"),
    "release": STATE,
    "strategies": VALUES,
    "models": (*VALUES, "config"),
    # ---- client
    "client/data": (*VALUES, "config", "models", "runtime", "release"),
    "client/training": (*VALUES, "config", "models", "client/data"),
    "client/state": STATE,
    "client/policy": (*STATE, "config", "privacy", "flower", "client/state"),
    "client/availability": (*VALUES, "config", "runtime"),
    "client/site": (*STATE, "config", "models", "client/availability", "client/data", "client/state", "client/training"),
    "client/check": (*STATE, "config", "client/data"),
    "client/model_selection": (*STATE, "models", "client/site", "client/data", "client/state", "client/training"),
    "client/adaptation": (
        *STATE, "config", "models", "release", "client/data", "client/model_selection", "client/state", "client/training",
    ),
    "client/round_models": (*VALUES, "models", "client/model_selection", "client/site", "client/state"),
    "client/handlers": (
        *VALUES, "models", "privacy", "client/data", "client/model_selection", "client/policy", "client/round_models",
        "client/site", "client/state", "client/training",
    ),
    "client/app": (*VALUES, "flower", "client/handlers", "client/policy", "client/site"),
    # `models`: the kinds of task, which it hands to its egress filter
    "client/agent": (*STATE, "config", "flower", "models", "client/availability", "client/policy", "client/state"),
    # ---- server
    "server/reporting": (*VALUES, "config", "runtime"),
    "server/releases": (*STATE, "config", "release", "server/reporting"),
    "server/membership": (*STATE, "server/releases"),
    "server/rounds": (
        *STATE, "config", "flower", "models", "privacy", "release", "strategies", "server/membership", "server/releases",
        "server/reporting",
    ),
    "server/gateway": (*STATE, "flower", "server/membership"),
    "server/operations": (*STATE, "flower", "server/gateway", "server/membership", "server/releases"),
    "server/app": (*STATE, "config", "flower", "release", "server/"),
    # ---- simulations and audit: both sides at once
    "simulations/folders": STATE,
    "simulations/workers": (*VALUES, "config"),
    "simulations/factories": (*VALUES, "runtime"),
    "simulations/world": (*VALUES, "config", "flower", "client/training", "server/rounds"),
    "simulations/vectorized": (*VALUES, "config", "models", "strategies", "client/", "server/rounds"),
    "simulations/ray": (*VALUES, "flower", "client/app", "client/site", "server/rounds", "simulations/vectorized"),
    "simulations/in_process": (*VALUES, "flower", "simulations/ray", "simulations/vectorized"),
    "simulations/central": (*VALUES, "config", "runtime", "models", "client/", "server/reporting", "server/rounds"),
    "simulations/newcomers": (*VALUES, "config", "release", "client/"),
    "simulations/search": (*VALUES, "config", "runtime", "strategies", "server/rounds"),
    "simulations/simulate": (*STATE, "config", "privacy", "release", "strategies", "client/", "server/", "simulations/"),
    "egress_audit": (*STATE, "config", "flower", "models", "privacy", "client/", "server/"),
    # ---- the outermost rooms: nothing imports them
    "api": ("*",),
    "cli": ("*",),
}  # fmt: skip
FOREIGN = {  # packages that a wing imports nowhere, not even in a function
    "strategies": {"torch", "flwr", "ray"},
    "models": {"flwr", "ray"},
    "client": {"ray"},
    "server": {"torch", "ray"},
}
NO_TORCH = (
    "trunkline.client.policy.",
    "trunkline.simulations.ray.worker",
    "trunkline.simulations.ray.site_host",
)  # transitively, when they are imported


def room_of(module: str) -> str:
    """`client/data` of trunkline.client.data.read, `client/site` of trunkline.client.site, `models` of trunkline.models.trunk."""
    steps = module.split(".")[1:]
    return "/".join(steps[: 2 if steps and steps[0] in WINGS else 1])


def allowed(room: str, target: str) -> bool:
    names = MAY[room]
    return "*" in names or any(target == name or (name.endswith("/") and target.startswith(name)) for name in names)


ROOMS = sorted({room_of(module) for module in modules()} - {"", *WINGS, "app", "plant"})


@pytest.mark.parametrize("module", [name for name in modules() if room_of(name) not in ("", *WINGS)])
def test_imports_point_downwards(module: str) -> None:
    room = room_of(module)
    ours = {room_of(name) for name in imports_of(module) if name.split(".")[0] == "trunkline"} - {"", room}
    wrong = sorted(target for target in ours if not allowed(room, target))
    assert not wrong, f"{module} ({room}) may not import {wrong}"
    foreign = {name.split(".")[0] for name in imports_of(module)} & FOREIGN.get(room.split("/")[0], set())
    assert not foreign, f"{module} may not import {foreign}"


def test_every_room_is_in_the_table_and_every_line_is_a_room() -> None:
    assert set(ROOMS) - set(MAY) == set()
    assert set(MAY) - set(ROOMS) - {"api"} == set()


def test_no_two_files_import_each_other() -> None:
    """Not even behind TYPE_CHECKING or in a function."""
    edges = {name: {target for target in imports_of(name) if target in modules()} for name in modules()}
    packages = {name for name, path in modules().items() if path.name == "__init__.py"}
    edges = {name: targets - packages for name, targets in edges.items()}
    assert circles(edges) == []


def test_no_two_rooms_import_each_other() -> None:
    edges: dict[str, set[str]] = {room: set() for room in ROOMS}
    for module in modules():
        if (room := room_of(module)) in edges:
            edges[room] |= {room_of(name) for name in imports_of(module) if name in modules()} & set(ROOMS) - {room}
    assert circles(edges) == []


@pytest.mark.parametrize("module", [name for name in modules() if name.startswith(NO_TORCH)])
def test_these_rooms_import_no_torch_on_any_way(module: str) -> None:
    reached = reached_at_import(module)
    assert not [name for name in reached if name.split(".")[0] in ("torch", "ray") and "policy" in module]
    assert "torch" not in {name.split(".")[0] for name in reached}, sorted(
        n for n in reached if n.startswith("trunkline")
    )


def test_only_the_flower_room_knows_flowers_private_names() -> None:
    public = ("flwr.app", "flwr.serverapp", "flwr.clientapp")
    for module in modules():
        if room_of(module) != "flower":
            private = [name for name in imports_of(module) if name.split(".")[0] == "flwr" and name not in public]
            assert not private, f"{module} imports {private}"


def test_the_reading_of_imports_sees_what_python_sees() -> None:
    """The oracle: a module that this test believes to be free of torch, imported for real in a fresh process."""
    import subprocess

    program = "import sys, trunkline.strategies, trunkline.config.run; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], timeout=60, check=False).returncode == 0
    assert "torch" in reached_at_import("trunkline.client.training.loop")
    assert not {"torch"} & (reached_at_import("trunkline.strategies") | reached_at_import("trunkline.config.run"))
