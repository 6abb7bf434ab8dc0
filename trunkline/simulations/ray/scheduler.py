"""Which worker answers which message, in which order, and what the death of a worker means for both.

Each worker owns a share of the sites. Messages wait in its queue, longest first, and reach it in groups; an idle worker
takes a waiting site over where that ends the round sooner. A worker that dies is started again and receives its
unanswered messages one at a time, so that a site that kills its worker becomes known by it.
"""

import heapq
import itertools
import pickle
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ray
from flwr.app import Context, Message, RecordDict
from ray.exceptions import RayActorError, RayError, RayTaskError

from trunkline.errors import DeploymentError
from trunkline.flower.errors import CRASHED, error_reply
from trunkline.flower.grid import message_of
from trunkline.simulations.ray.cluster import NODE_CHECK_S, WorkerProcess, alive_nodes
from trunkline.simulations.ray.serialization import Buffer, SharedContent, equal, unpack
from trunkline.simulations.ray.worker import SerializedMessage

AHEAD = 32 * 1024 * 1024  # bytes of replies a worker may have made, or be making, that the driver has not fetched
GROUPS = 2  # outstanding a worker: one it works on, and one so that it need not wait for the driver
GROUP_MOST = 48  # messages; what a call of Ray costs is hardly seen at that
GROUP_FIRST = 16  # messages that an idle worker gets, so that it begins while the others are still being made
GROUP_S = 0.25  # s of work in a group, so that progress is seen and there is something left to hand to an idle worker
UNSENT = 64 * 1024 * 1024  # bytes of messages that no worker has taken yet, beyond which the grid asks for no more
PAUSE_S = 0.02  # s that a pull waits for the first reply
TWICE = 2  # deaths of a worker with a site alone in it
DISK_RATE = 1e8  # bytes of a site's files that are taken to cost one second, before an answer of it has been timed


@dataclass
class Job:
    """A message on its way to its answer.

    Args:
        body: its content, packed without the arrays.
        arrays: their bytes, or the shared content that has them.
        first: whether it is the first message with these arrays.
        deaths: of workers that had nothing else to do.
    """

    message_id: str
    node: int
    kind: str
    group: str
    metadata: bytes
    body: bytes
    arrays: list[Buffer] | SharedContent
    first: bool = True
    deaths: int = 0

    @property
    def nbytes(self) -> int:
        """Bytes that it takes of this machine's memory; content it shares with an earlier message takes none."""
        if not self.first:
            arrays = 0
        elif isinstance(self.arrays, SharedContent):
            arrays = self.arrays.nbytes
        else:
            arrays = sum(buffer.nbytes for buffer in self.arrays)
        return arrays + len(self.body) + len(self.metadata)

    def serialized(self) -> SerializedMessage:
        """The job as a worker receives it."""
        arrays = self.arrays.key if isinstance(self.arrays, SharedContent) else self.arrays
        return self.node, self.metadata, self.body, arrays

    def same_request(self, other: "Job") -> bool:
        """Whether both ask the same, as when a site that has been silent for long is asked again."""
        if (self.kind, self.group, self.body) != (other.kind, other.group, other.body):
            return False
        if isinstance(self.arrays, SharedContent) or isinstance(other.arrays, SharedContent):
            return self.arrays is other.arrays
        return equal(self.arrays, other.arrays)

    def message(self) -> Message:
        """The message without its arrays: enough to reply to it."""
        return message_of(pickle.loads(self.metadata), RecordDict())


@dataclass
class Group:
    """Messages that a worker has received in one call.

    Args:
        reference: Ray's, to the replies.
        expected: bytes of the replies.
    """

    reference: Any
    jobs: list[Job]
    expected: int


class Workload:
    """What sites cost: seconds an answer, seconds to open, bytes a reply.

    Args:
        file_bytes: node -> bytes of its site's files.
    """

    def __init__(self, file_bytes: Mapping[int, int]) -> None:
        self.file_bytes = dict(file_bytes)
        self.seconds: dict[tuple[int, str], float] = {}  # (node, kind) -> of its last answer
        self.opening: dict[int, float] = {}  # node -> s to read its rows
        self.typical: dict[str, tuple[float, int]] = {}  # kind -> seconds and bytes of a reply

    def cost(self, node: int, kind: str = "train") -> float:
        """Seconds that an answer is expected to take; before one is timed, as its files suggest."""
        seconds = self.seconds.get((node, kind), self.seconds.get((node, "train")))
        return self.file_bytes[node] / DISK_RATE if seconds is None else seconds

    def longest_first(self, nodes: Iterable[int]) -> list[int]:
        return sorted(nodes, key=lambda node: (-self.cost(node), node))

    def record(self, job: Job, seconds: float, nbytes: int) -> None:
        """Note what the answer to `job` took: seconds at the worker, and bytes of the reply."""
        self.seconds[job.node, job.kind] = seconds
        usual_seconds, largest = self.typical.get(job.kind, (seconds, 0))
        self.typical[job.kind] = (0.8 * usual_seconds + 0.2 * seconds, max(nbytes, largest))


