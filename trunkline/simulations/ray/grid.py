"""Many sites on Ray, with the ClientApp and ServerApp that are deployed: only the Grid differs.

Each worker process owns a share of the sites, so a site's rows are read once and stay where they are. A site's state lies
in its vault on disk, so another worker can go on with it at any time: after a worker or a whole node has died, or when
one has nothing left to do before a round ends. Which worker answers changes no byte of an answer.
"""

import heapq
import itertools
import logging
import math
import os
import pickle
import socket
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import ray
from flwr.app import Context, Message, RecordDict
from ray.exceptions import RayActorError, RayError, RayTaskError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

import trunkline
from trunkline.errors import DeploymentError
from trunkline.flower.errors import CRASHED, error_reply
from trunkline.flower.grid import LocalGrid, message_of, stamp
from trunkline.protocol.arrays import Arrays
from trunkline.protocol.messages import RoundRequest
from trunkline.simulations.ray.serialization import Buffer, Shared, Sharing, equal, pack, unpack
from trunkline.simulations.ray.site_host import Desk, check_opened, node_configs
from trunkline.simulations.vectorized.driver import Together
from trunkline.simulations.vectorized.worker import Part

OBJECT_STORE = 256 * 1024 * 1024  # bytes; a round's trunk and the replies in flight, not the data
AHEAD = 32 * 1024 * 1024  # bytes of replies a worker may have made, or be making, that the driver has not fetched
GROUPS = 2  # outstanding a worker: one it works on, and one so that it need not wait for the driver
GROUP_MOST = 48  # messages; what a call of Ray costs is hardly seen at that
GROUP_FIRST = 16  # messages that an idle worker gets, so that it begins while the others are still being made
GROUP_S = 0.25  # s of work in a group, so that progress is seen and there is something left to hand to an idle worker
UNSENT = 64 * 1024 * 1024  # bytes of messages that no worker has taken yet, beyond which the grid asks for no more
JOIN_S = 15.0  # s to reach a cluster
START_S = 180.0  # s for a worker to start: it imports torch, on a machine that may be busy
PAUSE_S = 0.02  # s that a pull waits for the first reply
LOOK_S = 1.0  # s between looks at whether the node of a worker that does not start is still there
TWICE = 2  # deaths of a worker with a site alone in it
STARTS = 3  # times in a row a worker may die before it has said hello


def versions() -> dict[str, str]:
    """What must be the same in every process of a simulation for the same bytes to come out."""
    return {"trunkline": trunkline.__version__, "flwr": version("flwr"), "torch": version("torch")}


@ray.remote
class Worker:
    """One process with some of the sites; what it does for them is its desk's business."""

    def __init__(self, desk: Callable[[str], Any], number: int) -> None:
        logging.getLogger("flwr").setLevel(logging.ERROR)
        node = ray.get_runtime_context().get_node_id()
        self.desk = desk(f"worker {number} (process {os.getpid()} on {socket.gethostname()}, Ray node {node[:8]})")
        self.contexts: dict[int, Context] = {}
        self.shared: dict[int, list[bytes]] = {}

    def hello(self) -> dict[str, str]:
        return versions()

    def crowd_begin(self, request: str, contexts: list[Context]) -> list[int]:
        """See `crowd.Crowd`, of which this process has one; it is made anew for every pass of a run."""
        from trunkline.simulations.vectorized.worker import Crowd

        self.crowd = Crowd({context.node_id: context.node_config for context in contexts})
        return self.crowd.begin(RoundRequest.model_validate_json(request))

    def crowd_answer(self, request: str, arrays: dict[str, Any], nodes: list[int]) -> Any:
        return self.crowd.answer(RoundRequest.model_validate_json(request), Arrays(arrays), nodes)

    def crowd_flush(self) -> None:
        self.crowd.flush()

    def open(self, contexts: list[Context]) -> list[tuple[str | None, float]]:
        self.contexts |= {context.node_id: context for context in contexts}
        return [self.desk.open(context) for context in contexts]

    def answer(
        self,
        parcels: list[tuple[int, bytes, bytes, list[Buffer] | int]],
        contexts: list[Context],
        shared: dict[int, list[Any]],
    ) -> list[tuple[bytes, list[Buffer], float]]:
        """The replies to a group of messages in their order, each with the seconds it took.

        Args:
            parcels: node, metadata, content without its arrays, and these: their bytes, or the number they are shared by.
            contexts: of nodes this process has not met.
            shared: number -> where its bytes lie in the object store.
        """
        self.contexts |= {context.node_id: context for context in contexts}
        for number in [one for one in self.shared if one not in shared]:
            del self.shared[number]
        for number, (reference,) in shared.items():
            if number not in self.shared:  # one copy a process, which all messages with this content then look at
                self.shared[number] = [bytes(buffer) for buffer in ray.get(reference)]
        replies = []
        for node, metadata, rest, arrays in parcels:
            began = time.perf_counter()
            own = self.shared[arrays] if isinstance(arrays, int) else [bytes(buffer) for buffer in arrays]
            content = unpack(rest, own)
            reply = self.desk.answer(message_of(pickle.loads(metadata), content), self.contexts[node])
            replies.append((*pack(reply), time.perf_counter() - began))
        return replies


