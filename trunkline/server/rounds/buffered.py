"""Buffered rounds: a step as soon as K updates are in, whoever they are from, and nobody waits for anybody.

Buffered asynchronous aggregation (FedBuff; Nguyen et al. 2022, arXiv:2106.06639): every site that is free gets the newest
trunk at once. What it sends back may be the change to a trunk some steps old; it counts the less, the older that trunk is.

One order a site and trunk: who has answered for the newest one is idle until the next step, which is at most K - 1
updates away. So a repeated question is the same question, (run, round, site) names one update, and a site's vault sees
rounds that only go up, with gaps where the site was busy: stem and heads go on from the last round it trained.
"""

import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from flwr.app import DEFAULT_TTL, Message, RecordDict

from trunkline.errors import ConfigError, ContractError, QuorumError, Refused
from trunkline.flower.errors import AWAY, error_site
from trunkline.flower.grid import LocalGrid
from trunkline.flower.records import open_records, pack
from trunkline.flower.replies import PUSH_LOST, Replies
from trunkline.protocol.arrays import Arrays
from trunkline.protocol.messages import TrainRequest, Update
from trunkline.protocol.plan import LocalPlan
from trunkline.server.reporting.records import Refusal, RoundRecord
from trunkline.server.rounds.admission import admit
from trunkline.server.rounds.cohort import Member
from trunkline.server.rounds.messaging import BATCH, LOST, POLL_FIRST_S, POLL_MOST_S, is_far, now, pause
from trunkline.server.rounds.requests import address, contents
from trunkline.strategies import STRATEGIES, State, Strategy

if TYPE_CHECKING:
    from trunkline.server.rounds.run import _Run

KEPT = 8  # trunks in memory, the newest among them: a site at work on an older one is given the newest when it is asked again


def damping(staleness: int, power: float) -> float:
    """What an update counts that is the change to a trunk `staleness` steps old: (1 + staleness) ** -power."""
    return float((1.0 + staleness) ** -power)


def damped(update: Update, staleness: int, power: float) -> Update:
    """`update` shortened by its staleness.

    The change is shortened, not its weight: a mean over stale updates only would give each its full share again, and the
    step would be as long as one over fresh updates. Each number is rounded once, alone, so the sum stays exact in any order.
    """
    if (share := damping(staleness, power)) == 1.0:
        return update
    shorter = {name: (array.astype("float64") * share).astype(array.dtype) for name, array in update.delta.items()}
    return replace(update, delta=Arrays(shorter))


def refuse(strategy: Strategy, name: str) -> None:
    """Raises ConfigError where a strategy needs more of a step than a weighted mean of whatever has come."""
    if strategy.summable and strategy.lends(("trunk",)):
        return
    able = [one for one, kind in sorted(STRATEGIES.items()) if not kind.pooled and _able(kind(training=LocalPlan()))]
    why = (
        "compares the sites of a round with each other, each once and on one trunk"
        if strategy.lends(("trunk",))
        else "lends nothing"
    )
    raise ConfigError(
        f"[strategy] name = {name!r} {why}; [cohort] mode = 'buffered' takes updates as they come, of several trunks and perhaps "
        f"two of one site. Set mode = 'rounds', or one of the strategies {', '.join(able)}."
    )


def _able(strategy: Strategy) -> bool:
    return strategy.summable and bool(strategy.lends(("trunk",)))


@dataclass
class _Open:
    """A question that a site has not answered: its newest, whatever became of those before."""

    node: int
    round: int
    again_at: float
    tries: int = 1
    left: bool = False  # the site was away, or its message got lost, since it was asked


@dataclass
class _Step:
    """What a step has brought so far."""

    staleness: dict[str, list[int]] = field(default_factory=dict)  # site -> of each of its updates
    refused: list[Refusal] = field(default_factory=list)
    metrics: dict[str, dict[str, float]] = field(default_factory=dict)
    bytes_up: int = 0
    bytes_down: int = 0
    updates: int = 0


