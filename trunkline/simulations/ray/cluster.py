"""The Ray cluster under a simulation: starting or joining it, its nodes, and the worker processes on them."""

import logging
import math
import os
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, Literal

import ray
from ray.exceptions import RayError, RayTaskError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from trunkline.errors import DeploymentError
from trunkline.simulations.ray.worker import Worker, versions

OBJECT_STORE = 256 * 1024 * 1024  # bytes; a round's trunk and the replies in flight, not the data
JOIN_S = 15.0  # s to reach a cluster
START_S = 180.0  # s for a worker to start, on a machine that may be busy
NODE_CHECK_S = 1.0  # s between checks that the node of a worker that does not start is still alive
STARTS = 3  # times in a row a worker may die before it has answered `hello`


class WorkerProcess:
    """A worker process as the driver sees it, on one Ray node for good: rows that were read there stay there.

    Args:
        index: of the worker; it survives the process, which may die and be started again.
        node: id of its Ray node.
        gpu_share: part of a GPU that it asks Ray for.
        site_host: see `Worker`.
    """

    def __init__(self, index: int, node: str, gpu_share: float, site_host: Callable[[str], Any]) -> None:
        self.index = index
        self.node = node
        self.gpu_share = gpu_share
        self._site_host = site_host
        self._failures = 0
        self.start()

    def __str__(self) -> str:
        return f"worker {self.index} on Ray node {node_name(self.node)}"

    def start(self) -> None:
        """Start a new process; the one before, if any, is dead."""
        pinned = NodeAffinitySchedulingStrategy(node_id=self.node, soft=False)
        options = Worker.options(num_cpus=1, num_gpus=self.gpu_share, scheduling_strategy=pinned)  # type: ignore[attr-defined]
        self.actor: Any = options.remote(self._site_host, self.index)
        self.hello: Any = self.actor.hello.remote()
        self.ready = False
        self.contexts: set[int] = set()  # nodes whose context the process has
        self._start_time = time.monotonic()

    def check(self, wait_s: float = 0.0) -> Literal["ready", "starting", "lost"]:
        """Whether the process has started. One that died is started again, unless its node is lost or it died too often.

        Args:
            wait_s: seconds to wait for it.

        Raises:
            DeploymentError: it has other versions than this process, cannot import Trunkline, or finds no CPU.
        """
        if self.ready:
            return "ready"
        if not ray.wait([self.hello], timeout=wait_s)[0]:
            waited = time.monotonic() - self._start_time
            if waited > NODE_CHECK_S and self.node not in alive_nodes():
                return "lost"
            if waited > START_S:
                raise DeploymentError(
                    f"worker {self.index} did not start within {START_S:g} s on Ray node {node_name(self.node)}: expected a free CPU there, and Ray "
                    f"has {ray.available_resources().get('CPU', 0.0):g} free in all. End what else runs there, or give fewer --workers."
                )
            return "starting"
        try:
            reported = ray.get(self.hello)
        except RayTaskError as error:
            raise DeploymentError(self._cannot_start(error)) from None
        except RayError as error:
            if "ModuleNotFoundError" in str(error) or "ImportError" in str(error):
                raise DeploymentError(self._cannot_start(error)) from None
            self._failures += 1
            if self.node not in alive_nodes() or self._failures >= STARTS:
                return "lost"
            self.start()
            return "starting"
        if differences := _differences(versions(), reported):
            raise DeploymentError(
                f"Ray node {node_name(self.node)} {differences}. Install the same versions there; constraints.txt pins them."
            )
        self.ready, self._failures = True, 0
        return "ready"

    def end(self) -> None:
        ray.kill(self.actor)

    def _cannot_start(self, error: Exception) -> str:
        cause = [line for line in str(error).splitlines() if line.strip()][-1].strip()
        expected = ", ".join(f"{name} {version}" for name, version in versions().items())
        return (
            f"a worker cannot start on Ray node {node_name(self.node)}: {cause}. Expected there what this process has: {expected}. Install Trunkline on "
            "every node of the cluster, in the environment that Ray runs in."
        )


def start_workers(workers: int | None, sites: int, site_host: Callable[[str], Any]) -> list[WorkerProcess]:
    """Start a simulation's worker processes, spread over the nodes of the cluster.

    Args:
        workers: processes; None: one for every CPU of the cluster. Never more than CPUs or sites.

    Raises:
        DeploymentError: the cluster has no CPU.
    """
    nodes = _spread_over_nodes(workers, sites)
    shares = _gpu_shares(nodes)
    return [WorkerProcess(index, node, shares[node], site_host) for index, node in enumerate(nodes)]


def alive_nodes() -> set[str]:
    """Ids of the cluster's nodes that are alive."""
    return {node["NodeID"] for node in ray.nodes() if node["Alive"]}


