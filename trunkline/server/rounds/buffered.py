"""Buffered rounds: the run makes a step as soon as K updates are in, from any sites, and no site waits for another.

Buffered asynchronous aggregation (FedBuff; Nguyen et al. 2022, arXiv:2106.06639): every site that is free gets the newest
trunk at once. Its update may be the change to a trunk some steps old; the older that trunk, the less the update counts.

A site gets one request for each trunk: a site that has answered for the newest trunk is idle until the next step, which is
at most K - 1 updates away. So a repeated question is the same question, and (run, round, site) names one update. A site's
vault sees rounds that only go up, with gaps where the site was busy: stem and heads go on from the last round it trained.
"""

import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace

from flwr.app import DEFAULT_TTL, Message, RecordDict

from trunkline.errors import ConfigError, QuorumError, Refused
from trunkline.flower.errors import AWAY, MessageLost, error_site
from trunkline.protocol.arrays import Arrays
from trunkline.protocol.messages import TrainRequest, Update
from trunkline.protocol.plan import LocalPlan
from trunkline.runtime.events import BufferedRoundEnded, RoundStarted
from trunkline.server.rounds.admission import finish_sum
from trunkline.server.rounds.cohort import Member
from trunkline.server.rounds.context import RunContext
from trunkline.server.rounds.messaging import LOST, POLL_FIRST_S, POLL_MOST_S, NodeReply, now, pause
from trunkline.server.rounds.requests import address, contents
from trunkline.server.rounds.superlink import BATCH
from trunkline.server.rounds.tally import Tally
from trunkline.server.rounds.update_journal import Content
from trunkline.strategies import STRATEGIES, Strategy, StrategyState

KEPT = 8  # trunks in memory, the newest among them: a site at work on an older one is given the newest when it is asked again


def damping(staleness: int, power: float) -> float:
    """The share that an update counts whose trunk is `staleness` steps old: (1 + staleness) ** -power."""
    return float((1.0 + staleness) ** -power)


def damped(update: Update, staleness: int, power: float) -> Update:
    """`update` shortened by its staleness.

    The change is shortened, not its weight. With smaller weights, a mean over stale updates alone would give each its full
    share again, and the step would be as long as one over fresh updates. Each number is rounded once, by itself, so the sum
    stays exact in any order.
    """
    if (share := damping(staleness, power)) == 1.0:
        return update
    shorter = {name: (array.astype("float64") * share).astype(array.dtype) for name, array in update.delta.items()}
    return replace(update, delta=Arrays(shorter))


def check_bufferable(strategy: Strategy, name: str) -> None:
    """Raises ConfigError where a strategy needs more of a step than a weighted mean of the updates that have come."""
    if _is_bufferable(strategy):
        return
    able = [
        other
        for other, kind in sorted(STRATEGIES.items())
        if not kind.pooled and _is_bufferable(kind(training=LocalPlan()))
    ]
    cause = (
        "compares the sites of a round with each other, each once and on one trunk"
        if strategy.lends(("trunk",))
        else "lends nothing"
    )
    raise ConfigError(
        f"[strategy] name = {name!r} {cause}; [cohort] mode = 'buffered' takes updates as they come, of several trunks and perhaps "
        f"two of one site. Set mode = 'rounds', or one of the strategies {', '.join(able)}."
    )


def _is_bufferable(strategy: Strategy) -> bool:
    return strategy.summable and bool(strategy.lends(("trunk",)))


@dataclass
class _Question:
    """The newest question that a site has not answered."""

    node: int
    round: int
    again_at: float
    tries: int = 1
    left: bool = False  # the site was away, or its message got lost, since it was asked


@dataclass
class _Step(Tally):
    """What a step has brought so far."""

    staleness: dict[str, list[int]] = field(default_factory=dict)  # site -> of each of its updates


