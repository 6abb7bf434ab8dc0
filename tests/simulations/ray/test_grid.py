"""Workers die, sites move between them; a simulation goes on, and its bytes stay the same."""

import random
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
from flwr.app import Message, RecordDict

from tests.loopback import federate, refusals_of, trunk_of
from tests.simulations.ray.site_hosts import VICTIM, Bulky, Deadly, NoOp, Slow, totals
from trunkline.errors import DeploymentError
from trunkline.flower.errors import error_site
from trunkline.flower.records import to_records
from trunkline.server.rounds.messaging import ask
from trunkline.simulations.in_process import InProcessGrid
from trunkline.simulations.ray import cluster, scheduler
from trunkline.simulations.ray.cluster import WorkerProcess
from trunkline.simulations.ray.grid import RayGrid
from trunkline.simulations.ray.site_host import SiteHost
from trunkline.simulations.ray.worker import versions

pytestmark = [
    pytest.mark.processes,
    pytest.mark.xdist_group("engine"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),  # files that Ray leaves open
]
PATIENT = {"min_sites": 1, "deadline_s": 120.0, "gather_s": 120.0}  # a process may take long to start on a busy machine


@pytest.fixture(scope="module")
def cpus() -> Iterator[None]:
    """One Ray for all tests here: starting it takes longer than most of them."""
    cluster.start_ray(None, 3)
    yield
    ray.shutdown()


@pytest.fixture
def grid_of(cpus: None) -> Iterator[Callable[..., RayGrid]]:
    made: list[RayGrid] = []

    def make(sites: list[Path], out: Path, **settings: Any) -> RayGrid:
        made.append(RayGrid(sites, [out / "state" / site.name for site in sites], **settings))
        return made[-1]

    yield make
    for grid in made:
        grid.close()


@pytest.fixture(scope="module")
def reference(plants: list[Path], tmp_path_factory: pytest.TempPathFactory) -> str:
    out = tmp_path_factory.mktemp("undisturbed")
    federate(plants, out, cohort=PATIENT)
    return trunk_of(out).digest()


def empty(count: int, tmp_path: Path) -> list[Path]:
    """Folders for sites whose host reads none."""
    return [tmp_path / f"site-{number}" for number in range(count)]


def answers(grid: RayGrid, content: Callable[[int], RecordDict], round: int = 1) -> dict[int, tuple[str, float]]:
    requests = {node: (lambda node=node: content(node)) for node in grid.contexts}
    found = ask(grid, "train", requests, round=round, deadline_s=60.0, resend_s=60.0)
    return {answer.node: totals(answer.content) for answer in found if answer.content is not None}


def test_a_worker_that_dies_is_replaced_once_and_the_bytes_are_the_same(
    plants: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reference: str, grid_of: Callable[..., RayGrid]
) -> None:
    grid = grid_of(plants, tmp_path, workers=1)
    grid.open_sites()
    starts: list[WorkerProcess] = []
    honest = WorkerProcess.start

    def counted(process: WorkerProcess) -> None:
        starts.append(process)
        honest(process)

    monkeypatch.setattr(WorkerProcess, "start", counted)
    ray.kill(grid.scheduler.slots[0].process.actor)  # all four sites are its own, and all four will be waiting for it
    federate(plants, tmp_path, grid=grid, cohort=PATIENT)  # type: ignore[arg-type]
    assert len(starts) == 1
    assert trunk_of(tmp_path).digest() == reference


