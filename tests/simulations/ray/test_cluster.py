"""Two Ray nodes, as a cluster has them: sites stay where they were opened, and a node that dies takes no round with it."""

import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
from flwr.app import Message
from ray.cluster_utils import Cluster

from tests.loopback import federate, refusals_of, trunk_of
from tests.simulations.ray.site_hosts import NoOp, Showing
from tests.simulations.ray.test_grid import PATIENT, answers, empty
from trunkline.flower.records import to_records
from trunkline.simulations.ray.grid import RayGrid

pytestmark = [
    pytest.mark.processes,
    pytest.mark.slow,
    pytest.mark.timeout(280),
    pytest.mark.xdist_group("engine"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),  # files that Ray leaves open
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
]
STORE = 80 * 1024 * 1024  # bytes; Ray's least is 75 MB


@pytest.fixture
def cluster() -> Iterator[Cluster]:
    ray.shutdown()
    started = Cluster(
        initialize_head=True,
        head_node_args={
            "num_cpus": 1,
            "object_store_memory": STORE,
            "include_dashboard": False,
            "_system_config": {"health_check_period_ms": 500, "health_check_failure_threshold": 4},
        },
    )
    started.add_node(num_cpus=1, object_store_memory=STORE)
    yield started
    ray.shutdown()
    started.shutdown()


def test_workers_spread_over_the_nodes_and_a_site_stays_where_it_was_opened(cluster: Cluster, tmp_path: Path) -> None:
    grid = RayGrid(empty(12, tmp_path), [tmp_path] * 12, workers=None, address=cluster.address, site_host=NoOp)
    try:
        grid.open_sites()
        assert len({slot.process.node for slot in grid.scheduler.slots}) == 2
        rounds = [answers(grid, lambda node: to_records({}, "{}"), round) for round in (1, 2, 3)]
    finally:
        grid.close()
    where = [{node: place for node, (place, _) in found.items()} for found in rounds]
    assert where[0] == where[1] == where[2]
    assert len({place.rpartition("Ray node ")[2] for place in where[0].values()}) == 2


def test_the_gpus_of_a_node_are_dealt_to_its_workers(tmp_path: Path) -> None:
    """Ray believes in GPUs that it is told of, so how they are dealt can be seen without one."""
    ray.shutdown()
    started = Cluster(
        initialize_head=True,
        head_node_args={"num_cpus": 3, "num_gpus": 2, "object_store_memory": STORE, "include_dashboard": False},
    )
    try:
        started.add_node(num_cpus=1, object_store_memory=STORE)
        grid = RayGrid(empty(8, tmp_path), [tmp_path] * 8, workers=None, address=started.address, site_host=Showing)
        try:
            grid.open_sites()
            shares = {slot.process.index: slot.process.gpu_share for slot in grid.scheduler.slots}
            seen = {node: place for node, (place, _) in answers(grid, lambda node: to_records({}, "{}"), 1).items()}
        finally:
            grid.close()
    finally:
        ray.shutdown()
        started.shutdown()
    assert sorted(shares.values()) == [0.0, 0.5, 0.5, 0.5]
    owner = {node: slot.process.index for node, slot in grid.scheduler.owner.items()}
    by_worker = {owner[node]: place for node, place in seen.items()}
    assert sorted(by_worker[number] for number, share in shares.items() if share) in (["0", "0", "1"], ["0", "1", "1"])


def test_a_node_that_dies_in_mid_round_costs_no_site_and_no_byte(
    cluster: Cluster, plants: list[Path], tmp_path: Path
) -> None:
    federate(plants, tmp_path / "undisturbed", cohort=PATIENT)
    out = tmp_path / "out"
    grid = RayGrid(plants, [out / "state" / plant.name for plant in plants], workers=None, address=cluster.address)
    gone = threading.Event()
    try:
        grid.open_sites()
        head = cluster.head_node.node_id
        honest = grid._dispatch
        there = [node for node, slot in grid.scheduler.owner.items() if slot.process.node != head]

        def watched(message: Message, context: Any) -> None:
            honest(message, context)
            if message.metadata.group_id == "2" and context.node_id in there and not gone.is_set():
                gone.set()
                (other,) = cluster.worker_nodes
                cluster.remove_node(other, allow_graceful=False)

        grid._dispatch = watched  # type: ignore[method-assign]
        federate(plants, out, grid=grid, cohort=PATIENT)  # type: ignore[arg-type]
        assert gone.is_set()
        assert {slot.process.node for slot in grid.scheduler.owner.values()} == {head}
    finally:
        grid.close()
    assert not any(refusals_of(out).values())
    assert trunk_of(out).digest() == trunk_of(tmp_path / "undisturbed").digest()


@pytest.mark.parametrize("listens", [False, True], ids=["nobody there", "something else there"])
def test_an_address_without_a_cluster_is_refused_in_time(plants: list[Path], tmp_path: Path, listens: bool) -> None:
    run = tmp_path / "run.toml"
    run.write_text('name = "nowhere"\nrounds = 1\n')
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        if listens:
            taken.listen()
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        command = [sys.executable, "-m", "trunkline.cli.app", "simulate", str(run), "--sites", str(plants[0].parent)]
        command += ["--out", str(tmp_path / "out"), "--address", address]
        began = time.monotonic()
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False, env={**os.environ})
    assert done.returncode == 1, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    assert f"--address {address}" in done.stderr
    assert "ray start --head" in done.stderr
    assert time.monotonic() - began < 15.0 + 30.0  # and what the imports take on a busy machine
