"""One round: every site is asked, each update is admitted as it comes, and the strategy makes the next state of them."""

import math
import time
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import partial
from typing import cast

import numpy as np

from trunkline.errors import ContractError, QuorumError, Refused
from trunkline.flower.errors import AWAY
from trunkline.privacy.guards import guards_of
from trunkline.protocol.arrays import Arrays, seed_of
from trunkline.protocol.contract import FIT_CONTRACT, FIT_METRIC
from trunkline.protocol.messages import TrainRequest, Update
from trunkline.runtime.events import FederatedRoundEnded, RoundStarted, SiteRecovered
from trunkline.server.rounds.admission import admit, finish_sum
from trunkline.server.rounds.cohort import Member
from trunkline.server.rounds.context import RunContext, Serve
from trunkline.server.rounds.messaging import NodeReply, ask, flush_stacks
from trunkline.server.rounds.requests import address, contents
from trunkline.server.rounds.tally import Tally, content_of
from trunkline.server.rounds.update_journal import Content, question_of, update_digest
from trunkline.strategies import FitQuerying, StrategyState
from trunkline.strategies.streaming import Streamed


class SynchronousRounds:
    """The rounds of a run in which all updates of a round are changes to the same trunk.

    Args:
        context: the run.
    """

    def __init__(self, context: RunContext) -> None:
        self.context = context
        self.silent: set[str] = set()  # missed the last round: they are asked, but no longer waited for
        self.wanted = 0  # updates after which the round has enough

    def step(self, state: StrategyState) -> StrategyState:
        """The state after one round; `state` itself where all sites that were asked turned out to be away.

        Raises:
            QuorumError: too few updates were admitted.
        """
        context, started, round = self.context, time.monotonic(), state.round + 1
        context.greet()
        members = self._choose_members(round)
        asked = len(members)
        tally = Tally(round, asked, context.on_event)
        admitted: dict[str, str] = {}  # site -> digest of its update
        context.transport.begin_round()
        context.on_event(RoundStarted(round, context.config.total_rounds))
        # sums come only to a strategy that is summable, whose mean takes them like single updates
        updates = cast(Iterator[Update], self._updates(state, members, tally, admitted))
        after, mean = context.strategy.advance(
            state, updates, lambda mean: finish_sum(context.config.guards, mean, tally.sites)
        )
        if asked and not members:
            return state
        self._check_quorum(tally, len(members))
        after = self._query_fits(after, {site: members[site] for site in tally.sites}, tally)
        record = replace(tally.record(time.monotonic() - started, mean), admitted=dict(sorted(admitted.items())))
        context.records.append(record)
        context.transport.end_round(round)
        context.on_event(
            FederatedRoundEnded(
                round, context.config.total_rounds, sites=len(record.sites), seconds=record.seconds, train_loss=record.train_loss,
                validation_loss=mean.metrics.get("validation_loss"),
                local_validation_loss=mean.metrics.get("local_validation_loss"), bytes_up=record.bytes_up,
                bytes_down=record.bytes_down, refused=len(record.refused),
            )
        )  # fmt: skip
        before, cohorts = state.notes.get("cohorts"), after.notes.get("cohorts")
        if cohorts is not None and cohorts != before:
            context.note(f"Round {round}: {_cohorts_in_words(cohorts, before or {})}")
        return after

    def _check_quorum(self, tally: Tally, asked: int) -> None:
        quorum = self.context.settings.quorum
        needed = max(1, -(-min(self.wanted, asked) * quorum // 1))
        if len(tally.sites) >= needed:
            return
        situation = (
            f"Round {tally.round}: {len(tally.sites)} of {asked} sites were admitted, {needed:g} are needed (quorum {quorum:g}). "
            f"{tally.causes() or 'No site was online.'}"
        )
        raise QuorumError.stopped(situation, tally.round - 1)

    def _choose_members(self, round: int) -> dict[str, Member]:
        """The members that this round asks: all that are available, or a share drawn for it, and some more where it over-selects.

        While all are away by their hours, the run waits for the first of them.
        """
        context = self.context
        while True:
            enrolled = {
                site: member for site, member in sorted(context.cohort.members.items()) if not context.cohort.gone(member.node)
            }  # fmt: skip
            members = context.availability.available(enrolled)
            if members or not enrolled:
                break
            context.availability.wait(enrolled, context.transport)
            context.greet()
        share = context.settings.share
        self.wanted = max(1, math.ceil(share * len(members)))
        if share == 1.0:
            return members
        count = min(len(members), math.ceil(share * len(members) * context.settings.over_select))
        drawn = np.random.default_rng(seed_of(context.config.seed, "cohort", round)).permutation(len(members))[:count]
        names = list(members)
        return {names[index]: members[names[index]] for index in sorted(drawn.tolist())}

    # --- updates --------------------------------------------------------------------------------------------------

    def _updates(
        self, state: StrategyState, members: dict[str, Member], tally: Tally, admitted: dict[str, str]
    ) -> Iterator[Update | Streamed]:
        """Ask every member, admit each reply, and hand its update on at once: nothing is collected.

        A member that is away leaves `members`: nobody waits for it, and no quorum counts it.
        """
        context, round = self.context, tally.round
        by_node = {member.node: member for member in members.values()}
        yield from self._sums(state, by_node, tally)
        serve = partial(context.strategy.serve, state)
        requests = address(context.requests.train(round), by_node)
        makers = contents(requests, serve, by_node)
        silent, self.silent = self.silent, set()
        patient = {node for node, member in by_node.items() if member.site not in silent}
        tally.bytes_down += sum(serve(member.site).only(member.lends).nbytes for member in by_node.values())
        answered: set[str] = set(tally.sites)
        questions = self._questions(serve, requests, by_node)
        for node, stored in self._stored_replies(round, by_node, questions):
            member = by_node.pop(node)
            answered.add(member.site)
            if (update := self._admit(member, requests[node], stored, tally, admitted)) is not None:
                yield update
        context.asked |= {node: member.site for node, member in by_node.items()}
        for answer in ask(
            context.transport, "train", {node: makers[node] for node in by_node}, round=round, deadline_s=context.settings.deadline_s,
            resend_s=context.settings.resend_s, patient_for=patient & set(by_node) or set(by_node), revoked=context.cohort.gone,
            late=context.late, is_away=lambda node: context.availability.is_away(by_node[node]),
            enough=lambda: len(tally.sites) >= self.wanted,
        ):  # fmt: skip
            member = by_node[answer.node]
            if answer.code == AWAY:
                context.availability.note_absence(member, answer.failure)
                members.pop(member.site, None)
                continue
            if not answer.silent:
                answered.add(member.site)
                self._report_recovery(member, round, answer)
            update = self._admit(member, requests[answer.node], answer, tally, admitted, questions.get(answer.node))
            if update is not None:
                yield update
        for site in set(members) - answered:
            if context.availability.is_away(members[site]):
                del members[site]  # it closed in the middle of the round
        if len(tally.sites) < self.wanted:  # otherwise the missing sites had no time to answer
            self.silent = {site for site in members if site not in answered}

    def _sums(self, state: StrategyState, by_node: dict[int, Member], tally: Tally) -> Iterator[Streamed]:
        """The updates of sites that are trained as stacks, added up where they were made; these sites leave `by_node`.

        Only a simulation has stacks. Its sites check their updates themselves.
        """
        context = self.context
        stacks = context.transport.stacks
        if (
            stacks is None
            or not context.strategy.summable
            or guards_of(context.config.guards)
            or context.settings.over_select > 1
        ):
            return  # a guard looks at each update alone; and of more sites than are wanted, some answer too late
        sizes = {name: array.nbytes for name, array in state.trunk.items()}
        bytes_of: dict[tuple[str, ...], int] = {}  # most sites lend the same
        for part in stacks.answer(context.requests.train(tally.round), state.trunk, list(by_node)):
            for node, metrics in part.metrics.items():
                member = by_node.pop(node)
                if (size := bytes_of.get(member.lends)) is None:
                    size = bytes_of[member.lends] = sum(sizes[name] for name in member.lends)
                tally.count(member.site, metrics, size)
                tally.bytes_down += size
            for node, problem in part.problems.items():
                site = by_node.pop(node).site
                cause = f"{site}, round {tally.round}: update set aside. {problem}."
                tally.refuse(site, cause)
                tally.report(site, cause)
            yield part.total
            tally.report("")

    def _questions(
        self, serve: Serve, requests: Mapping[int, TrainRequest], by_node: Mapping[int, Member]
    ) -> dict[int, str]:
        """node -> digest of its question; empty where nothing is journalled."""
        if self.context.journal is None:
            return {}
        digests: dict[tuple[int, str], str] = {}  # most sites are asked the same
        questions = {}
        for node, member in by_node.items():
            served = serve(member.site)
            if (kind := (id(served), member.digest)) not in digests:
                digests[kind] = question_of(requests[node], served.only(member.lends))
            questions[node] = digests[kind]
        return questions

    def _stored_replies(
        self, round: int, by_node: Mapping[int, Member], questions: Mapping[int, str]
    ) -> Iterator[tuple[int, Content]]:
        """The replies that came before the server was started again."""
        if self.context.journal is None:
            return
        for node, member in list(by_node.items()):
            if (stored := self.context.journal.find(round, member.site, questions[node])) is not None:
                yield node, stored

    def _admit(
        self, member: Member, request: TrainRequest, reply: NodeReply | Content, tally: Tally, admitted: dict[str, str],
        question: str | None = None,
    ) -> Update | None:  # fmt: skip
        """The update of a reply, on disk before it counts; None where it is refused.

        Args:
            question: its digest, where the reply is to be journalled.
        """
        context = self.context

        def store(update: Update, content: Content) -> Update:
            if context.journal is not None:
                admitted[member.site] = update_digest(content)
                if question is not None:
                    context.journal.keep(request.round, member.site, question, content)
            context.availability.note_presence(member)
            return update

        return tally.admit(member, request, reply, store)

    def _report_recovery(self, member: Member, round: int, answer: NodeReply) -> None:
        if answer.tries > 1:
            cause = answer.lost or f"no answer within {self.context.settings.resend_s:g} s"
            text = f"{member.site}, round {round}: asked {answer.tries} times until it answered ({cause})."
            self.context.on_event(SiteRecovered(member.site, round, text))

    # --- fit queries ----------------------------------------------------------------------------------------------

    def _query_fits(self, state: StrategyState, members: Mapping[str, Member], tally: Tally) -> StrategyState:
        """Ask the sites of this round how each set of arrays fits them; a site that does not answer for all has no vote.

        Only the strategy's decision is kept: a resumed run asks again and gets the same answers.
        """
        strategy = self.context.strategy
        if not isinstance(strategy, FitQuerying):
            return state
        queries = strategy.fit_queries(state)
        fits: dict[str, dict[str, float]] = {site: {} for site in sorted(members)}
        for name, trunk in queries.items():
            losses = self._losses(name, trunk, state.round + 1, {site: members[site] for site in fits}, tally)
            fits = {site: {**fit, name: losses[site]} for site, fit in fits.items() if site in losses}
        return strategy.reassign(state, fits) if queries else state

    def _losses(
        self, name: str, trunk: Arrays, round: int, members: Mapping[str, Member], tally: Tally
    ) -> dict[str, float]:
        """site -> validation loss with these arrays as it would enter `round`, of the sites that answer."""
        context = self.context
        flush_stacks(context.transport)
        by_node = {member.node: member for member in context.availability.available(members).values()}
        requests = address(context.requests.fit(round), by_node)
        makers = contents(requests, lambda site: trunk, by_node)
        tally.bytes_down += sum(trunk.only(member.lends).nbytes for member in by_node.values())
        losses: dict[str, float] = {}
        for answer in ask(
            context.transport, "query", makers, round=round, deadline_s=context.settings.deadline_s,
            resend_s=context.settings.resend_s, revoked=context.cohort.gone,
            is_away=lambda node: context.availability.is_away(by_node[node]),
        ):  # fmt: skip
            member = by_node[answer.node]
            try:
                arrays, header, metrics = content_of(member, round, answer, "answer")
                fit = admit(member.site, FIT_CONTRACT, requests[answer.node], Arrays(arrays), header, metrics).metrics
                if FIT_METRIC not in fit:
                    raise Refused(f"{member.site}, round {round}: answer set aside. It holds no `{FIT_METRIC}`.")
                losses[member.site] = fit[FIT_METRIC]
            except ContractError as error:
                context.note(f"{error} It was asked how {name} fits; it has no vote this time.")
        return losses


def sites_by_cohort(cohorts: Mapping[str, int]) -> list[tuple[int, list[str]]]:
    """The index of each cohort that has sites, with their names."""
    members: dict[int, list[str]] = {}
    for site, index in sorted(cohorts.items()):
        members.setdefault(index, []).append(site)
    return sorted(members.items())


def _cohorts_in_words(cohorts: Mapping[str, int], before: Mapping[str, int]) -> str:
    words = "; ".join(f"{index}: {', '.join(sites)}" for index, sites in sites_by_cohort(cohorts))
    moves = ", ".join(
        f"{site} from {before[site]} to {cohort}"
        for site, cohort in sorted(cohorts.items())
        if before.get(site, cohort) != cohort
    )
    return f"Cohorts: {words}. Moved: {moves}." if moves else f"Cohorts: {words}."