@dataclass
class WorkerSlot:
    """A worker with its work; the process in the slot may die and be replaced.

    Args:
        queue: a heap of (minus the expected seconds, order of arrival, job), so longest first.
        suspects: jobs that were unanswered when a worker died: each is asked alone.
        groups: under way at the worker, oldest first.
    """

    process: WorkerProcess
    queue: list[tuple[float, int, Job]] = field(default_factory=list)
    suspects: deque[Job] = field(default_factory=deque)
    groups: list[Group] = field(default_factory=list)

    def next_jobs(self, workload: Workload) -> list[Job]:
        """Take the jobs that the worker may have now out of the queue; none where it has enough to do.

        It may have two groups, and in bytes no more than it may be ahead of the driver.
        """
        if self.suspects:
            return [] if self.groups else [self.suspects.popleft()]
        if not self.queue:
            return []
        typical = workload.typical.get(self.queue[0][2].kind)
        ahead = sum(group.expected for group in self.groups)
        if self.groups and (len(self.groups) >= GROUPS or typical is None or ahead + typical[1] > AHEAD):
            return []
        return self._take_group(workload)

    def _take_group(self, workload: Workload) -> list[Job]:
        """The next jobs: as many as keep their replies, and the wait for them, small."""
        group: list[Job] = []
        nbytes, seconds = 0, 0.0
        most = GROUP_MOST if self.groups else GROUP_FIRST
        if len(self.queue) < most + GROUP_FIRST:
            most = len(self.queue)  # rather than a small one more
        while self.queue and len(group) < most:
            job = self.queue[0][2]
            typical = workload.typical.get(job.kind)
            if group and typical is None:
                break
            if typical is not None:
                nbytes += max(typical[1], job.nbytes)
                seconds += workload.seconds.get((job.node, job.kind), typical[0])
                if group and (nbytes > AHEAD // GROUPS or seconds > GROUP_S):
                    break
            heapq.heappop(self.queue)
            group.append(job)
        return group


class Scheduler:
    """Hands jobs to workers and takes their replies.

    Args:
        contexts: node -> Flower's context of its site.
        file_bytes: node -> bytes of its site's files.
        workers: their processes.
    """

    def __init__(
        self, contexts: Mapping[int, Context], file_bytes: Mapping[int, int], workers: Sequence[WorkerProcess]
    ) -> None:
        self.contexts = contexts
        self.workload = Workload(file_bytes)
        self.slots = [WorkerSlot(process) for process in workers]
        self.owner: dict[int, WorkerSlot] = {}  # node -> the worker that has its rows
        self.owner = self.assign(contexts, self.slots)
        self._unanswered: dict[int, Job] = {}  # node -> its newest job
        self._unsent = 0  # bytes
        self._replies: dict[str, Message] = {}  # by the id of the message they answer
        self._struck: set[int] = set()  # nodes that have cost two workers in one message
        self._arrivals = itertools.count()

    # ---- which worker, in which order

    def assign(self, nodes: Iterable[int], slots: Sequence[WorkerSlot]) -> dict[int, WorkerSlot]:
        """Sites to workers, longest first and each to the least loaded, so that all end at about the same time."""
        loads = []
        for index, slot in enumerate(slots):
            loads.append((sum(self.workload.cost(node) for node, owner in self.owner.items() if owner is slot), index))
        heapq.heapify(loads)
        assigned = {}
        for node in self.workload.longest_first(nodes):
            load, index = loads[0]
            assigned[node] = slots[index]
            heapq.heapreplace(loads, (load + max(self.workload.cost(node), 1e-6), index))
        return assigned

    def submit(self, job: Job) -> str:
        """Queue a job; returns the id of the message whose reply will answer it, which may be an earlier one."""
        earlier = self._unanswered.get(job.node)
        if earlier is not None and earlier.same_request(
            job
        ):  # still waiting for its turn, so it need not be done twice
            return earlier.message_id
        self._unanswered[job.node] = job
        self._enqueue(job)
        slot = self.owner[job.node]
        if len(slot.queue) >= (GROUP_MOST if slot.groups else GROUP_FIRST):
            self._send(slot)
        return job.message_id

    def has_room(self) -> bool:
        """Whether more jobs may come: those beyond only lie in memory."""
        return self._unsent < UNSENT

    def _enqueue(self, job: Job) -> None:
        self._unsent += job.nbytes
        slot = self.owner[job.node]
        if job.node in self._struck:  # it has killed before, so it must take no other site's answers with it
            job.deaths = max(job.deaths, 1)
            slot.suspects.append(job)
        else:
            heapq.heappush(slot.queue, (-self.workload.cost(job.node, job.kind), next(self._arrivals), job))

    def steal(self, thief: WorkerSlot) -> None:
        """Move one waiting site to an idle worker of the same node if, having read its rows, it is done before the owner begins."""
        seconds_of = self.workload.seconds
        for victim in self.slots:
            if victim is thief or victim.process.node != thief.process.node or len(victim.queue) < 2:
                continue
            # the group it works on may be as good as done; the next one is not begun
            ahead = [job for group in victim.groups[1:] for job in group.jobs] + [job for _, _, job in victim.queue]
            left = sum(seconds_of.get((job.node, job.kind), 0.0) for job in ahead)
            for index, (_, _, job) in enumerate(victim.queue):
                seconds = seconds_of.get((job.node, job.kind))
                reading = 0.0 if job.node in thief.process.contexts else self.workload.opening.get(job.node)
                if seconds is None or reading is None or reading + seconds >= left - seconds:
                    continue
                del victim.queue[index]
                self._unsent -= job.nbytes
                heapq.heapify(victim.queue)
                self.owner[job.node] = thief
                self._enqueue(job)
                return

    # ---- to the workers and back

    def take_replies(self, message_ids: AbstractSet[str]) -> list[Message]:
        """Give every worker what it may have, and take the replies to `message_ids` out: those of one group at most."""
        for slot in list(self.slots):
            if not (slot.queue or slot.suspects or slot.groups):
                self.steal(slot)
            self._send(slot)
        replies = self._matching(message_ids)
        if not replies:
            self._receive()
            replies = self._matching(message_ids)
        return replies

    def _matching(self, message_ids: AbstractSet[str]) -> list[Message]:
        return [self._replies.pop(message_id) for message_id in list(self._replies) if message_id in message_ids]

    def _send(self, slot: WorkerSlot) -> None:
        """Give the worker what it may have: two groups, and in bytes no more than it may be ahead of the driver."""
        if not self._is_ready(slot):
            return
        while jobs := slot.next_jobs(self.workload):
            self._send_group(slot, jobs)

    def _send_group(self, slot: WorkerSlot, jobs: list[Job]) -> None:
        new = {job.node for job in jobs} - slot.process.contexts
        shared = {job.arrays.key: [job.arrays.reference] for job in jobs if isinstance(job.arrays, SharedContent)}
        contexts = [self.contexts[node] for node in new]
        reference = slot.process.actor.answer.remote([job.serialized() for job in jobs], contexts, shared)
        expected = sum(self.workload.typical.get(job.kind, (0.0, AHEAD))[1] for job in jobs)
        slot.groups.append(Group(reference, jobs, expected))
        slot.process.contexts |= new
        self._unsent -= sum(job.nbytes for job in jobs)

    def _receive(self) -> None:
        """Fetch the oldest group that is ready."""
        running = {group.reference: (slot, group) for slot in self.slots for group in slot.groups}
        starting = [slot.process.hello for slot in self.slots if not slot.process.ready]
        if not running and not starting:
            return
        ready, _ = ray.wait([*running, *starting], num_returns=1, timeout=PAUSE_S)
        if not ready or ready[0] not in running:
            return
        slot, group = running[ready[0]]
        try:
            replies = ray.get(group.reference)
        except RayActorError:
            self._replace_worker(slot)
            return
        except RayTaskError as error:
            raise DeploymentError(f"{slot.process} failed: {error}") from error
        except RayError:  # the replies were made, and lost with the node they lay on
            self._replace_worker(slot)
            return
        slot.groups.remove(group)
        self._keep(group, replies)
        del replies
        self._send(slot)

    def _keep(self, group: Group, replies: list[tuple[bytes, list[Buffer], float]]) -> None:
        for job, (body, buffers, seconds) in zip(group.jobs, replies, strict=True):
            self.workload.record(job, seconds, len(body) + sum(buffer.nbytes for buffer in buffers))
            self._finish(job, unpack(body, buffers))

    def _finish(self, job: Job, reply: Message) -> None:
        self._replies[job.message_id] = reply
        if self._unanswered.get(job.node) is job:
            del self._unanswered[job.node]

    # ---- workers that start and die

    def wait_for_workers(self) -> None:
        """Wait until every worker has started. Raises DeploymentError where one cannot."""
        for slot in list(self.slots):
            while slot in self.slots and not self._is_ready(slot, wait_s=NODE_CHECK_S):
                pass

    def _is_ready(self, slot: WorkerSlot, wait_s: float = 0.0) -> bool:
        state = slot.process.check(wait_s)
        if state == "lost":
            self._give_up(slot)
        return state == "ready"

    def _give_up(self, slot: WorkerSlot) -> None:
        """Hand the sites of a worker whose node is gone to the workers that are left: what they need is in their vaults."""
        left = [other for other in self.slots if other is not slot]
        if not left:
            raise DeploymentError(
                f"{slot.process} died and no other is left (out of memory?). "
                "Everything up to the last finished round is on disk; go on with --resume, with more memory or another --address."
            )
        self.slots = left
        self.owner |= self.assign([node for node, owner in self.owner.items() if owner is slot], left)
        waiting = [*slot.suspects, *(job for _, _, job in slot.queue)]
        self._unsent -= sum(job.nbytes for job in waiting)
        jobs = [*waiting, *(job for group in slot.groups for job in group.jobs)]
        for jobs_of_slot in (slot.suspects, slot.queue, slot.groups):
            jobs_of_slot.clear()
        for job in jobs:
            job.deaths = 0  # the node died, whatever the job did
            self._enqueue(job)

    def _replace_worker(self, slot: WorkerSlot) -> None:
        """Start a dead worker again, and ask what it left unanswered again, one message at a time.

        Alone, a site that kills its worker becomes known by it.
        """
        lost: list[Job] = []
        for group in slot.groups:
            try:
                if ray.wait([group.reference], timeout=0.0)[0]:
                    self._keep(group, ray.get(group.reference))
                    continue
            except RayError:
                pass
            if not lost and len(group.jobs) == 1:  # the later groups had not been begun
                group.jobs[0].deaths += 1
            lost += group.jobs
        slot.groups.clear()
        slot.process.end()
        for job in reversed(lost):
            if job.deaths >= TWICE:
                self._struck.add(job.node)
                self._finish(job, self._lost_twice(slot, job))
            else:
                self._unsent += job.nbytes
                slot.suspects.appendleft(job)
        if slot.process.node in alive_nodes():
            slot.process.start()
        else:
            self._give_up(slot)

    def _lost_twice(self, slot: WorkerSlot, job: Job) -> Message:
        """The error reply in the place of a site that has cost two workers."""
        folder = self._folder(job.node)
        return error_reply(
            job.message(),
            f"{folder.name}: the worker process died twice while it answered for this site alone ({slot.process}), most likely out of memory. "
            "The site is left out here and the others go on. Give it more memory: fewer "
            f"--workers, a smaller batch_size or width, or a smaller window in {folder / 'site.toml'}.",
            code=CRASHED,
        )

    def _folder(self, node: int) -> Path:
        return Path(str(self.contexts[node].node_config["site"]))

    # ---- all sites of a worker

    def sites_by_worker(self) -> list[tuple[Any, list[Context]]]:
        """Every worker's actor, once all have started, with the contexts of the sites that it owns."""
        self.wait_for_workers()
        return [
            (slot.process.actor, [context for node, context in self.contexts.items() if self.owner[node] is slot])
            for slot in self.slots
        ]

    def replace(self, actor: Any) -> str | None:
        """Start a worker that has died again; returns its description, or None where `actor` is none of the workers."""
        for slot in list(self.slots):
            if slot.process.actor is actor:
                description = str(slot.process)
                self._replace_worker(slot)
                return description
        return None

    def open_sites(self) -> list[str | None]:
        """Have every worker read its sites, all at once; the problem of each site by ascending node, None where it has none.

        Raises:
            DeploymentError: a worker cannot start, has other versions than this process, or dies while it reads.
        """
        self.wait_for_workers()
        problems: dict[int, str | None] = {}
        waiting = []
        for slot in self.slots:
            mine = self.workload.longest_first(node for node, owner in self.owner.items() if owner is slot)
            for start in range(0, len(mine), GROUP_MOST):
                nodes = mine[start : start + GROUP_MOST]
                waiting.append((slot, nodes, slot.process.actor.open.remote([self.contexts[node] for node in nodes])))
            slot.process.contexts |= set(mine)
        for slot, nodes, reference in waiting:
            try:
                opened = ray.get(reference)
            except RayActorError:
                names = ", ".join(self._folder(node).name for node in nodes)
                raise DeploymentError(
                    f"{slot.process} died while it read {names}, most likely out of memory. "
                    "Give fewer --workers, or these sites less data."
                ) from None
            for node, (problem, seconds) in zip(nodes, opened, strict=True):
                problems[node], self.workload.opening[node] = problem, seconds
        return [problems[node] for node in sorted(problems)]

    def close(self) -> None:
        """End the workers."""
        for slot in self.slots:
            slot.process.end()