class BufferedRounds:
    """The steps of a run with `[cohort] mode = "buffered"`.

    Args:
        context: the run; its strategy is one that `check_bufferable` accepts.
    """

    def __init__(self, context: RunContext) -> None:
        self.context = context
        self.settings = context.settings
        self.silent: set[str] = set()  # no site is waited for by name
        self.state_round = -1  # steps behind the state that the next step goes on from; -1: unknown
        self._forget()

    def _forget(self) -> None:
        """Forget the questions under way: at the start, and where the run goes on from a checkpoint.

        Sites that were at work then are asked anew, with the newest trunk. Updates that counted before are in the records,
        and do not count again.
        """
        self.open: dict[str, _Question] = {}
        self.sent: dict[str, tuple[str, TrainRequest]] = {}  # id of a message -> its site and request
        self.fetched: deque[Message] = deque()  # replies that were fetched together with the last one of a step
        self.answered: dict[str, int] = {}  # site -> the newest round it has answered for
        for record in self.context.records:
            for site, stale in record.staleness.items():
                self.answered[site] = max([self.answered.get(site, 0), *(record.round - steps for steps in stale)])
        self.served = dict(self.answered)  # site -> the newest round it was asked for
        self.trunks: dict[int, Arrays] = {}  # steps behind it -> a trunk that may have to be sent again
        self.repeated = 0  # replies to questions that were answered before
        self.inbox = self.context.transport.inbox()

    @property
    def size(self) -> int:
        """Updates of a step: `[cohort] buffer`, or half of the sites that were there at the start."""
        if self.context.records:  # a resumed run goes on as it began
            return self.context.records[-1].buffer
        members = len(self.context.cohort.members)
        return min(self.settings.buffer or -(-members // 2), members)

    def step(self, state: StrategyState) -> StrategyState:
        """Wait for the next K updates, and step.

        Raises:
            QuorumError: none came within `deadline_s`. The state is on disk; `resume` goes on.
        """
        context, started, round = self.context, time.monotonic(), state.round + 1
        if state.round != self.state_round:
            self._forget()
        self.state_round, size = -1, self.size
        context.greet()
        context.availability.available(context.cohort.members)  # absences by the hours are reported
        context.transport.begin_round()
        context.on_event(RoundStarted(round, context.config.total_rounds))
        step = _Step(round, size, context.on_event)
        after, mean = context.strategy.advance(
            state,
            self._updates(state, step),
            lambda mean: finish_sum(context.config.guards, mean, list(step.staleness)),
        )
        self.state_round = after.round
        staleness = {site: sorted(step.staleness[site]) for site in sorted(step.staleness)}
        record = replace(step.record(time.monotonic() - started, mean), buffer=size, staleness=staleness)
        context.records.append(record)
        ages = [age for stale in step.staleness.values() for age in stale]
        context.transport.end_round(round)
        context.on_event(
            BufferedRoundEnded(
                round, context.config.total_rounds, sites=len(step.staleness), seconds=time.monotonic() - started,
                train_loss=record.train_loss, validation_loss=mean.metrics.get("validation_loss"),
                local_validation_loss=mean.metrics.get("local_validation_loss"), bytes_up=step.bytes_up,
                bytes_down=step.bytes_down, refused=len(step.refused), updates=len(ages),
                staleness_mean=sum(ages) / len(ages), staleness_max=max(ages), repeated=self.repeated,
            )
        )  # fmt: skip
        return after

    def _updates(self, state: StrategyState, step: _Step) -> Iterator[Update]:
        """The next updates as they come; fewer than a step has where no other site is at work, or `deadline_s` has passed."""
        context, transport, size = self.context, self.context.transport, step.expected
        self._serve(state)
        enough = max(1, int(-(-size * self.settings.quorum // 1)))
        end, look_at, poll = now(transport) + self.settings.deadline_s, 0.0, POLL_FIRST_S
        due: deque[str] = deque()
        while step.updates < size:
            moment = now(transport)
            if moment >= look_at:
                look_at = moment + min(POLL_MOST_S, self.settings.resend_s)
                online = set(transport.get_node_ids())
                due = deque(self._due(step.round, online, moment))
            while due and transport.room():
                self._ask(due.popleft(), step)
            heard = bool(self.fetched) or self._fetch()
            while self.fetched and step.updates < size:
                update = self._admitted(self.fetched.popleft(), state, step)
                if update is not None:
                    yield update
                    del update  # it may hold a trunk
            if heard:
                poll = POLL_FIRST_S
                if transport.local:  # a message waits for a worker, not for a plant
                    end = now(transport) + self.settings.deadline_s
                look_at = 0.0  # a site that has just answered may be free
                continue
            members = context.cohort.members
            working = any(
                question.node in online and not context.availability.is_away(members[site])
                for site, question in self.open.items()
            )
            if step.updates >= enough and not due and not working:
                break  # every site that is online has answered for this trunk
            if not step.updates and members and all(map(context.availability.is_away, members.values())):
                context.availability.wait(members, transport)
                end, look_at = now(transport) + self.settings.deadline_s, 0.0
                continue
            if now(transport) >= end:
                if step.updates:
                    break
                self.state_round = state.round  # begun again, the step goes on with the questions under way
                raise self._silence(step)
            poll = min(poll * 2, POLL_MOST_S)
            if not (transport.local and transport.waits):
                moment = now(transport)
                later = [question.again_at for question in self.open.values() if question.again_at > moment]
                pause(transport, poll, min([end, *later]) - moment)

    def _silence(self, step: _Step) -> QuorumError:
        causes = step.causes() or "No site was online, or none has answered."
        situation = f"Round {step.round}: no update came within {self.settings.deadline_s:g} s. {causes}"
        return QuorumError.stopped(situation, step.round - 1)

    # --- questions ------------------------------------------------------------------------------------------------

    def _serve(self, state: StrategyState) -> None:
        """Make this the newest trunk. Older ones stay while a site is at work on them, up to `KEPT`."""
        self.trunks[state.round] = state.trunk
        under_way = {question.round - 1 for question in self.open.values()} | {state.round}
        for old in sorted(self.trunks)[:-KEPT] + [done for done in self.trunks if done not in under_way]:
            self.trunks.pop(old, None)
        members = {member.node: member for member in self.context.cohort.members.values()}
        self.newest = self._contents(state.round, members)
        # replies to questions older than a site's last answer are not fetched: they would only be counted as repeated
        self.sent = {
            message_id: (site, request)
            for message_id, (site, request) in self.sent.items()
            if request.round >= self.answered.get(site, 0)
        }

    def _contents(
        self, done: int, by_node: dict[int, Member]
    ) -> tuple[dict[int, TrainRequest], dict[int, Callable[[], RecordDict]]]:
        """The requests for the trunk of round `done`, and the makers of their messages."""
        trunk = self.trunks[done]  # held alone: a StrategyState has an optimiser's moments beside it
        requests = address(self.context.requests.train(done + 1), by_node)
        return requests, contents(requests, lambda site: trunk, by_node)

    def _due(self, round: int, online: set[int], moment: float) -> list[str]:
        """The sites to ask now: those that are free, the longest unasked first, then those that should have answered."""
        free, late = [], []
        for site, member in sorted(self.context.cohort.members.items()):
            question = self.open.get(site)
            if self.context.cohort.gone(member.node):
                if question is not None:
                    del self.open[site]
                continue
            if question is not None and (question.node != member.node or question.node not in online):
                # also where it restarted under a new id: it has lost its messages
                question.left, question.again_at = True, moment
            if member.node not in online or self.context.availability.is_away(member):
                continue
            if question is None:
                if self.served.get(site, 0) < round:
                    free.append(site)
            elif moment >= question.again_at:
                late.append(site)
        return sorted(free, key=lambda site: (self.served.get(site, 0), site)) + late

    def _ask(self, site: str, step: _Step) -> None:
        """Send a site the newest trunk; or again the trunk that it is at work on, so that it does not train twice."""
        member, question = self.context.cohort.members[site], self.open.get(site)
        same = question is not None and not question.left and question.round - 1 in self.trunks
        round = question.round if question is not None and same else step.round
        if round - 1 == max(self.trunks) and member.node in self.newest[1]:
            requests, makers = self.newest
        else:
            requests, makers = self._contents(round - 1, {member.node: member})
        # a site at work is not given one trunk after the other to queue up: the silence that is put up with goes on doubling
        tries = question.tries + 1 if question is not None and not question.left else 1
        again_at = now(self.context.transport) + self.settings.resend_s * 2.0 ** min(tries - 1, 30)
        self.open[site] = _Question(member.node, round, again_at, tries)
        self.served[site] = round
        try:
            content = makers[member.node]()
            message_id = self.context.transport.send(member.node, "train", str(round), content, DEFAULT_TTL)
        except MessageLost:  # the site has not seen it: it is sent again in a moment
            self.open[site].again_at = now(self.context.transport) + min(1.0, self.settings.resend_s)
            return
        if message_id:
            self.sent[message_id] = (site, requests[member.node])
        step.bytes_down += self.trunks[round - 1].only(member.lends).nbytes

    # --- replies --------------------------------------------------------------------------------------------------

    def _fetch(self) -> bool:
        """Fetch some of the replies that have come, never more than a few: each may hold a trunk."""
        for message in self.inbox(self.sent.keys()):
            self.fetched.append(message)
            if self.context.transport.durable and len(self.fetched) >= BATCH:
                break  # the others stay on the SuperLink
        return bool(self.fetched)

    def _admitted(self, message: Message, state: StrategyState, step: _Step) -> Update | None:
        """The update of a reply, damped; None where there is none. Each (site, round) counts once."""
        sent = self.sent.pop(message.metadata.reply_to_message_id, None)
        if sent is None:
            return None
        site, request = sent
        error = error_site(message)
        question = self.open.get(site)
        if error is not None and error[1] in LOST:
            if question is not None and question.round == request.round:
                question.left, question.again_at = True, now(self.context.transport) + min(1.0, self.settings.resend_s)
            return None
        member = self.context.cohort.members[site]
        if error is not None and error[1] == AWAY:
            self.context.availability.note_absence(member, error[2])
            if question is not None and question.round == request.round:  # back again, it is given the newest trunk
                del self.open[site]
                self.served[site] = self.answered.get(site, 0)
            return None
        self.context.availability.note_presence(member)
        if request.round <= self.answered.get(site, 0):
            self.repeated += 1  # it was asked twice, or given a newer trunk meanwhile: the first answer counted
            return None
        self.answered[site] = request.round
        if question is not None and question.round <= request.round:
            del self.open[site]
        staleness = state.round - (request.round - 1)

        def damp(update: Update, content: Content) -> Update:
            if staleness > self.settings.staleness_limit:
                raise Refused(
                    f"{site}, round {request.round}: update set aside. It is the change to a trunk {staleness} steps old; [cohort] "
                    f"staleness_limit is {self.settings.staleness_limit}. Raise the limit or `buffer`, or give the site less to do"
                )
            step.staleness.setdefault(site, []).append(staleness)
            return damped(update, staleness, self.settings.staleness_power)

        content, failure = (message.content, "") if error is None else (None, error[2])
        return step.admit(member, request, NodeReply(member.node, content, failure), damp)
