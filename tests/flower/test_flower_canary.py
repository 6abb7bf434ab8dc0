"""Says which private name of Flower has moved, before anything else fails in an obscure place."""

import ast
import importlib
import json
from importlib.metadata import version
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from flwr.app import Message

import trunkline

ROOM = Path(trunkline.__file__).parent / "flower"
SOURCE = ROOM / "private.py"
PATCHED = [  # set or called from outside by `supernode_main`, so no import statement names them
    ("flwr.supernode.start_client_internal", "time"),
    ("flwr.supernode.start_client_internal", "_pull_and_store_message"),
    ("flwr.supernode.fleet_http_connection", "generate_key_pairs"),
    ("flwr.supernode.fleet_http_connection", "FleetHttpClient"),
    ("flwr.supernode.fleet_http_client", "FleetHttpClient._unary_unary"),
    ("flwr.supernode.fleet_http_client", "FleetHttpClient.RegisterNode"),
    ("flwr.supernode.fleet_http_client", "FleetHttpClient.ActivateNode"),
    ("flwr.supernode.fleet_http_client", "FleetHttpClient.DeactivateNode"),
    ("flwr.supernode.fleet_http_client", "FleetHttpClient.UnregisterNode"),
    ("flwr.supercore.runtime", "RuntimeHttpClient.AcquireTask"),
    ("flwr.supercore.runtime", "RuntimeHttpClient.PullTaskInput"),
    ("flwr.supercore.runtime", "RuntimeHttpClient.PullMessages"),
    ("flwr.supercore.runtime", "RuntimeHttpClient.PullObject"),
    ("flwr.supercore.runtime", "RuntimeHttpClient.ConfirmMessageReceived"),
    ("flwr.supercore.runtime", "RuntimeHttpClient.SendTaskHeartbeat"),
    ("flwr.supercore.runtime", "RuntimeHttpClient.PushTaskOutput"),
    ("flwr.supercore.control", "ControlHttpClient.StartRun"),
    ("flwr.supercore.control", "ControlHttpClient.StopRun"),
    ("flwr.supercore.control", "ControlHttpClient.ListRuns"),
    ("flwr.supercore.control", "ControlHttpClient.ListNodes"),
    ("flwr.supercore.control", "ControlHttpClient.RegisterNode"),
    ("flwr.supercore.control", "ControlHttpClient.UnregisterNode"),
    ("flwr.superlink.cli.flwr_serverapp", "flwr_serverapp"),
    ("flwr.supercore.task_identity", "TaskIdentity.task_id.fset"),
]


def imported() -> list[tuple[str, str]]:
    """Every name that the package takes from Flower, read from its text so that no file need import."""
    trees = [ast.parse(file.read_text()) for file in sorted(ROOM.glob("*.py"))]
    nodes = [node for tree in trees for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.module]
    return [
        (str(node.module), name.name) for node in nodes if str(node.module).startswith("flwr") for name in node.names
    ]


def expected() -> str:
    (line,) = (line for line in SOURCE.read_text().splitlines() if line.startswith("EXPECTED ="))
    return str(ast.literal_eval(line.partition("=")[2].split("#")[0].strip()))


def moved(module: str, name: str) -> str:
    return (
        f"{module}.{name} is gone: flwr {version('flwr')} is installed, trunkline/flower/private.py was written for "
        f"{expected()}.*. Find what replaced it, mend trunkline/flower/private.py, and raise EXPECTED and the pin in pyproject.toml."
    )


@pytest.mark.parametrize(("module", "name"), [*imported(), *PATCHED])
def test_every_private_name_is_where_it_was(module: str, name: str) -> None:
    try:
        found: object = importlib.import_module(module)
        steps = name.split(".")
        if steps[-1] == "fset":  # a property of a metaclass
            found = getattr(type(getattr(found, steps[0])), steps[1])
            steps = steps[2:]
        for step in steps:
            if isinstance(found, ModuleType) and not hasattr(found, step):
                importlib.import_module(f"{found.__name__}.{step}")  # as `from module import step` does
            found = getattr(found, step)
    except (ImportError, AttributeError):
        pytest.fail(moved(module, name))


def test_the_installed_flower_is_the_one_this_was_written_for() -> None:
    assert version("flwr").startswith(f"{expected()}."), (
        f"flwr {version('flwr')} is installed; trunkline/flower/private.py was written for {expected()}.*: peers must match it, too"
    )


def test_flower_still_sleeps_the_three_seconds_that_the_launcher_shortens() -> None:
    text = Path(str(importlib.import_module("flwr.supernode").__path__[0]), "start_client_internal.py").read_text()
    assert "time.sleep(3)" in text, moved("flwr.supernode.start_client_internal", "time.sleep(3)")


def test_a_round_through_the_loopback_grid() -> None:
    from flwr.clientapp import ClientApp

    from trunkline.flower.grid import LoopbackGrid
    from trunkline.flower.records import open_records, to_records

    app = ClientApp()

    @app.train()
    def double(message: Message, context: object) -> Message:
        arrays, header, _ = open_records(message.content)
        reply = {name: array * 2 for name, array in arrays.items()}
        return Message(to_records(reply, header, {"loss": 0.5}), reply_to=message)

    grid = LoopbackGrid(app, [{"site": "a"}, {"site": "b"}])
    asked = [
        Message(to_records({"w": np.full(3, node, np.float32)}, json.dumps({"to": node})), node, "train")
        for node in grid.get_node_ids()
    ]
    replies = grid.send_and_receive(asked, timeout=10.0)
    assert {reply.metadata.src_node_id for reply in replies} == set(grid.get_node_ids())
    for reply in replies:
        arrays, header, metrics = open_records(reply.content)
        assert np.array_equal(arrays["w"], np.full(3, 2 * reply.metadata.src_node_id, np.float32))
        assert json.loads(header) == {"to": reply.metadata.src_node_id} and metrics == {"loss": 0.5}