@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 2, 3])
def test_a_worker_killed_at_a_random_moment_costs_no_site_and_no_byte(
    plants: list[Path], tmp_path: Path, reference: str, grid_of: Callable[..., RayGrid], workers: int
) -> None:
    grid = grid_of(plants, tmp_path, workers=workers)
    grid.open_sites()
    moment = random.Random()
    training, killed = threading.Event(), threading.Event()
    honest = grid._dispatch

    def watched(message: Message, context: Any) -> None:
        if message.metadata.message_type == "train":
            training.set()
        honest(message, context)

    grid._dispatch = watched  # type: ignore[method-assign]

    def kill() -> None:
        training.wait(60.0)
        time.sleep(moment.uniform(0.0, 0.6))
        ray.kill(moment.choice(grid.scheduler.slots).process.actor)
        killed.set()

    threading.Thread(target=kill, daemon=True).start()
    federate(plants, tmp_path, grid=grid, cohort=PATIENT)  # type: ignore[arg-type]
    assert killed.wait(60.0)
    assert not any(refusals_of(tmp_path).values())
    assert trunk_of(tmp_path).digest() == reference


@pytest.mark.slow
def test_a_site_that_kills_its_worker_twice_is_named_and_left_out_and_the_others_go_on(
    plants: list[Path], tmp_path: Path, grid_of: Callable[..., RayGrid]
) -> None:
    grid = grid_of(plants, tmp_path, workers=1, site_host=Deadly)
    grid.open_sites()
    federate(plants, tmp_path, grid=grid, cohort=PATIENT, rounds=2)  # type: ignore[arg-type]
    for refused in refusals_of(tmp_path).values():
        assert list(refused) == [VICTIM]
        for part in (VICTIM, "died twice", "worker 0 on Ray node", "out of memory", "fewer --workers", "site.toml"):
            assert part in refused[VICTIM]
    others = [plant for plant in plants if plant.name != VICTIM]
    federate(others, tmp_path / "without", cohort=PATIENT, rounds=2)
    assert trunk_of(tmp_path).digest() == trunk_of(tmp_path / "without").digest()


def test_a_site_whose_folder_vanishes_is_named_with_where_it_was_looked_for(plants: list[Path], tmp_path: Path) -> None:
    mine = [Path(shutil.copytree(plant, tmp_path / "sites" / plant.name)) for plant in plants]
    grid = InProcessGrid(mine, [tmp_path / "state" / plant.name for plant in mine])
    grid.open_sites()
    honest = grid._dispatch

    def vanishing(message: Message, context: Any) -> None:
        if message.metadata.group_id == "2":
            shutil.rmtree(mine[0], ignore_errors=True)
        honest(message, context)

    grid._dispatch = vanishing  # type: ignore[method-assign]
    federate(mine, tmp_path, grid=grid, cohort=PATIENT)  # type: ignore[arg-type]
    refused = refusals_of(tmp_path)
    assert refused[1] == {}
    assert list(refused[2]) == [mine[0].name]
    assert f"its folder {mine[0]} is gone; this process looked for it" in refused[2][mine[0].name]


def test_a_worker_says_on_which_node_a_folder_was_missing(tmp_path: Path, grid_of: Callable[..., RayGrid]) -> None:
    grid = grid_of(empty(1, tmp_path), tmp_path, workers=1, site_host=SiteHost)
    (asked,) = grid.push_messages([Message(to_records({}, "{}"), 2, "train", ttl=60.0, group_id="1")])
    end = time.monotonic() + 60.0
    while not (replies := grid.pull_messages([asked])) and time.monotonic() < end:
        pass
    told = error_site(replies[0])
    assert told is not None
    assert "site-0" in told[2]
    assert f"Ray node {grid.scheduler.slots[0].process.node[:8]}" in told[2]


def test_content_that_goes_to_all_is_put_into_the_store_once_a_round(
    tmp_path: Path, grid_of: Callable[..., RayGrid]
) -> None:
    grid = grid_of(empty(40, tmp_path), tmp_path, workers=2, site_host=NoOp)
    put = []
    honest = grid.contents._put
    grid.contents._put = lambda buffers: put.append(1) or honest(buffers)  # type: ignore[func-returns-value]
    for round in (1, 2, 3):
        found = answers(grid, lambda node: to_records({"w": np.full(10_000, float(round), np.float32)}, "{}"), round)  # noqa: B023
        assert {total for _, total in found.values()} == {10_000.0 * round}
        assert len(found) == 40
        assert len(put) == round
    assert len({where for where, _ in found.values()}) == 2