@dataclass
class _Job:
    """A message on its way to its answer."""

    message_id: str
    node: int
    kind: str
    group: str
    metadata: bytes
    rest: bytes
    arrays: list[Buffer] | Shared
    first: bool = True  # with these arrays
    deaths: int = 0  # of workers that had nothing but this to do

    @property
    def nbytes(self) -> int:
        """What it takes of the memory of this machine; content it shares with an earlier message takes none."""
        own = self.arrays.nbytes if isinstance(self.arrays, Shared) else sum(one.nbytes for one in self.arrays)
        return (own if self.first else 0) + len(self.rest) + len(self.metadata)

    def parcel(self) -> tuple[int, bytes, bytes, list[Buffer] | int]:
        return (
            self.node,
            self.metadata,
            self.rest,
            self.arrays.number if isinstance(self.arrays, Shared) else self.arrays,
        )

    def same(self, other: "_Job") -> bool:
        """Whether the same is asked again, as of a site that has been silent for long."""
        if (self.kind, self.group, self.rest) != (other.kind, other.group, other.rest):
            return False
        if isinstance(self.arrays, Shared) or isinstance(other.arrays, Shared):
            return self.arrays is other.arrays
        return equal(self.arrays, other.arrays)


@dataclass
class _Group:
    reference: Any
    jobs: list[_Job]
    expected: int  # bytes of its replies


@dataclass
class _Seat:
    """A worker process as the driver sees it; who sits there may die and be replaced."""

    number: int
    home: str  # id of its Ray node
    actor: Any = None
    hello: Any = None
    ready: bool = False
    since: float = 0.0
    failures: int = 0
    known: set[int] = field(default_factory=set)
    queue: list[tuple[float, int, _Job]] = field(default_factory=list)  # a heap, longest first
    suspects: deque[_Job] = field(default_factory=deque)  # unanswered when a worker died: each is asked alone
    out: list[_Group] = field(default_factory=list)


