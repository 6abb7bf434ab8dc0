"""A Grid over another one, on a virtual clock: links, outages, slow sites, attacks."""

import heapq
import itertools
import json
import math
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flwr.app import ConfigRecord, Message, RecordDict
from flwr.serverapp import Grid

from trunkline.config.run import RunConfig
from trunkline.config.site import read_site
from trunkline.errors import DeploymentError, StorageError
from trunkline.flower.grid import LocalGrid
from trunkline.flower.records import open_records
from trunkline.protocol.messages import RoundRequest
from trunkline.protocol.plan import Conditions
from trunkline.server.rounds.checkpoint import Checkpoint
from trunkline.simulations.world.attacks import lied
from trunkline.simulations.world.clock import HOUR, SECOND, WEEK, VirtualClock
from trunkline.simulations.world.sites import Place, chance, draw_places, rows_seen

JOURNAL = "world.jsonl"  # in a run's folder: where the world stood after each round, for --resume


@dataclass
class _Flight:
    """One message that a site has or will have, and its reply."""

    id: str
    node: int
    kind: str
    round: int
    came: int  # us, when the order is at the site
    bound: int  # us, before which the reply cannot be there
    lost: bool = False
    request: RoundRequest | None = None  # of training that takes time or is lied about
    repeated: bool = False  # the site has trained this round already and answers from its vault
    reply: Message | None = None