def test_contents_that_differ_reach_each_their_own_site(tmp_path: Path, grid_of: Callable[..., RayGrid]) -> None:
    grid = grid_of(empty(30, tmp_path), tmp_path, workers=2, site_host=NoOp)
    found = answers(grid, lambda node: to_records({"w": np.full(10_000, float(node % 7), np.float32)}, "{}"))
    assert {node: total for node, (_, total) in found.items()} == {
        node: 10_000.0 * (node % 7) for node in grid.contexts
    }


def test_a_question_asked_again_while_it_waits_is_not_done_twice(
    tmp_path: Path, grid_of: Callable[..., RayGrid]
) -> None:
    grid = grid_of(empty(1, tmp_path), tmp_path, workers=1, site_host=NoOp)

    def question(value: float) -> Message:
        return Message(to_records({"w": np.full(10_000, value)}, "{}"), 2, "train", ttl=60.0, group_id="1")

    first, again, other = (grid.push_messages([question(value)])[0] for value in (1.0, 1.0, 2.0))
    assert first == again != other
    waiting, came = {first, other}, []
    while waiting:
        came += grid.pull_messages(waiting)
        waiting -= {message.metadata.reply_to_message_id for message in came}
    assert len(came) == 2


def test_replies_do_not_pile_up_in_the_store_however_many_sites_answer(
    tmp_path: Path, grid_of: Callable[..., RayGrid], monkeypatch: pytest.MonkeyPatch
) -> None:
    size = Bulky.SIZE * 4
    monkeypatch.setattr(scheduler, "AHEAD", 2 * size)
    grid = grid_of(empty(60, tmp_path), tmp_path, workers=2, site_host=Bulky)
    grid.open_sites()
    trunk = np.ones(Bulky.SIZE, np.float32)
    requests = {node: (lambda: to_records({"w": trunk}, "{}")) for node in grid.contexts}
    used, before, count = [], store_used(), 0
    rss_before = own_memory()
    for answer in ask(grid, "train", requests, round=1, deadline_s=60.0, resend_s=60.0):
        assert answer.content is not None
        count += 1
        if count == 5:
            time.sleep(2.0)  # a driver that is slow: the workers must wait for it
        if count % 10 == 5:
            used.append((store_used() - before, own_memory() - rss_before))
    assert count == 60
    # the trunk, and what two workers may be ahead; the driver itself holds a reply and a message in the making
    assert max(store for store, _ in used) < (1 + 2 * 2 + 1) * size
    assert max(own for _, own in used) < 6 * size


def store_used() -> int:
    """Bytes in Ray's object store of this machine."""
    from ray._private.internal_api import get_memory_info_reply, get_state_from_address

    state = get_state_from_address(ray.get_runtime_context().gcs_address)
    return int(get_memory_info_reply(state).store_stats.object_store_bytes_used)


def own_memory() -> int:
    """Bytes of this process that are its own, without what it has mapped of the object store."""
    status = Path("/proc/self/status").read_text().split("RssAnon:")[1]
    return int(status.split()[0]) * 1024


@pytest.mark.slow
def test_idle_workers_take_waiting_sites_over_and_the_bytes_are_the_same(
    plants: list[Path], tmp_path: Path, reference: str, grid_of: Callable[..., RayGrid]
) -> None:
    grid = grid_of(plants, tmp_path, workers=2, site_host=Slow)
    grid.scheduler.owner = dict.fromkeys(grid.contexts, grid.scheduler.slots[0])
    grid.open_sites()
    federate(plants, tmp_path, grid=grid, cohort=PATIENT)  # type: ignore[arg-type]
    assert {slot.process.index for slot in grid.scheduler.owner.values()} == {0, 1}
    assert trunk_of(tmp_path).digest() == reference