class Buffered:
    """The steps of a run with `[cohort] mode = "buffered"`.

    Args:
        run: whose cohort, strategy, orders and events they are.

    Raises:
        ConfigError: the strategy cannot be used so.
    """

    def __init__(self, run: "_Run") -> None:
        refuse(run.strategy, run.run.strategy.name)
        self.run = run
        self.cohort = run.run.cohort
        self.at = -1  # steps behind the state that the next step goes on from; -1: nobody knows
        self._forget()

    def _forget(self) -> None:
        """Nothing is under way: at the start, and where the run goes on from a checkpoint.

        What was at work then is asked anew, with the newest trunk. What counted before is in the records, and does not again.
        """
        self.open: dict[str, _Open] = {}
        self.sent: dict[str, tuple[str, TrainRequest]] = {}  # id of a message -> the site it went to and what it asked
        self.came: deque[Message] = deque()  # replies that were fetched together with the last one of a step
        self.heard: dict[str, int] = {}  # site -> the newest round it has answered for
        for one in self.run.records:
            for site, stale in one.staleness.items():
                self.heard[site] = max([self.heard.get(site, 0), *(one.round - steps for steps in stale)])
        self.served = dict(self.heard)  # site -> the newest round it was asked for
        self.trunks: dict[int, Arrays] = {}  # steps behind it -> a trunk that may have to be sent again
        self.again = 0  # replies to questions that were answered before
        grid = self.run.grid
        self.replies = Replies(grid) if is_far(grid) else None

    @property
    def size(self) -> int:
        """Updates of a step: `[cohort] buffer`, or half of the sites that were there at the start."""
        if self.run.records:  # a resumed run goes on as it began
            return self.run.records[-1].buffer
        return min(self.cohort.buffer or -(-len(self.run.cohort.members) // 2), len(self.run.cohort.members))

    def step(self, state: State) -> State:
        """Wait for the next K updates, and step.

        Raises:
            QuorumError: none came within `deadline_s`. The state is on disk; `resume` goes on.
        """
        run, started, number = self.run, time.monotonic(), state.round + 1
        if state.round != self.at:
            self._forget()
        self.at, size = -1, self.size
        run.cohort.greet(deadline_s=min(10.0, self.cohort.deadline_s))
        run.presence.there(run.cohort.members)  # who is away by its hours is told
        run.tell({"event": "round", "round": number, "rounds": run.run.total_rounds})
        step = _Step()
        after, mean = run.strategy.advance(state, self._updates(state, size, step))
        self.at = after.round
        run.records.append(
            RoundRecord(
                round=number, sites=sorted(step.staleness), refused=sorted(step.refused, key=lambda one: one.site),
                seconds=time.monotonic() - started, bytes_up=step.bytes_up, bytes_down=step.bytes_down,
                train_loss=mean.metrics.get("train_loss"), metrics={site: step.metrics[site] for site in sorted(step.metrics)},
                buffer=size, staleness={site: sorted(step.staleness[site]) for site in sorted(step.staleness)},
            )
        )  # fmt: skip
        stale = [one for own in step.staleness.values() for one in own]
        run.tell(
            {"event": "round_end", "round": number, "rounds": run.run.total_rounds, "sites": len(step.staleness),
             "seconds": time.monotonic() - started, "train_loss": mean.metrics.get("train_loss"),
             "validation_loss": mean.metrics.get("validation_loss"),
             "local_validation_loss": mean.metrics.get("local_validation_loss"), "bytes_up": step.bytes_up,
             "bytes_down": step.bytes_down, "refused": len(step.refused), "updates": len(stale),
             "staleness_mean": sum(stale) / len(stale), "staleness_max": max(stale), "repeated": self.again}
        )  # fmt: skip
        return after

    def _updates(self, state: State, size: int, step: _Step) -> Iterator[Update]:
        """The next `size` updates as they come; fewer where nobody else is at work, or `deadline_s` has passed."""
        run, grid, number = self.run, self.run.grid, state.round + 1
        self._serve(state)
        local = grid if isinstance(grid, LocalGrid) else None
        enough = max(1, int(-(-size * self.cohort.quorum // 1)))
        end, look_at, poll = now(grid) + self.cohort.deadline_s, 0.0, POLL_FIRST_S
        due: deque[str] = deque()
        while step.updates < size:
            at = now(grid)
            if at >= look_at:
                look_at = at + min(POLL_MOST_S, self.cohort.resend_s)
                online = set(grid.get_node_ids())
                due = deque(self._due(number, online, at))
            while due and (local is None or local.room()):
                self._ask(due.popleft(), number, step)
            heard = bool(self.came) or self._fetch()
            while self.came and step.updates < size:
                update = self._admitted(self.came.popleft(), state, size, step)
                if update is not None:
                    yield update
                    del update  # it may hold a trunk
            if heard:
                poll = POLL_FIRST_S
                if local is not None:  # there a message waits for a worker, not for a plant
                    end = now(grid) + self.cohort.deadline_s
                look_at = 0.0  # who has just answered may be free
                continue
            members = run.cohort.members
            at_work = any(one.node in online and not self._away(members[site]) for site, one in self.open.items())
            if step.updates >= enough and not due and not at_work:
                break  # whoever is there has answered for this trunk
            if not step.updates and members and all(self._away(member) for member in members.values()):
                run.presence.wait(members, grid)
                end, look_at = now(grid) + self.cohort.deadline_s, 0.0
                continue
            if now(grid) >= end:
                if step.updates:
                    break
                self.at = state.round  # begun again, the step goes on with what is under way
                raise QuorumError(self._nobody(number, step))
            poll = min(poll * 2, POLL_MOST_S)
            if local is None or not local.waits:
                at = now(grid)
                later = [one.again_at for one in self.open.values() if one.again_at > at]
                pause(grid, poll, min([end, *later]) - at)

    def _away(self, member: Member) -> bool:
        """Whether a site is closed or paused, as far as it has said."""
        return self.run.presence.away(member) is not None

    def _nobody(self, number: int, step: _Step) -> str:
        causes = (
            " ".join(f"{one.site}: {one.cause}" for one in step.refused) or "No site was online, or none has answered."
        )
        return (
            f"Round {number}: no update came within {self.cohort.deadline_s:g} s. {causes} The run stopped after round "
            f"{number - 1} with its state on disk; mend the sites and run again with --resume."
        )

    # --- out --------------------------------------------------------------------------------------------------------

    def _serve(self, state: State) -> None:
        """From now on this is the newest trunk. Older ones stay while a site is at work on them, and only so many."""
        self.trunks[state.round] = state.trunk
        under_way = {one.round - 1 for one in self.open.values()} | {state.round}
        for old in sorted(self.trunks)[:-KEPT] + [one for one in self.trunks if one not in under_way]:
            self.trunks.pop(old, None)
        members = {one.node: one for one in self.run.cohort.members.values()}
        self.newest = self._orders(state.round, members)
        self.packed: tuple[Any, Any] = (None, None)
        # what is older than a site's last answer is not listened for: it would only be counted
        self.sent = {key: one for key, one in self.sent.items() if one[1].round >= self.heard.get(one[0], 0)}

    def _orders(
        self, done: int, by_node: dict[int, Member]
    ) -> tuple[dict[int, TrainRequest], dict[int, Callable[[], RecordDict]]]:
        trunk = self.trunks[done]  # held alone: a State has an optimiser's moments beside it
        requests = address(self.run.requests.train(done + 1), by_node)
        return requests, contents(requests, lambda site: trunk, by_node)

    def _due(self, number: int, online: set[int], at: float) -> list[str]:
        """The sites to ask now, who has waited longest first: those that are free, and those that should have answered."""
        free, late = [], []
        for site, member in sorted(self.run.cohort.members.items()):
            one = self.open.get(site)
            if self.run.cohort.gone(member.node):
                if one is not None:
                    del self.open[site]
                continue
            if one is not None and (one.node != member.node or one.node not in online):
                one.left, one.again_at = True, at  # also when it restarted under a new id: what it had of us is lost
            if member.node not in online or self._away(member):
                continue
            if one is None:
                if self.served.get(site, 0) < number:
                    free.append(site)
            elif at >= one.again_at:
                late.append(site)
        return sorted(free, key=lambda site: (self.served.get(site, 0), site)) + late

    def _ask(self, site: str, number: int, step: _Step) -> None:
        """Send a site the newest trunk; or again what it is at work on, so that it does not train twice."""
        member, one = self.run.cohort.members[site], self.open.get(site)
        same = one is not None and not one.left and one.round - 1 in self.trunks
        number = one.round if one is not None and same else number
        if number - 1 == max(self.trunks) and member.node in self.newest[1]:
            orders, requests = self.newest
        else:
            orders, requests = self._orders(number - 1, {member.node: member})
        content = requests[member.node]()
        if self.replies is not None:
            if self.packed[0] is not content:  # most sites are asked the same
                self.packed = content, pack(content)
            content = self.packed[1]
        message = Message(content, dst_node_id=member.node, message_type="train", ttl=DEFAULT_TTL, group_id=str(number))
        # a site at work is not given one trunk after the other to queue up: the silence that is put up with goes on doubling
        tries = one.tries + 1 if one is not None and not one.left else 1
        again_at = now(self.run.grid) + self.cohort.resend_s * 2.0 ** min(tries - 1, 30)
        self.open[site] = _Open(member.node, number, again_at, tries)
        self.served[site] = number
        try:
            pushed = list(self.run.grid.push_messages([message]))
        except PUSH_LOST:  # the site has not seen it: it is sent again in a moment
            self.open[site].again_at = now(self.run.grid) + min(1.0, self.cohort.resend_s)
            return
        for message_id in pushed:
            if message_id:
                self.sent[message_id] = (site, orders[member.node])
        step.bytes_down += self.trunks[number - 1].only(member.lends).nbytes

    # --- in ---------------------------------------------------------------------------------------------------------

    def _fetch(self) -> bool:
        """Take in some of the replies that are there, never more than a few: each may hold a trunk."""
        if self.replies is not None:
            for message in self.replies.pull(list(self.sent), BATCH):
                self.came.append(message)
                if len(self.came) >= BATCH:
                    break
        else:
            self.came.extend(self.run.grid.pull_messages(self.sent.keys()))
        return bool(self.came)

    def _admitted(self, message: Message, state: State, size: int, step: _Step) -> Update | None:
        """The update of a reply, damped; None where it is none, and then it is said why. Each (site, round) counts once."""
        asked = self.sent.pop(message.metadata.reply_to_message_id, None)
        if asked is None:
            return None
        site, request = asked
        error = error_site(message)
        one = self.open.get(site)
        if error is not None and error[1] in LOST:
            if one is not None and one.round == request.round:
                one.left, one.again_at = True, now(self.run.grid) + min(1.0, self.cohort.resend_s)
            return None
        member = self.run.cohort.members[site]
        if error is not None and error[1] == AWAY:
            self.run.presence.said(member, error[2])
            if one is not None and one.round == request.round:  # when it is back it is given the newest trunk
                del self.open[site]
                self.served[site] = self.heard.get(site, 0)
            return None
        self.run.presence.heard(member)
        if request.round <= self.heard.get(site, 0):
            self.again += 1  # it was asked twice, or given a newer trunk meanwhile: the first answer counted
            return None
        self.heard[site] = request.round
        if one is not None and one.round <= request.round:
            del self.open[site]
        cause, update = None, None
        try:
            if error is not None:
                raise Refused(f"{site}, round {request.round}: no update. {error[2].removeprefix(f'{site}: ')}")
            arrays, header, metrics = open_records(message.content)
            update = admit(site, member.contract, request, Arrays(arrays), header, metrics)
            staleness = state.round - (request.round - 1)
            if staleness > self.cohort.staleness_limit:
                update = None
                raise Refused(
                    f"{site}, round {request.round}: update set aside. It is the change to a trunk {staleness} steps old; [cohort] "
                    f"staleness_limit is {self.cohort.staleness_limit}. Raise the limit or `buffer`, or give the site less to do"
                )
        except ContractError as refusal:
            cause = str(refusal)
            if not isinstance(refusal, Refused):
                cause = f"{site}, round {request.round}: reply set aside. {cause}."
            step.refused.append(Refusal(site=site, cause=cause))
        else:
            step.updates += 1
            step.staleness.setdefault(site, []).append(staleness)
            step.bytes_up += update.delta.nbytes
            step.metrics[site] = dict(update.metrics)
            update = damped(update, staleness, self.cohort.staleness_power)
        self.run.tell(
            {"event": "reply", "round": state.round + 1, "site": site, "refused": cause, "in": step.updates, "of": size}
        )
        return update