class WorldGrid(Grid):
    """`grid` in the world that `run` describes: the same messages, but only to who is there, and answered in their time.

    A site that joins does so at once and surely: worlds are about rounds. A site does one thing after another, within its
    hours; what a shift does not finish goes on in the next. Orders take time by the rows that training sees and by the
    bytes on the line; probing and scoring take the line only.

    Args:
        grid: with every site on it; its sites' names come from their folders.
        out: folder of the run; the journal is kept there. None: no journal.
        resume: go on where the world stood when the newest checkpoint in `out` was made.
        patience_s: real seconds that one site may compute at one message.

    Raises:
        ConfigError: a hostile site that is none.
        StorageError: `resume` without the journal of that round.
    """

    def __init__(
        self, grid: LocalGrid, run: RunConfig, out: Path | None = None, *, resume: bool = False, patience_s: float = 3600.0
    ) -> None:  # fmt: skip
        self.inner = grid
        self.config = run
        self.world = run.world
        self.patience_s = patience_s
        nodes = list(grid.contexts)
        names = [read_site(Path(str(grid.contexts[node].node_config["site"]))).name for node in nodes]
        self.places = dict(zip(nodes, draw_places(run, names), strict=True))
        self.clock = VirtualClock(self._first_event)
        self.ended: dict[int, float] = {}  # round -> virtual seconds
        self._hours = list({id(place.hours): place.hours for place in self.places.values()}.values())
        self._queue: list[tuple[int, int]] = []  # (us, number of a flight), the next first
        self._flights: dict[int, _Flight] = {}
        self._ready: dict[str, Message] = {}  # in the order of arrival
        self._numbers = itertools.count()
        self._round = 0
        self._began: int | None = None  # us, the newest round
        self._tries: dict[tuple[int, str], int] = {}  # messages of this round by node and kind
        self._buffered = run.cohort.mode == "buffered"  # then messages of several rounds are under way
        self._trained: set[tuple[int, int]] = set()  # node and round; of this round, or in a buffered run of all
        self._asked: dict[tuple[str, int], int] = {}  # kind and round -> us, when the first message of them went out
        self._free: dict[int, int] = {}  # node -> us, when it will have done all that is known of
        self._line: dict[int, int] = {}  # node -> us, when all that was sent to it will be there
        self._bounds: dict[int, int] = {}  # node -> us, a time it is surely not done before
        self._rows: dict[int, int] = {}  # node -> training rows, once it has said how many
        self._joined: set[int] = set()
        self._returning: set[int] = set()  # members that a resumed run has yet to find again
        self._journal = out / JOURNAL if out is not None else None
        if resume and out is not None:
            self._take_up(out)
        elif self._journal is not None:
            self._journal.unlink(missing_ok=True)

    @property
    def complete(self) -> bool:
        """Whether nobody will come later, so that nobody need be waited for."""
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
        """Who is there now; while a resumed run finds its members again the world stands still, and it is they."""
        if self._returning:
            return sorted(self._returning)
        there = {id(hours): hours.online(self.clock.at) for hours in self._hours}
        return [node for node, place in self.places.items() if there[id(place.hours)]]

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        return [self._push(message) for message in messages]

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        """The replies that are there by now, in the order in which they came."""
        wanted = set(message_ids)
        while not (here := [one for one in self._ready if one in wanted]):
            if self._arrive(self.clock.at) is None:  # one at a time: each may hold a whole trunk
                break
        return [self._ready.pop(one) for one in here]

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> list[Message]:
        """Push, then collect until all have answered or `timeout` virtual seconds have passed; the late are left out."""
        waiting = {one for one in self.push_messages(messages) if one}
        end = math.inf if timeout is None else self.clock.monotonic() + timeout
        replies: list[Message] = []
        while True:
            came = self.pull_messages(waiting)
            replies += came
            waiting -= {reply.metadata.reply_to_message_id for reply in came}
            if not waiting or self.clock.monotonic() >= end or (timeout is None and not self._queue):
                return replies
            self.clock.sleep(min(end - self.clock.monotonic(), 1e9))

    # --- what the run tells ---------------------------------------------------------------------------------------

    def stamp(self, event: Mapping[str, Any]) -> dict[str, Any]:
        """`event` with the virtual time. A round that begins too early first waits; one that ends goes into the journal."""
        if event.get("event") == "round":
            if self._began is not None:
                self.clock.at = max(self.clock.at, self._began + round(self.world.round_hours * HOUR))
            self._began = self.clock.at
        elif event.get("event") == "round_end":
            self._end_round(int(event["round"]))
        return {**event, "virtual_seconds": self.clock.monotonic()}

    def complete_report(self, report: dict[str, Any]) -> dict[str, Any]:
        """`report` with the virtual time at which each round ended, and what the world made of each site."""
        rounds = [{**one, "virtual_seconds": self.ended.get(one["round"])} for one in report["rounds"]]
        sites = {
            place.site: {"always_there": place.hours.always, "zone": place.zone, "speed": place.speed, "drifts": place.drifts, "hostile": place.hostile}
            for place in sorted(self.places.values(), key=lambda place: place.site)
        }  # fmt: skip
        return {**report, "rounds": rounds, "world": {"virtual_seconds": self.clock.monotonic(), "sites": sites}}

    def _end_round(self, round: int) -> None:
        while self._flights and not self._buffered:  # who is late is still at work: how long, its own reply says
            first = next(iter(self._flights))
            self._resolve(self._flights.pop(first))
        if not self._buffered:  # else an answer counts whenever it comes
            self._queue.clear()
            self._ready.clear()
        self.ended[round] = self.clock.monotonic()
        if self._journal is None:
            return
        line = {
            "round": round, "at": self.clock.at, "began": self._began, "joined": sorted(self._joined),
            "busy": _after(self.clock.at, self._busy()), "line": _after(self.clock.at, self._line),
        }  # fmt: skip
        try:
            with self._journal.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
        except OSError as error:
            raise StorageError(
                f"{self._journal}: cannot be written: {error}. Make room, then go on with --resume."
            ) from error

    def _busy(self) -> dict[int, int]:
        """Node -> us, until when it is at work, as far as that is known."""
        under_way = {one.node: one.bound for one in self._flights.values() if one.kind == "train"}
        return {
            node: max(self._free.get(node, 0), under_way.get(node, 0)) for node in self._free.keys() | under_way.keys()
        }

    def _take_up(self, out: Path) -> None:
        assert self._journal is not None
        found = Checkpoint(out).load()
        if found is None or found[0].round == 0:
            return
        round = found[0].round
        try:
            lines = [
                json.loads(line) for line in self._journal.read_text(encoding="utf-8").splitlines() if line[-1:] == "}"
            ]
            told = {line["round"]: line for line in lines}  # a round that was run twice counts as it was run last
            stood = told[round]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise StorageError(
                f"{self._journal}: does not say where the world stood after round {round} ({type(error).__name__}). "
                "Restore it, or start the run anew with --overwrite."
            ) from error
        self.ended = {number: line["at"] / SECOND for number, line in told.items() if number <= round}
        self.clock.at, self._began, self._round = stood["at"], stood["began"], round
        self._returning = set(stood["joined"])
        self._joined = set(stood["joined"])
        self._free = {int(node): free for node, free in stood["busy"].items()}
        self._line = {int(node): free for node, free in stood["line"].items()}

    # --- one message ----------------------------------------------------------------------------------------------

    def _push(self, message: Message) -> str:
        node, kind = message.metadata.dst_node_id, message.metadata.message_type
        place, round, now = self.places.get(node), int(message.metadata.group_id or 0), self.clock.at
        joins = kind == "query" and round == 0
        if place is None:  # the grid's own complaint is the right one
            return self.inner.push_messages([message])[0]
        if round > self._round:
            self._round, self._tries = round, {}
            if not self._buffered:
                self._trained, self._asked = set(), {}
        tries = self._tries[node, kind] = self._tries.get((node, kind), 0) + 1
        drops = chance(self.config.seed, place.site, round, "drop-out") < self.world.drop_out
        away = not place.hours.online(now) and node not in self._returning
        if away or (drops and 0 < round <= self.config.total_rounds and kind != "evaluate"):
            return f"unheard-{next(self._numbers)}"  # nobody is there: silence, as in a plant
        flight = _Flight("", node, kind, round, now, now)
        if round > 0:
            conditions = self._conditions(place, self._asked.setdefault((kind, round), now))
            if conditions != Conditions():
                message.content = _under(message.content, conditions)
        if not joins:
            flight.lost = chance(self.config.seed, place.site, round, "reply", kind, tries) < self.world.reply_loss
            size = _bytes(message.content)
            flight.came = place.hours.spend(max(now, self._line.get(node, 0)), math.ceil(size * place.down))
            self._line[node] = flight.came
            if kind == "train":
                if self.world.row_seconds or place.hostile:
                    flight.request = RoundRequest.model_validate_json(
                        str(message.content.config_records["header"]["json"])
                    )
                flight.repeated = (node, round) in self._trained
                self._trained.add((node, round))
            start = max(flight.came, self._bounds.get(node, 0), self._free.get(node, 0))
            # what a site takes at least is known once it has said its rows: the nearer the bound, the fewer replies
            # must be looked at, and kept, before the first one can be handed out
            flight.bound = place.hours.spend(start, self._work(flight, self._rows.get(node, 0)))
            self._bounds[node] = flight.bound
        flight.id = self.inner.push_messages([message])[0]
        number = next(self._numbers)
        self._flights[number] = flight
        heapq.heappush(self._queue, (flight.bound, number))
        return flight.id

    def _conditions(self, place: Place, at: int) -> Conditions:
        """What `place` has of its labels, and where its inputs are, at a time (us)."""
        world, hours = self.world, at / HOUR - self.world.label_delay_hours
        come = float(hours >= 0.0) if not world.labels_hours else min(1.0, max(0.0, hours / world.labels_hours))
        drift = world.drift_week * at / WEEK if place.drifts else 0.0
        return Conditions(labelled=world.labels_start + (1.0 - world.labels_start) * come, drift=drift)

    def _work(self, flight: _Flight, rows: int) -> int:
        """us of its hours that a site takes to answer, the line left out."""
        if flight.request is None or flight.repeated:
            return 0
        seconds = rows_seen(flight.request.plan, rows) * self.world.row_seconds / self.places[flight.node].speed
        return math.ceil(seconds * SECOND)

    def _first_event(self, limit: int) -> int:
        """The clock's next stop: a site that comes on, or a reply."""
        opening = [hours.opens(self.clock.at) for hours in self._hours if not hours.always]
        limit = min([limit, *opening])
        came = self._arrive(limit)
        return limit if came is None else came

    def _arrive(self, limit: int) -> int | None:
        """Take in the first reply up to `limit`; when (us) it came, or None if there is none.

        A reply's time is known when the site has computed it. Until then its bound stands in the queue: whoever is first
        there and not yet computed is waited for, so no reply can overtake an earlier one, however the machine is loaded.
        """
        while self._queue and self._queue[0][0] <= limit:
            at, number = heapq.heappop(self._queue)
            flight = self._flights[number]
            if flight.reply is None:
                arrives = self._resolve(flight)
                if flight.lost:
                    del self._flights[number]
                else:
                    heapq.heappush(self._queue, (arrives, number))
                continue
            self._ready[flight.id] = flight.reply
            del self._flights[number]
            if flight.kind == "query" and flight.round == 0:
                self._joined.add(flight.node)
                self._returning.discard(flight.node)
            return at
        return None

    def _resolve(self, flight: _Flight) -> int:
        """Have the reply, and say when (us) it is at the centre."""
        if flight.reply is not None:
            return flight.bound
        reply = flight.reply = self._computed(flight)
        if flight.kind == "query" and flight.round == 0:
            return flight.bound
        place = self.places[flight.node]
        if flight.request is not None and not reply.has_error():
            arrays, header, metrics = open_records(reply.content)
            table = json.loads(header)
            self._rows[flight.node] = int(table["weight"])
            if place.hostile:
                reply.content = lied(flight.request, self.world.attack, place.site, arrays, table, metrics)
        start = max(flight.came, self._free.get(flight.node, 0))
        done = max(flight.bound, place.hours.spend(start, self._work(flight, self._rows.get(flight.node, 0))))
        size = 0 if reply.has_error() else _bytes(reply.content)
        self._free[flight.node] = place.hours.spend(done, math.ceil(size * place.up))
        return self._free[flight.node]

    def _computed(self, flight: _Flight) -> Message:
        began, pause = time.monotonic(), 0.0005
        while not (came := self.inner.pull_messages([flight.id])):
            if time.monotonic() - began > self.patience_s:
                raise DeploymentError(
                    f"{self.places[flight.node].site} has computed for {self.patience_s:g} s at one message ({flight.kind}, "
                    f"round {flight.round}) and virtual time cannot go on without it. Look at the workers; go on with --resume."
                )
            time.sleep(pause)
            pause = min(2 * pause, 0.05)
        return came[0]