@pytest.mark.parametrize(("reading", "moved"), [(0.5, 1), (2.5, 0), (60.0, 0)])
def test_a_site_moves_only_if_its_rows_are_read_before_its_worker_would_come_to_it(
    tmp_path: Path, grid_of: Callable[..., RayGrid], reading: float, moved: int
) -> None:
    grid = grid_of(empty(4, tmp_path), tmp_path, workers=2, site_host=NoOp)
    owner, idle = grid.scheduler.slots
    grid.scheduler.owner = dict.fromkeys(grid.contexts, owner)
    grid.scheduler.workload.opening = dict.fromkeys(grid.contexts, reading)
    grid.scheduler.workload.seconds = {
        (node, "train"): 1.0 for node in grid.contexts
    }  # 3 s of others' work, and 1 s of its own
    grid.push_messages([Message(to_records({}, "{}"), node, "train", ttl=60.0, group_id="1") for node in grid.contexts])
    grid.scheduler.steal(idle)
    assert (len(owner.queue), len(idle.queue)) == (4 - moved, moved)
    assert sum(slot is idle for slot in grid.scheduler.owner.values()) == moved


def test_long_sites_start_first_and_are_dealt_evenly(tmp_path: Path, grid_of: Callable[..., RayGrid]) -> None:
    grid = grid_of(empty(9, tmp_path), tmp_path, workers=2, site_host=NoOp)
    for node, seconds in zip(grid.contexts, [1, 1, 9, 2, 5, 3, 4, 8, 7], strict=True):
        grid.scheduler.workload.seconds[node, "train"] = float(seconds)
    order = [grid.scheduler.workload.seconds[node, "train"] for node in grid.get_node_ids()]
    assert order == sorted(order, reverse=True)
    grid.scheduler.owner = {}
    dealt = grid.scheduler.assign(grid.contexts, grid.scheduler.slots)
    loads = [
        sum(grid.scheduler.workload.seconds[node, "train"] for node, owner in dealt.items() if owner is slot)
        for slot in grid.scheduler.slots
    ]
    assert loads == [20.0, 20.0]


def test_a_worker_with_other_versions_is_refused_with_both_named(
    tmp_path: Path, grid_of: Callable[..., RayGrid], monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = {**versions(), "torch": "1.0"}
    monkeypatch.setattr(cluster, "versions", lambda: expected)
    grid = grid_of(empty(1, tmp_path), tmp_path, workers=1, site_host=NoOp)
    found = rf"Ray node {grid.scheduler.slots[0].process.node[:8]} .* has torch 2\..*; this process has torch 1.0. Install the same"
    with pytest.raises(DeploymentError, match=found):
        grid.open_sites()


class Homeless(NoOp):
    def __init__(self, where: str) -> None:
        raise ModuleNotFoundError("No module named 'trunkline'")


def test_a_node_where_trunkline_is_missing_is_named_with_what_to_install(
    tmp_path: Path, grid_of: Callable[..., RayGrid]
) -> None:
    grid = grid_of(empty(1, tmp_path), tmp_path, workers=1, site_host=Homeless)
    with pytest.raises(
        DeploymentError, match=r"cannot start on Ray node .*No module named 'trunkline'.*trunkline 0\..*Install"
    ):
        grid.open_sites()


@pytest.mark.slow
def test_without_workers_ray_is_not_even_imported(plants: list[Path], tmp_path: Path) -> None:
    run = tmp_path / "run.toml"
    run.write_text('name = "alone"\nrounds = 1\n[training]\nsteps = 1\n[trunk]\nwidth = 8\n')
    command = (
        "import sys, trunkline.cli.app; sys.argv = ['trunkline', *sys.argv[1:]]\n"
        "try: trunkline.cli.app.main()\nfinally: assert 'ray' not in sys.modules, 'imported'"
    )
    arguments = [
        "simulate",
        str(run),
        "--sites",
        str(plants[0].parent),
        "--out",
        str(tmp_path / "out"),
        "--workers",
        "0",
    ]
    done = subprocess.run(
        [sys.executable, "-c", command, *arguments], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert (tmp_path / "out" / "report.json").exists()
