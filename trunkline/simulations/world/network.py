"""A Grid over another one, on a virtual clock: links, outages, slow sites, attacks."""

import heapq
import itertools
import json
import math
import time
from collections.abc import Callable, Collection, Iterable, Iterator
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flwr.app import DEFAULT_TTL, ConfigRecord, Message, RecordDict
from flwr.serverapp import Grid

from trunkline.config.run import RunConfig
from trunkline.config.site import read_site
from trunkline.errors import DeploymentError
from trunkline.flower.grid import LocalGrid
from trunkline.flower.records import open_records
from trunkline.protocol.messages import AgreedRequest, TrainRequest, parse_request
from trunkline.protocol.plan import Conditions
from trunkline.server.rounds.checkpoint import Checkpoint
from trunkline.simulations.world.attacks import byzantine_reply
from trunkline.simulations.world.clock import HOUR, SECOND, WEEK, VirtualClock
from trunkline.simulations.world.journal import WorldJournal, WorldState
from trunkline.simulations.world.sites import SiteDraw, chance, draw_sites, rows_seen


@dataclass
class _Flight:
    """One message on its way to a site, and its reply on its way back."""

    id: str
    node: int
    kind: str
    round: int
    arrival: int  # us, when the request is at the site
    bound: int  # us, before which the reply cannot be there
    lost: bool = False
    request: TrainRequest | None = None  # of training that takes time or that an attack replaces
    repeated: bool = False  # the site has trained this round already and answers from its vault
    reply: Message | None = None