def node_name(node_id: str) -> str:
    """A node for the text of an error: its short id and its address."""
    addresses = [node["NodeManagerAddress"] for node in ray.nodes() if node["NodeID"] == node_id]
    return f"{node_id[:8]} ({addresses[0]})" if addresses else node_id[:8]


def _spread_over_nodes(workers: int | None, sites: int) -> list[str]:
    """The Ray node of every worker: each goes where it leaves most CPUs to a worker."""
    cpus = {node["NodeID"]: node["Resources"].get("CPU", 0.0) for node in ray.nodes() if node["Alive"]}
    total = int(sum(cpus.values()))
    if total < 1:
        raise DeploymentError(
            "the Ray cluster has no CPU: expected at least 1. Start a node with `ray start --num-cpus`."
        )
    count = max(1, min(workers or total, total, sites))
    free, nodes = dict(cpus), []
    for _ in range(count):
        node = max(sorted(free), key=lambda node: (free[node] >= 1.0, free[node] / cpus[node] if cpus[node] else 0.0))
        free[node] -= 1.0
        nodes.append(node)
    return nodes


def _gpu_shares(nodes: Sequence[str]) -> dict[str, float]:
    """Ray node -> the part of a GPU that each worker there asks for. A node's GPUs are dealt to its workers, never two to one.

    Ray then shows each worker its GPU; workers that share one take turns on it as its driver lets them.
    """
    gpus_of = {node["NodeID"]: int(node["Resources"].get("GPU", 0.0)) for node in ray.nodes() if node["Alive"]}
    shares = {}
    for node, workers in Counter(nodes).items():
        gpus = gpus_of.get(node, 0)
        shares[node] = math.floor(1e4 / math.ceil(workers / gpus)) / 1e4 if gpus else 0.0
    return shares


def _differences(expected: dict[str, str], reported: dict[str, str]) -> str:
    """The versions in which another process differs, in words; empty if in none."""
    names = [name for name in expected if reported.get(name) != expected[name]]
    if not names:
        return ""
    has = ", ".join(f"{name} {reported.get(name, 'missing')}" for name in names)
    return f"has {has}; this process has {', '.join(f'{name} {expected[name]}' for name in names)}"


def start_ray(address: str | None, workers: int | None) -> None:
    """Start Ray on this machine, or join the cluster at `address`.

    Raises:
        DeploymentError: Ray cannot be started or joined.
    """
    # without these Ray warns of its own future defaults and reports usage to its makers
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    # Ray would give its workers the lowest priority, and they do all of the work: on a shared machine every other process came first
    os.environ.setdefault("RAY_worker_niceness", "0")
    # stacks of models come and go in blocks of megabytes: given back to the system each time, each would be paged in anew
    os.environ.setdefault("MALLOC_MMAP_THRESHOLD_", str(256 << 20))
    os.environ.setdefault("MALLOC_TRIM_THRESHOLD_", str(256 << 20))
    try:
        if address:
            _join(address)
        else:
            ray.init(  # "local": a cluster that another user has started on this machine is not ours to join unasked
                address="local", num_cpus=workers, include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR, object_store_memory=OBJECT_STORE,
                # fetched replies are freed one by one: Ray would keep a hundred of them, or a second's worth
                _system_config={"automatic_object_spilling_enabled": True, "free_objects_batch_size": 1},
            )  # fmt: skip
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise DeploymentError(
            f"Ray could not be {'joined at ' + address if address else 'started'}: {error}"
        ) from error


def _join(address: str) -> None:
    """`ray.init` at an address, for 15 s at most; Ray itself would try for minutes."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if address != "auto" and not (host and port.isdigit()):
        raise DeploymentError(
            f"--address {address}: expected HOST:PORT or ray://HOST:PORT, as `ray start --head` prints it."
        )
    remedy = "Is `ray start --head` running there, and the port open to this machine?"
    end = time.monotonic() + JOIN_S
    if address != "auto":
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=JOIN_S / 3).close()
        except OSError as error:
            raise DeploymentError(
                f"--address {address}: expected a Ray cluster, found none ({error}). {remedy}"
            ) from None
    failed: list[BaseException] = []

    def join() -> None:
        try:
            ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
        except BaseException as error:
            failed.append(error)

    # in a thread, because something else that listens at that port may keep Ray waiting for as long as it likes
    joining = threading.Thread(target=join, daemon=True)
    joining.start()
    joining.join(max(1.0, end - time.monotonic()))
    if joining.is_alive():
        raise DeploymentError(
            f"--address {address}: something listens there, but no Ray cluster answered within {JOIN_S:g} s. {remedy}"
        )
    if failed:
        raise DeploymentError(f"--address {address}: no Ray cluster could be joined ({failed[0]}). {remedy}") from None