def _under(content: RecordDict, conditions: Conditions) -> RecordDict:
    """The same order under these conditions; other sites may have been sent the very same content, so it is left as it is."""
    request = RoundRequest.model_validate_json(str(content.config_records["header"]["json"]))
    text = request.model_copy(update={"conditions": conditions}).model_dump_json()
    return RecordDict({**dict(content.items()), "header": ConfigRecord({"json": text})})


def _after(at: int, times: Mapping[int, int]) -> dict[str, int]:
    """Of `times` by node those that lie behind `at`, for JSON."""
    return {str(node): one for node, one in times.items() if one > at}


def _bytes(content: RecordDict) -> int:
    """What of a message fills the line: its arrays, its header, and 8 bytes a number."""
    arrays = sum(len(array.data) for record in content.array_records.values() for array in record.values())
    texts = sum(len(str(text)) for record in content.config_records.values() for text in record.values())
    return arrays + texts + 8 * sum(len(record) for record in content.metric_records.values())


def time_to_target(report: Mapping[str, Any], loss: float) -> float | None:
    """Virtual seconds until the mean validation loss of the honest sites was at most `loss`; None: it never was.

    What a site validates in a round is the model that the round before left, so that round's end is the time.
    """
    hostile = {site for site, drawn in report["world"]["sites"].items() if drawn["hostile"]}
    before: float | None = 0.0
    for one in report["rounds"]:
        told = [
            curves["validation_loss"]
            for site, curves in one["curves"].items()
            if site not in hostile and curves.get("validation_loss") is not None
        ]
        if told and sum(told) / len(told) <= loss:
            return before
        before = one["virtual_seconds"]
    return None