class WorldGrid(Grid):
    """`grid` in the world that `run` describes: only available sites receive a message, and they answer in their own time.

    A site that joins does so at once and surely: worlds are about rounds. A site does one thing after another, within its
    hours; what a shift does not finish goes on in the next. Training takes time by its rows, and every message by its bytes
    on the line; a query of the loss and scoring take the line only.

    Args:
        grid: with every site on it; its sites' names come from their folders.
        out: folder of the run; the journal is kept there. None: no journal.
        resume: go on where the world stood when the newest checkpoint in `out` was made.
        patience_s: real seconds that one site may compute at one message.

    Raises:
        ConfigError: a Byzantine site that is none of the sites.
        StorageError: `resume` without the journal of that round.
    """

    durable = False
    local = False
    journalled = False
    waits = False
    stacks = None

    def __init__(
        self, grid: LocalGrid, run: RunConfig, out: Path | None = None, *, resume: bool = False, patience_s: float = 3600.0
    ) -> None:  # fmt: skip
        self.inner = grid
        self.config = run
        self.world = run.world
        self.patience_s = patience_s
        nodes = list(grid.contexts)
        names = [read_site(Path(str(grid.contexts[node].node_config["site"]))).name for node in nodes]
        self.draws = dict(zip(nodes, draw_sites(run, names), strict=True))
        self.clock = VirtualClock(self._first_event)
        self.ended: dict[int, float] = {}  # round -> virtual seconds
        self._hours = list({id(draw.hours): draw.hours for draw in self.draws.values()}.values())
        self._queue: list[tuple[int, int]] = []  # (us, index of a flight), the next first
        self._flights: dict[int, _Flight] = {}
        self._ready: dict[str, Message] = {}  # in the order of arrival
        self._numbers = itertools.count()
        self._round = 0
        self._began: int | None = None  # us, the newest round
        self._tries: dict[tuple[int, str], int] = {}  # messages of this round by node and kind
        self._buffered = run.cohort.mode == "buffered"  # then messages of several rounds are under way
        self._trained: set[tuple[int, int]] = set()  # node and round; of this round, or in a buffered run of all
        self._asked: dict[tuple[str, int], int] = {}  # kind and round -> us, when the first message of them went out
        self._free: dict[int, int] = {}  # node -> us, when it will have done all the work that is known
        self._line: dict[int, int] = {}  # node -> us, when all that was sent to it will have arrived
        self._bounds: dict[int, int] = {}  # node -> us, a time it is surely not done before
        self._rows: dict[int, int] = {}  # node -> training rows, once a reply has reported them
        self._joined: set[int] = set()
        self._returning: set[int] = set()  # members that a resumed run has yet to find again
        self._journal = None if out is None else WorldJournal(out)
        if self._journal is not None and out is not None:
            if resume:
                self._restore(self._journal, out)
            else:
                self._journal.delete()

    @property
    def complete(self) -> bool:
        """Whether every site is always available, so that the server need not wait for more."""
        return all(hours.always for hours in self._hours)

    def set_run(self, run: Any) -> None:
        self.inner.set_run(run)

    @property
    def run(self) -> Any:
        return self.inner.run

    def create_message(
        self, content: RecordDict, message_type: str, dst_node_id: int, group_id: str, ttl: float | None = None
    ) -> Message:
        return self.inner.create_message(content, message_type, dst_node_id, group_id, ttl)

    def get_node_ids(self) -> list[int]:
        """The nodes available now. While a resumed run finds its members again the world stands still, and they are those."""
        if self._returning:
            return sorted(self._returning)
        online = {id(hours): hours.online(self.clock.now) for hours in self._hours}
        return [node for node, draw in self.draws.items() if online[id(draw.hours)]]

    def room(self) -> bool:
        return True

    def send(self, node: int, kind: str, group: str, content: RecordDict, keep_s: float) -> str:
        ttl = min(keep_s, DEFAULT_TTL)
        return self._push(Message(content, dst_node_id=node, message_type=kind, ttl=ttl, group_id=group))

    def inbox(self) -> Callable[[Collection[str]], Iterator[Message]]:
        def fetch(message_ids: Collection[str]) -> Iterator[Message]:
            messages = self.pull_messages(message_ids)
            while messages:
                yield messages.pop(0)

        return fetch

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        return [self._push(message) for message in messages]

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        """The replies that have arrived by now, in the order in which they arrived."""
        # a view of a dict's keys is taken as it is: a copy for every reply would cost more than the reply
        wanted = message_ids if isinstance(message_ids, AbstractSet) else set(message_ids)
        while not (ready := [message_id for message_id in self._ready if message_id in wanted]):
            if self._arrive(self.clock.now) is None:  # one at a time: each may hold a whole trunk
                break
        return [self._ready.pop(message_id) for message_id in ready]

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> list[Message]:
        """Push, then collect until all have answered or `timeout` virtual seconds have passed; the late are left out."""
        waiting = {message_id for message_id in self.push_messages(messages) if message_id}
        end = math.inf if timeout is None else self.clock.monotonic() + timeout
        replies: list[Message] = []
        while True:
            arrived = self.pull_messages(waiting)
            replies += arrived
            waiting -= {reply.metadata.reply_to_message_id for reply in arrived}
            if not waiting or self.clock.monotonic() >= end or (timeout is None and not self._queue):
                return replies
            self.clock.sleep(min(end - self.clock.monotonic(), 1e9))

    # --- the run's events and report ---------------------------------------------------------------------------------------

    def stamp(self) -> dict[str, float]:
        return {"virtual_seconds": self.clock.monotonic()}

    def begin_round(self) -> None:
        """A round that begins too early first waits."""
        if self._began is not None:
            self.clock.now = max(self.clock.now, self._began + round(self.world.round_hours * HOUR))
        self._began = self.clock.now

    def complete_report(self, report: dict[str, Any]) -> dict[str, Any]:
        """`report` with the virtual time at which each round ended, and what the world made of each site."""
        rounds = [{**row, "virtual_seconds": self.ended.get(row["round"])} for row in report["rounds"]]
        sites = {
            draw.site: {
                "always_there": draw.hours.always, "zone": draw.zone, "speed": draw.speed, "drifts": draw.drifts, "hostile": draw.byzantine,
            }
            for draw in sorted(self.draws.values(), key=lambda draw: draw.site)
        }  # fmt: skip
        return {**report, "rounds": rounds, "world": {"virtual_seconds": self.clock.monotonic(), "sites": sites}}

    def end_round(self, round: int) -> None:
        """Note in the journal where the world stands. Messages under way are let go, unless the run is buffered."""
        while self._flights and not self._buffered:  # a late site still works, and only its reply shows how long
            first = next(iter(self._flights))
            self._resolve(self._flights.pop(first))
        if not self._buffered:  # else an answer counts whenever it comes
            self._queue.clear()
            self._ready.clear()
        self.ended[round] = self.clock.monotonic()
        if self._journal is not None:
            joined = frozenset(self._joined)
            state = WorldState(self.clock.now, self._began, joined, self._busy(), self._line, self.ended)
            self._journal.append(round, state)

    def _busy(self) -> dict[int, int]:
        """Node -> us, until when it is at work, as far as that is known."""
        under_way = {flight.node: flight.bound for flight in self._flights.values() if flight.kind == "train"}
        return {
            node: max(self._free.get(node, 0), under_way.get(node, 0)) for node in self._free.keys() | under_way.keys()
        }

    def _restore(self, journal: WorldJournal, out: Path) -> None:
        loaded = Checkpoint(out).load()
        if loaded is None or loaded[0].round == 0:
            return
        self._round = loaded[0].round
        state = journal.read(self._round)
        self.clock.now, self._began, self.ended = state.now, state.began, dict(state.ended)
        self._returning, self._joined = set(state.joined), set(state.joined)
        self._free, self._line = dict(state.busy), dict(state.line)

    # --- one message ----------------------------------------------------------------------------------------------

    def _push(self, message: Message) -> str:
        node, kind = message.metadata.dst_node_id, message.metadata.message_type
        draw, round, now = self.draws.get(node), int(message.metadata.group_id or 0), self.clock.now
        joins = kind == "query" and round == 0
        if draw is None:  # the grid's own error is the right one
            return self.inner.push_messages([message])[0]
        if round > self._round:
            self._round, self._tries = round, {}
            if not self._buffered:
                self._trained, self._asked = set(), {}
        tries = self._tries[node, kind] = self._tries.get((node, kind), 0) + 1
        drops = chance(self.config.seed, draw.site, round, "drop-out") < self.world.drop_out
        absent = not draw.hours.online(now) and node not in self._returning
        if absent or (drops and 0 < round <= self.config.total_rounds and kind != "evaluate"):
            return f"unheard-{next(self._numbers)}"  # an absent site is silent, as in a plant
        flight = _Flight("", node, kind, round, now, now)
        if round > 0:
            conditions = self._conditions(draw, self._asked.setdefault((kind, round), now))
            if conditions != Conditions():
                message.content = _under(message.content, conditions)
        if not joins:
            flight.lost = chance(self.config.seed, draw.site, round, "reply", kind, tries) < self.world.reply_loss
            size = _bytes(message.content)
            flight.arrival = draw.hours.spend(max(now, self._line.get(node, 0)), math.ceil(size * draw.down))
            self._line[node] = flight.arrival
            if kind == "train":
                if self.world.row_seconds or draw.byzantine:
                    flight.request = TrainRequest.model_validate_json(
                        str(message.content.config_records["header"]["json"])
                    )
                flight.repeated = (node, round) in self._trained
                self._trained.add((node, round))
            start = max(flight.arrival, self._bounds.get(node, 0), self._free.get(node, 0))
            # what a site takes at least is known once it has reported its rows: the nearer the bound, the fewer replies
            # must be looked at, and kept, before the first one can be handed out
            flight.bound = draw.hours.spend(start, self._work(flight, self._rows.get(node, 0)))
            self._bounds[node] = flight.bound
        flight.id = self.inner.push_messages([message])[0]
        index = next(self._numbers)
        self._flights[index] = flight
        heapq.heappush(self._queue, (flight.bound, index))
        return flight.id

    def _conditions(self, draw: SiteDraw, time_us: int) -> Conditions:
        """The share of its labels that a site has, and the drift of its inputs, at a time (us)."""
        world, hours = self.world, time_us / HOUR - self.world.label_delay_hours
        arrived = float(hours >= 0.0) if not world.labels_hours else min(1.0, max(0.0, hours / world.labels_hours))
        drift = world.drift_week * time_us / WEEK if draw.drifts else 0.0
        return Conditions(labelled=world.labels_start + (1.0 - world.labels_start) * arrived, drift=drift)

    def _work(self, flight: _Flight, rows: int) -> int:
        """us of its hours that a site takes to answer, the line left out."""
        if flight.request is None or flight.repeated:
            return 0
        seconds = rows_seen(flight.request.plan, rows) * self.world.row_seconds / self.draws[flight.node].speed
        return math.ceil(seconds * SECOND)

    def _first_event(self, limit: int) -> int:
        """The clock's next stop: a site that comes on, or a reply."""
        opening = [hours.opens(self.clock.now) for hours in self._hours if not hours.always]
        limit = min([limit, *opening])
        arrival = self._arrive(limit)
        return limit if arrival is None else arrival

    def _arrive(self, limit: int) -> int | None:
        """Take in the first reply up to `limit`; when (us) it arrived, or None if there is none.

        A reply's time is known when the site has computed it. Until then its bound stands in the queue: whoever is first
        there and not yet computed is waited for, so no reply can overtake an earlier one, however the machine is loaded.
        """
        while self._queue and self._queue[0][0] <= limit:
            due, index = heapq.heappop(self._queue)
            flight = self._flights[index]
            if flight.reply is None:
                arrives = self._resolve(flight)
                if flight.lost:
                    del self._flights[index]
                else:
                    heapq.heappush(self._queue, (arrives, index))
                continue
            self._ready[flight.id] = flight.reply
            del self._flights[index]
            if flight.kind == "query" and flight.round == 0:
                self._joined.add(flight.node)
                self._returning.discard(flight.node)
            return due
        return None

    def _resolve(self, flight: _Flight) -> int:
        """Wait for the reply to be computed; when (us) it is at the server."""
        if flight.reply is not None:
            return flight.bound
        reply = flight.reply = self._computed(flight)
        if flight.kind == "query" and flight.round == 0:
            return flight.bound
        draw = self.draws[flight.node]
        if flight.request is not None and not reply.has_error():
            arrays, header, metrics = open_records(reply.content)
            table = json.loads(header)
            self._rows[flight.node] = int(table["weight"])
            if draw.byzantine:
                reply.content = byzantine_reply(flight.request, self.world.attack, draw.site, arrays, table, metrics)
        start = max(flight.arrival, self._free.get(flight.node, 0))
        done = max(flight.bound, draw.hours.spend(start, self._work(flight, self._rows.get(flight.node, 0))))
        size = 0 if reply.has_error() else _bytes(reply.content)
        self._free[flight.node] = draw.hours.spend(done, math.ceil(size * draw.up))
        return self._free[flight.node]

    def _computed(self, flight: _Flight) -> Message:
        start, pause = time.monotonic(), 0.0005
        while not (replies := self.inner.pull_messages([flight.id])):
            if time.monotonic() - start > self.patience_s:
                raise DeploymentError(
                    f"{self.draws[flight.node].site} has computed for {self.patience_s:g} s at one message ({flight.kind}, "
                    f"round {flight.round}) and virtual time cannot go on without it. Look at the workers; go on with --resume."
                )
            time.sleep(pause)
            pause = min(2 * pause, 0.05)
        return replies[0]


def _under(content: RecordDict, conditions: Conditions) -> RecordDict:
    """The same request with these conditions, as a new record: the content itself may be on its way to other sites too."""
    request = parse_request(str(content.config_records["header"]["json"]))
    assert isinstance(request, AgreedRequest)  # an offer has no conditions: its round is 0
    text = request.model_copy(update={"conditions": conditions}).model_dump_json()
    return RecordDict({**dict(content.items()), "header": ConfigRecord({"json": text})})


def _bytes(content: RecordDict) -> int:
    """What of a message fills the line: its arrays, its header, and 8 bytes a number."""
    arrays = sum(len(array.data) for record in content.array_records.values() for array in record.values())
    texts = sum(len(str(text)) for record in content.config_records.values() for text in record.values())
    return arrays + texts + 8 * sum(len(record) for record in content.metric_records.values())
