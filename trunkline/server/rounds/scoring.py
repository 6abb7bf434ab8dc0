"""Scorecards: every site decides by its validation rows, or scores the final trunk on its test rows."""

import math
from functools import partial

from trunkline.errors import ContractError, Refused
from trunkline.flower.errors import AWAY
from trunkline.flower.records import open_records
from trunkline.protocol import opening_hours as hours
from trunkline.protocol.messages import DecideRequest, Scorecard, ScoreRequest, TaskRow
from trunkline.runtime.events import Evaluating, Waiting
from trunkline.server.rounds.admission import read_header
from trunkline.server.rounds.availability import LAST_WAIT
from trunkline.server.rounds.cohort import Member
from trunkline.server.rounds.context import RunContext
from trunkline.server.rounds.messaging import NodeReply, ask, flush_stacks, now
from trunkline.server.rounds.requests import address, contents
from trunkline.strategies import StrategyState


def evaluate(context: RunContext, state: StrategyState) -> list[tuple[str, TaskRow]]:
    """Every site scores the final trunk on its own test rows; (site, row) of the aggregates they send, by site."""
    return sorted(_Scoring(context, state, context.requests.score()).collect(), key=lambda site_row: site_row[0])


def decide(context: RunContext, state: StrategyState) -> None:
    """Every site decides by its validation rows, for the last time before it trains on them."""
    rounds = context.config.rounds
    _Scoring(context, state, context.requests.decide()).collect()
    context.note(
        f"Every site has chosen by its validation rows. Rounds {rounds + 1} to {context.config.total_rounds} start anew and train on them too."
    )


class _Scoring:
    """One request for scorecards, put to every member until enough have answered.

    Args:
        request: a site answers it with a Scorecard.
    """

    def __init__(self, context: RunContext, state: StrategyState, request: DecideRequest | ScoreRequest) -> None:
        self.context = context
        self.state = state
        self.request = request
        self.rows: list[tuple[str, TaskRow]] = []
        self.open = {member.node: member for member in context.cohort.members.values()}  # have not answered
        self.expected = len(self.open)
        self.done = 0  # sites that answered, or never will
        self._waiting_reported = False

    def collect(self) -> list[tuple[str, TaskRow]]:
        """The rows of every site's scorecard; a site that sends none, or another's, costs only itself.

        Sites that are closed are waited for up to `LAST_WAIT`; others until `quorum` have answered, or `outage_s` is over.
        """
        context = self.context
        flush_stacks(context.transport)
        began, limit = now(context.transport), hours.now() + LAST_WAIT
        enough = max(1, math.ceil(context.settings.quorum * self.expected))
        missed: set[str] = set()
        while self.open:
            self._ask_available()
            absent = {member.site: member for member in self.open.values() if context.availability.is_away(member)}
            over = now(context.transport) - began >= context.settings.outage_s
            if not context.transport.durable or self.done >= enough or over:
                missed |= {member.site for member in self.open.values()} - absent.keys()
                self.open = {member.node: member for member in absent.values()}  # they said when they are back
                if not absent or not context.availability.wait(absent, context.transport, "Scoring", limit):
                    break
            elif len(absent) == len(self.open):
                context.availability.wait(absent, context.transport, "Scoring")
            else:
                self._report_waiting(enough)
            context.greet()
            missing = {member.site for member in self.open.values()}  # a site may have come back as another node
            self.open = {member.node: member for member in context.cohort.members.values() if member.site in missing}
        for site in sorted(missed | {member.site for member in self.open.values()}):
            context.note(f"{site}: no scorecard. It was away when the sites were scored.")
        return self.rows

    def _report_waiting(self, enough: int) -> None:
        if self._waiting_reported:
            return
        self._waiting_reported = True
        names = ", ".join(sorted(member.site for member in self.open.values()))
        text = (
            f"Scores of {self.done} of {self.expected} sites are in, {enough} are needed; missing: {names}. "
            "They are asked until they are back."
        )
        self.context.on_event(Waiting(text, self.request.round))

    def _ask_available(self) -> None:
        """Ask every open member that is available, once. Members that answer, or never will, leave `open`."""
        context = self.context
        by_node = {node: member for node, member in self.open.items() if not context.availability.is_away(member)}
        if not by_node:
            return
        makers = contents(address(self.request, by_node), partial(context.strategy.serve, self.state), by_node)
        context.asked |= {node: member.site for node, member in by_node.items()}
        answered: list[int] = []
        for answer in ask(
            context.transport, "evaluate", makers, round=self.request.round, deadline_s=context.settings.deadline_s,
            resend_s=context.settings.resend_s, revoked=context.cohort.gone, late=context.late,
            is_away=lambda node: context.availability.is_away(by_node[node]),
        ):  # fmt: skip
            member = by_node[answer.node]
            if answer.code == AWAY:
                context.availability.note_absence(member, answer.failure)
                continue
            if answer.silent and context.transport.durable:
                continue
            answered.append(answer.node)
            context.availability.note_presence(member)
            try:
                self.rows += [(member.site, row) for row in self._card(member, answer).rows]
            except ContractError as error:
                context.note(str(error))
            if isinstance(self.request, ScoreRequest):
                context.on_event(Evaluating(self.done + len(answered), self.expected))
        self.done += len(answered)
        for node in answered:
            del self.open[node]

    def _card(self, member: Member, answer: NodeReply) -> Scorecard:
        """Raises ContractError where there is no scorecard, or it is not this member's."""
        if answer.content is None:
            raise Refused(f"{member.site}: no scorecard. {answer.failure.removeprefix(f'{member.site}: ')}")
        _, header, _ = open_records(answer.content)
        card = read_header(Scorecard, header, member.site, self.request.round)
        offered = {task.task for task in member.offer.tasks}
        if card.site != member.site or card.run != self.request.run or not {row.task for row in card.rows} <= offered:
            raise Refused(
                f"{member.site}: scorecard set aside. It is for {card.site!r}, run {card.run!r} or tasks it never offered."
            )
        return card