class RayGrid(LocalGrid):
    """A Grid over Ray actors.

    Args:
        sites: site folders; node ids follow their order. On a cluster they, and the states, lie on storage that all its
            nodes have at the same path.
        states: the sites' state folders, beside them in order.
        workers: processes; None: one for every CPU of the cluster. Never more than sites.
        address: of a Ray cluster to join; None starts one on this machine.
        desk: what a worker does for its sites.

    Raises:
        DeploymentError: Ray cannot be started or joined.
    """

    waits = True

    def __init__(
        self,
        sites: Sequence[Path],
        states: Sequence[Path],
        *,
        workers: int | None,
        address: str | None = None,
        desk: Callable[[str], Any] = Desk,
    ) -> None:
        super().__init__(node_configs(sites, states))
        self._started = not ray.is_initialized()
        if self._started:
            _start_ray(address, workers)
        self._desk = desk
        self._seats = [_Seat(number, home) for number, home in enumerate(_homes(workers, len(sites)))]
        self._gpus = _gpu_shares([seat.home for seat in self._seats])
        for seat in self._seats:
            self._seat_worker(seat)
        self._size = {node: _bytes_in(site) for node, site in zip(self.contexts, sites, strict=True)}
        self._seconds: dict[tuple[int, str], float] = {}  # (node, kind) -> what its last answer took
        self._opened: dict[int, float] = {}  # node -> s to read its rows
        self._typical: dict[str, tuple[float, int]] = {}  # kind -> seconds and bytes of a reply
        self._owner = self._dealt(self.contexts, self._seats)
        self._sharing = Sharing(self._put)
        self._open: dict[int, _Job] = {}  # node -> its unanswered message
        self._unsent = 0
        self._done: dict[str, Message] = {}
        self._struck: set[int] = set()  # sites that have cost two workers in one message
        self._order = itertools.count()
        self._together = Together(self)

    # ---- workers

    def _worker(self, seat: _Seat) -> Any:
        """A new process at the seat's node, for good: rows that were read there stay there."""
        pinned = NodeAffinitySchedulingStrategy(node_id=seat.home, soft=False)
        options = Worker.options(num_cpus=1, num_gpus=self._gpus[seat.home], scheduling_strategy=pinned)  # type: ignore[attr-defined]
        return options.remote(self._desk, seat.number)

    def _seat_worker(self, seat: _Seat) -> None:
        seat.actor = self._worker(seat)
        seat.hello = seat.actor.hello.remote()
        seat.ready, seat.since = False, time.monotonic()
        seat.known = set()

    def _is_ready(self, seat: _Seat, wait_s: float = 0.0) -> bool:
        """Whether the worker has started; one that cannot is started again, and elsewhere if its node is gone.

        Raises:
            DeploymentError: it has other versions than this process, cannot import Trunkline, or finds no CPU.
        """
        if seat.ready:
            return True
        if not ray.wait([seat.hello], timeout=wait_s)[0]:
            if time.monotonic() - seat.since > LOOK_S and seat.home not in _alive():
                self._give_up(seat)
            elif time.monotonic() - seat.since > START_S:
                raise DeploymentError(
                    f"worker {seat.number} did not start within {START_S:g} s on Ray node {_name(seat.home)}: expected a free CPU there, and Ray "
                    f"has {ray.available_resources().get('CPU', 0.0):g} free in all. End what else runs there, or give fewer --workers."
                )
            return False
        try:
            found = ray.get(seat.hello)
        except RayTaskError as error:
            raise DeploymentError(_cannot_start(seat, error)) from None
        except RayError as error:
            if "ModuleNotFoundError" in str(error) or "ImportError" in str(error):
                raise DeploymentError(_cannot_start(seat, error)) from None
            seat.failures += 1
            if seat.home not in _alive() or seat.failures >= STARTS:
                self._give_up(seat)
            else:
                self._seat_worker(seat)
            return False
        if wrong := _differences(versions(), found):
            raise DeploymentError(
                f"Ray node {_name(seat.home)} {wrong}. Install the same versions there; constraints.txt pins them."
            )
        seat.ready, seat.failures = True, 0
        return True

    def _give_up(self, seat: _Seat) -> None:
        """Hand the sites of a seat whose node is gone to the workers that are left: what they need is in their vaults."""
        left = [one for one in self._seats if one is not seat]
        if not left:
            raise DeploymentError(
                f"worker {seat.number} on Ray node {_name(seat.home)} died and no other is left (out of memory?). "
                "Everything up to the last finished round is on disk; go on with --resume, with more memory or another --address."
            )
        self._seats = left
        mine = [node for node, owner in self._owner.items() if owner is seat]
        self._owner |= self._dealt(mine, left)
        waiting = [*seat.suspects, *(job for _, _, job in seat.queue)]
        self._unsent -= sum(job.nbytes for job in waiting)
        jobs = [*waiting, *(job for group in seat.out for job in group.jobs)]
        for held in (seat.suspects, seat.queue, seat.out):
            held.clear()
        for job in jobs:
            job.deaths = 0  # it was the node
            self._enqueue(job)

    def _bury(self, seat: _Seat) -> None:
        """The worker at this seat is dead: start another, and ask what it left unanswered again, one message at a time.

        Alone, a site that kills its worker is known by it.
        """
        lost: list[_Job] = []
        for group in seat.out:
            try:
                if ray.wait([group.reference], timeout=0.0)[0]:
                    self._keep(group, ray.get(group.reference))
                    continue
            except RayError:
                pass
            if not lost and len(group.jobs) == 1:  # the later groups had not been begun
                group.jobs[0].deaths += 1
            lost += group.jobs
        seat.out.clear()
        ray.kill(seat.actor)
        for job in reversed(lost):
            if job.deaths >= TWICE:
                self._struck.add(job.node)
                self._finish(job, self._death(seat, job))
            else:
                self._unsent += job.nbytes
                seat.suspects.appendleft(job)
        if seat.home in _alive():
            self._seat_worker(seat)
        else:
            self._give_up(seat)

    def _death(self, seat: _Seat, job: _Job) -> Message:
        folder = Path(str(self.contexts[job.node].node_config["site"]))
        return error_reply(
            _message(job),
            f"{folder.name}: the worker process died twice while it answered for this site alone (worker {seat.number} on Ray node "
            f"{_name(seat.home)}), most likely out of memory. The site is left out here and the others go on. Give it more memory: fewer "
            f"--workers, a smaller batch_size or width, or a smaller window in {folder / 'site.toml'}.",
            code=CRASHED,
        )

    # ---- which worker, in which order

    def _cost(self, node: int, kind: str = "train") -> float:
        """Seconds an answer takes; before one is known, as if 100 MB of files took one."""
        known = self._seconds.get((node, kind), self._seconds.get((node, "train")))
        return self._size[node] / 1e8 if known is None else known

    def _dealt(self, nodes: Iterable[int], seats: Sequence[_Seat]) -> dict[int, _Seat]:
        """Sites to workers, longest first and each to who has least, so that all end at about the same time."""
        loads = [(sum(self._cost(node) for node, owner in getattr(self, "_owner", {}).items() if owner is seat), place)
                 for place, seat in enumerate(seats)]  # fmt: skip
        heapq.heapify(loads)
        dealt = {}
        for node in sorted(nodes, key=lambda node: (-self._cost(node), node)):
            load, place = loads[0]
            dealt[node] = seats[place]
            heapq.heapreplace(loads, (load + max(self._cost(node), 1e-6), place))
        return dealt

    def get_node_ids(self) -> list[int]:
        """Longest first: a long site that starts last is what a round would wait for."""
        return sorted(self.contexts, key=lambda node: (-self._cost(node), node))

    def _enqueue(self, job: _Job) -> None:
        self._unsent += job.nbytes
        seat = self._owner[job.node]
        if job.node in self._struck:  # it has killed before, so it takes nobody else's answers with it
            job.deaths = max(job.deaths, 1)
            seat.suspects.append(job)
        else:
            heapq.heappush(seat.queue, (-self._cost(job.node, job.kind), next(self._order), job))

    def _steal(self, thief: _Seat) -> None:
        """Move one waiting site to an idle worker of the same node if, having read its rows, it is done before the owner begins."""
        for victim in self._seats:
            if victim is thief or victim.home != thief.home or len(victim.queue) < 2:
                continue
            # the group it works on may be as good as done; the next one is not begun
            ahead = [job for group in victim.out[1:] for job in group.jobs] + [job for _, _, job in victim.queue]
            left = sum(self._seconds.get((job.node, job.kind), 0.0) for job in ahead)
            for place, (_, _, job) in enumerate(victim.queue):
                seconds = self._seconds.get((job.node, job.kind))
                reading = 0.0 if job.node in thief.known else self._opened.get(job.node)
                if seconds is None or reading is None or reading + seconds >= left - seconds:
                    continue
                del victim.queue[place]
                self._unsent -= job.nbytes
                heapq.heapify(victim.queue)
                self._owner[job.node] = thief
                self._enqueue(job)
                return

    # ---- messages

    def _put(self, buffers: list[Buffer]) -> tuple[Any, list[Buffer]]:
        reference = ray.put(buffers)
        return reference, ray.get(reference)

    def room(self) -> bool:
        return self._unsent < UNSENT

    def _dispatch(self, message: Message, context: Context) -> None:
        rest, arrays, new = self._sharing.packed(message.content)
        metadata = message.metadata
        job = _Job(
            metadata.message_id, context.node_id, metadata.message_type, metadata.group_id, pickle.dumps(metadata, 5), rest,
            arrays, first=new,
        )  # fmt: skip
        known = self._open.get(job.node)
        if known is not None and known.same(job):  # still waiting for its turn, so it need not be done twice
            stamp(message, known.message_id)
            return
        self._open[job.node] = job
        self._enqueue(job)
        seat = self._owner[job.node]
        if len(seat.queue) >= (GROUP_MOST if seat.out else GROUP_FIRST):
            self._send(seat)

    def _take(self, seat: _Seat) -> list[_Job]:
        """The next group: as many messages as keep its replies, and the wait for them, small."""
        group: list[_Job] = []
        nbytes, seconds = 0, 0.0
        most = GROUP_MOST if seat.out else GROUP_FIRST
        if len(seat.queue) < most + GROUP_FIRST:
            most = len(seat.queue)  # rather than a small one more
        while seat.queue and len(group) < most:
            job = seat.queue[0][2]
            typical = self._typical.get(job.kind)
            if group and typical is None:
                break
            if typical is not None:
                nbytes += max(typical[1], job.nbytes)
                seconds += self._seconds.get((job.node, job.kind), typical[0])
                if group and (nbytes > AHEAD // GROUPS or seconds > GROUP_S):
                    break
            heapq.heappop(seat.queue)
            group.append(job)
        return group

    def _send(self, seat: _Seat) -> None:
        """Give the worker what it may have: two groups, and in bytes no more than it may be ahead of the driver."""
        if not self._is_ready(seat):
            return
        while seat.queue or seat.suspects:
            if seat.suspects:
                if seat.out:
                    return
                jobs = [seat.suspects.popleft()]
            else:
                ahead = sum(group.expected for group in seat.out)
                kind = seat.queue[0][2].kind
                if seat.out and (
                    len(seat.out) >= GROUPS or kind not in self._typical or ahead + self._typical[kind][1] > AHEAD
                ):
                    return
                jobs = self._take(seat)
            new = {job.node for job in jobs} - seat.known
            shared = {job.arrays.number: [job.arrays.reference] for job in jobs if isinstance(job.arrays, Shared)}
            parcels = [job.parcel() for job in jobs]
            reference = seat.actor.answer.remote(parcels, [self.contexts[node] for node in new], shared)
            expected = sum(self._typical[job.kind][1] if job.kind in self._typical else AHEAD for job in jobs)
            seat.out.append(_Group(reference, jobs, expected))
            seat.known |= new
            self._unsent -= sum(job.nbytes for job in jobs)

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        """The replies of at most one group, so that no more than that is ever held here; waits a moment for the first."""
        return super().pull_messages(message_ids)

    def _collect(self, message_ids: AbstractSet[str]) -> list[Message]:
        for seat in list(self._seats):
            if not (seat.queue or seat.suspects or seat.out):
                self._steal(seat)
            self._send(seat)
        if not (wanted := self._wanted(message_ids)):
            self._receive()
            wanted = self._wanted(message_ids)
        return wanted

    def _wanted(self, message_ids: AbstractSet[str]) -> list[Message]:
        return [self._done.pop(one) for one in list(self._done) if one in message_ids]

    def _receive(self) -> None:
        """Fetch the oldest group that is ready."""
        running = {group.reference: (seat, group) for seat in self._seats for group in seat.out}
        starting = [seat.hello for seat in self._seats if not seat.ready]
        if not running and not starting:
            return
        ready, _ = ray.wait([*running, *starting], num_returns=1, timeout=PAUSE_S)
        if not ready or ready[0] not in running:
            return
        seat, group = running[ready[0]]
        try:
            replies = ray.get(group.reference)
        except RayActorError:
            self._bury(seat)
            return
        except RayTaskError as error:
            raise DeploymentError(f"worker {seat.number} on Ray node {_name(seat.home)} failed: {error}") from error
        except RayError:  # the replies were made, and lost with the node they lay on
            self._bury(seat)
            return
        seat.out.remove(group)
        self._keep(group, replies)
        del replies
        self._send(seat)

    def _keep(self, group: _Group, replies: list[tuple[bytes, list[Buffer], float]]) -> None:
        for job, (rest, buffers, seconds) in zip(group.jobs, replies, strict=True):
            self._seconds[job.node, job.kind] = seconds
            before = self._typical.get(job.kind, (seconds, 0))
            size = len(rest) + sum(buffer.nbytes for buffer in buffers)
            self._typical[job.kind] = (0.8 * before[0] + 0.2 * seconds, max(size, before[1]))
            self._finish(job, unpack(rest, buffers))

    def _finish(self, job: _Job, reply: Message) -> None:
        self._done[job.message_id] = reply
        if self._open.get(job.node) is job:
            del self._open[job.node]

    # ---- many sites at once

    def together(self, request: RoundRequest, arrays: Arrays, nodes: Sequence[int]) -> Iterator[Part]:
        """A round of the sites that can be trained in stacks; see `Together.answer`."""
        return self._together.answer(request, arrays, nodes)

    def flush(self) -> None:
        """What sites have in memory goes to their vaults."""
        self._together.flush()

    @property
    def holding(self) -> bool:
        """Whether sites keep their state in memory between rounds."""
        return self._together.holding

    def homes(self) -> list[tuple[Any, list[Context]]]:
        """Every worker that has started, with the sites that are its own."""
        for seat in list(self._seats):
            while seat in self._seats and not self._is_ready(seat, wait_s=LOOK_S):
                pass
        return [
            (seat.actor, [context for node, context in self.contexts.items() if self._owner[node] is seat])
            for seat in self._seats
        ]

    def replace(self, actor: Any) -> str | None:
        """Start a worker that has died anew, and say which it was; None where it is none of these."""
        for seat in list(self._seats):
            if seat.actor is actor:
                name = f"worker {seat.number} on Ray node {_name(seat.home)}"
                self._bury(seat)
                return name
        return None

    # ---- a run

    def open_sites(self) -> None:
        """Have every worker read its sites, all at once.

        Raises:
            DataError: with the problems of every site that cannot take part.
            DeploymentError: a worker cannot start, has other versions than this process, or dies while it reads.
        """
        for seat in list(self._seats):
            while seat in self._seats and not self._is_ready(seat, wait_s=LOOK_S):
                pass
        problems: dict[int, str | None] = {}
        waiting = []
        for seat in self._seats:
            mine = [node for node in self.get_node_ids() if self._owner[node] is seat]
            for start in range(0, len(mine), GROUP_MOST):
                nodes = mine[start : start + GROUP_MOST]
                waiting.append((seat, nodes, seat.actor.open.remote([self.contexts[node] for node in nodes])))
            seat.known |= set(mine)
        for seat, nodes, reference in waiting:
            try:
                opened = ray.get(reference)
            except RayActorError:
                names = ", ".join(Path(str(self.contexts[node].node_config["site"])).name for node in nodes)
                raise DeploymentError(
                    f"worker {seat.number} on Ray node {_name(seat.home)} died while it read {names}, most likely out of memory. "
                    "Give fewer --workers, or these sites less data."
                ) from None
            for node, (problem, seconds) in zip(nodes, opened, strict=True):
                problems[node], self._opened[node] = problem, seconds
        check_opened([problems[node] for node in sorted(problems)])

    def close(self) -> None:
        """End the workers, and Ray if it was started here."""
        for seat in self._seats:
            ray.kill(seat.actor)
        if self._started:
            ray.shutdown()


def _message(job: _Job) -> Message:
    """The message without its arrays: enough to reply to it."""
    return message_of(pickle.loads(job.metadata), RecordDict())


def _bytes_in(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file() and ".trunkline" not in path.parts)


def _alive() -> set[str]:
    return {node["NodeID"] for node in ray.nodes() if node["Alive"]}


def _name(home: str) -> str:
    found = [node for node in ray.nodes() if node["NodeID"] == home]
    return f"{home[:8]} ({found[0]['NodeManagerAddress']})" if found else home[:8]


def _homes(workers: int | None, sites: int) -> list[str]:
    """The Ray node of every worker: each goes where it leaves most CPUs to a worker."""
    cpus = {node["NodeID"]: node["Resources"].get("CPU", 0.0) for node in ray.nodes() if node["Alive"]}
    total = int(sum(cpus.values()))
    if total < 1:
        raise DeploymentError(
            "the Ray cluster has no CPU: expected at least 1. Start a node with `ray start --num-cpus`."
        )
    count = max(1, min(workers or total, total, sites))
    free, homes = dict(cpus), []
    for _ in range(count):
        home = max(sorted(free), key=lambda one: (free[one] >= 1.0, free[one] / cpus[one] if cpus[one] else 0.0))
        free[home] -= 1.0
        homes.append(home)
    return homes


def _gpu_shares(homes: Sequence[str]) -> dict[str, float]:
    """Ray node -> the part of a GPU that each worker there asks for: the GPUs of a node are dealt to its workers, never two to one.

    Ray then shows each worker the one it got, and workers on one GPU take turns on it as its driver lets them.
    """
    there = {node["NodeID"]: int(node["Resources"].get("GPU", 0.0)) for node in ray.nodes() if node["Alive"]}
    shares = {}
    for home, workers in Counter(homes).items():
        gpus = there.get(home, 0)
        shares[home] = math.floor(1e4 / math.ceil(workers / gpus)) / 1e4 if gpus else 0.0
    return shares


def _differences(expected: dict[str, str], found: dict[str, str]) -> str:
    """What another process has installed otherwise, in words; empty if nothing."""
    wrong = [name for name in expected if found.get(name) != expected[name]]
    if not wrong:
        return ""
    has = ", ".join(f"{name} {found.get(name, 'missing')}" for name in wrong)
    return f"has {has}; this process has {', '.join(f'{name} {expected[name]}' for name in wrong)}"


def _cannot_start(seat: _Seat, error: Exception) -> str:
    last = [line for line in str(error).splitlines() if line.strip()][-1].strip()
    wanted = ", ".join(f"{name} {number}" for name, number in versions().items())
    return (
        f"a worker cannot start on Ray node {_name(seat.home)}: {last}. Expected there what this process has: {wanted}. Install Trunkline on "
        "every node of the cluster, in the environment that Ray runs in."
    )


def _start_ray(address: str | None, workers: int | None) -> None:
    # without these Ray warns of its own future defaults and reports usage to its makers
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    # Ray would give its workers the lowest priority, and they do all of the work: on a shared machine everybody else came first
    os.environ.setdefault("RAY_worker_niceness", "0")
    # stacks of models come and go in blocks of megabytes: given back to the system each time, each would be paged in anew
    os.environ.setdefault("MALLOC_MMAP_THRESHOLD_", str(256 << 20))
    os.environ.setdefault("MALLOC_TRIM_THRESHOLD_", str(256 << 20))
    try:
        if address:
            _join(address)
        else:
            ray.init(  # "local": a cluster that somebody else has started on this machine is not ours to join unasked
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
