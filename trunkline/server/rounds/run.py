"""The round loop: orders out, updates into the sum as they arrive, a checkpoint a round.

Flower's Strategy classes collect every reply before they look at one and end the run on an inconsistent one, so this loop
stands on Flower's messages (`Grid.push_messages`, `pull_messages`) instead; docs/decisions.md has the comparison.
"""

import json
import math
import secrets
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np
from flwr.serverapp import Grid
from pydantic import ValidationError

from trunkline.config.renames import current
from trunkline.config.run import RunConfig
from trunkline.errors import ConfigError, ContractError, QuorumError, Refused, StateLost
from trunkline.flower.errors import AWAY
from trunkline.flower.grid import LoopbackGrid
from trunkline.flower.records import open_records
from trunkline.models.trunk import first_trunk
from trunkline.privacy.guards import guards_of
from trunkline.protocol import opening_hours as hours
from trunkline.protocol.arrays import Arrays, seed_of
from trunkline.protocol.contract import FIT_CONTRACT, FIT_METRIC
from trunkline.protocol.messages import DecideRequest, Scorecard, ScoreRequest, TaskRow, TrainRequest, Update
from trunkline.protocol.plan import GuardSettings
from trunkline.release import COHORT_RELEASE, RELEASE, Figure, GuardUsed
from trunkline.runtime.storage import write_atomic
from trunkline.security.signatures import Sign
from trunkline.server.releases.lineage import figures_of, parts_of
from trunkline.server.releases.release import release
from trunkline.server.reporting.records import Refusal, RoundRecord
from trunkline.server.reporting.report import build_report
from trunkline.server.rounds.admission import admit, read_header
from trunkline.server.rounds.availability import LAST_WAIT, Presence
from trunkline.server.rounds.buffered import Buffered
from trunkline.server.rounds.checkpoint import Checkpoint
from trunkline.server.rounds.cohort import Cohort, Member
from trunkline.server.rounds.disk_wait import Room
from trunkline.server.rounds.messaging import Answer, Late, ask, is_far, now, pause
from trunkline.server.rounds.requests import RequestFactory, address, contents
from trunkline.server.rounds.update_journal import Came, Journal, question_of, update_digest
from trunkline.strategies import State, Strategy, build_strategy
from trunkline.strategies.streaming import Streamed

Tell = Callable[[dict[str, Any]], None]
Roster = Callable[[], Mapping[int, str]]
AGAIN_S = 1.0  # between two attempts at a round that too few sites answered
KEY = "run.json"  # in a run's folder: the name the sites know it by
CHECKPOINT_S = 20.0  # between two checkpoints while the sites of a simulation are in memory


def run_rounds(
    grid: Grid, run: RunConfig, out: Path, *, resume: bool, tell: Tell, key: str | None = None, score: bool = True,
    roster: Roster | None = None,
    sign: Sign | None = None,
) -> dict[str, Any]:  # fmt: skip
    """One whole run: gather, `rounds` rounds, evaluation. Returns the report; the final trunk is the last checkpoint.

    With `refit` the rounds come twice: after the first pass every site settles by its validation rows what it will use and
    where it decides; the second starts from the first trunk again, and the sites train on those rows too.

    Args:
        out: folder of checkpoints and events; made if absent.
        resume: go on from the newest checkpoint in `out`; without one, start.
        key: names the run in the sites' vaults; by default made of the run's name and the time.
        roster: Flower's node id -> site of whoever is enrolled now; by default every node may take part.
        score: False ends after the last round, for a trial of a search: no site looks at its test rows, nothing is released.
        sign: signs what is released; None: it goes out unsigned.

    Raises:
        QuorumError: too few sites, at the start or in a round. The state is on disk; `resume` goes on.
        ConfigError: `resume` with another run.toml than the checkpoint was made with.
        StorageError: a checkpoint could not be written; the one before it is intact.
        TrustError: the release could not be signed. The last round is on disk; `resume` goes on to the release.
    """
    return _Run(grid, run, out, tell, key, roster, sign).execute(resume, score)


@dataclass
class _Tally:
    """What a round has brought so far."""

    sites: list[str] = field(default_factory=list)
    refused: list[Refusal] = field(default_factory=list)
    metrics: dict[str, dict[str, float]] = field(default_factory=dict)
    admitted: dict[str, str] = field(default_factory=dict)
    bytes_up: int = 0
    bytes_down: int = 0


class _Run:
    def __init__(
        self,
        grid: Grid,
        run: RunConfig,
        out: Path,
        tell: Tell,
        key: str | None,
        roster: Roster | None,
        sign: Sign | None,
    ) -> None:
        self.roster = roster
        self.grid = grid
        self.sign = sign
        self.run = run
        self.out = out
        self.tell = tell
        self.strategy: Strategy = build_strategy(run.strategy.name, run.strategy.options, run.training)
        if self.strategy.pooled:
            raise ConfigError(
                "[strategy] name = 'central' pools rows, which only `trunkline simulate` can. Choose another strategy."
            )
        self.checkpoint = Checkpoint(out, tell=self._note)
        self.named = key
        self.key = key or f"{run.name}-{time.strftime('%Y%m%d-%H%M%S')}"
        self.requests = RequestFactory.of(run, self.strategy, self.key)
        self.lend, self.spec = self.requests.lend, self.requests.trunk
        self.far = is_far(
            grid
        )  # sites in this process or on a simulated clock do not come back later, nor does the disk
        self.journal = Journal(out, self._note) if self.far or isinstance(grid, LoopbackGrid) else None
        self.room = Room(out, self._note, run.cohort.outage_s if self.far else 0.0)
        self.late = Late(self._came_late)
        self.asking: dict[int, str] = {}  # node -> site, of everybody that was ever asked
        self.presence = Presence(tell)
        self.wanted = 0  # updates after which a round has enough
        self.records: list[RoundRecord] = []
        self.saved = 0.0  # when the last checkpoint was written
        self.silent: set[str] = set()  # missed the last round: asked, but no longer waited for
        self.seconds = 0.0  # of this run before it was resumed
        self.digest = json.dumps(run.model_dump(mode="json"), sort_keys=True)
        self.buffered = Buffered(self) if run.cohort.mode == "buffered" else None

    def execute(self, resume: bool, score: bool) -> dict[str, Any]:
        started = time.monotonic()
        found = self._restore() if resume else None
        state = found[0] if found else None
        self._name(anew=not resume)
        self.requests = replace(self.requests, key=self.key)
        trunk = first_trunk(self.spec, self.run.seed) if "trunk" in self.lend else Arrays()
        self.cohort = Cohort(self.grid, self.run.cohort, self.requests.offer(), trunk, self.tell, self.roster)
        if found and found[1].get("cohort"):
            self.cohort.restore(found[1]["cohort"], found[1]["beside"])
            self.cohort.gather_again()
        else:
            self.cohort.gather()
        resumed_at = state.round if state else None
        if state is None:
            state = self.strategy.start(self.cohort.first_arrays(trunk))
            self._save(state, started)
        size = sum(array.size for name, array in state.trunk.items())
        self.tell(
            {"event": "start", "run": self.run.name, "strategy": self.run.strategy.name, "rounds": self.run.total_rounds,
             "sites": sorted(self.cohort.members), "trunk_parameters": size, "resumed_at": resumed_at}
        )  # fmt: skip
        while state.round < self.run.total_rounds:
            try:
                if state.round == self.run.rounds:
                    self._decide(state)
                    state = self.strategy.again(state, self.cohort.first_arrays(trunk))
                state = self._round(state)
                self._save(state, started)
            except StateLost as lost:
                found = self._restore()
                assert found is not None  # one was saved before the first round
                back = found[0]
                self.tell(
                    {"event": "note", "text": f"{lost} Going back to round {back.round}, the last that is on disk."}
                )
                state = back
        if not score:
            seconds = self.seconds + time.monotonic() - started
            return build_report(run=self.run, rows=[], rounds=self.records, trunk_parameters=size, seconds=seconds)
        self.room(lambda: self._release(state))
        rows = self._evaluate(state)
        seconds = self.seconds + time.monotonic() - started
        self.tell({"event": "end", "seconds": seconds})
        report = build_report(run=self.run, rows=rows, rounds=self.records, trunk_parameters=size, seconds=seconds)
        if (cohorts := state.notes.get("cohorts")) is not None:
            report["cohorts"] = cohorts  # site -> number of its trunk
        if self.journal is not None:
            self.journal.clear()
        return report

    def _note(self, text: str) -> None:
        self.tell({"event": "note", "text": text})

    def _came_late(self, node: int, round: int) -> None:
        site = self.asking.get(node, f"node {node}")
        text = f"{site}, round {round}: a second answer came, to a question that was asked again. It was not counted."
        self.tell({"event": "late", "site": site, "round": round, "text": text})

    def _name(self, *, anew: bool) -> None:
        """The run's key, on disk before anybody is asked: the sites know the run by it, and a centre that is killed before its
        first checkpoint must not come back as another run."""
        if self.named or not self.far:
            return
        path = self.out / KEY
        if not anew:
            try:
                self.key = str(json.loads(path.read_bytes())["key"])
                return
            except (OSError, ValueError, KeyError, TypeError):
                pass  # none, or damaged: the checkpoint has it too, if there is one
        else:
            self.key = f"{self.key}-{secrets.token_hex(2)}"  # two runs of one name may begin in the same second
        self.room(lambda: write_atomic(path, json.dumps({"key": self.key}).encode()))

    def _release(self, state: State) -> None:
        """The trunk of all sites, and each cohort's with what its own sites lend and are."""
        run, members = self.run.model_copy(update={"trunk": self.spec}), self.cohort.members
        everybody = [member for _, member in sorted(members.items())]
        # figures go with this one only: a cohort's mean beside everybody's would tell the difference, which may be one site
        self._write(run, state, state.trunk, everybody, RELEASE, figures_of(self.records))
        for number, sites in _by_cohort(state.notes.get("cohorts", {})):
            own = [members[site] for site in sites if site in members]
            trunk = self.strategy.serve(state, sites[0]).only({name for member in own for name in member.lends})
            self._write(run, state, trunk, own, COHORT_RELEASE.format(number), {})

    def _write(
        self, run: RunConfig, state: State, trunk: Arrays, members: list[Member], file: str, figures: dict[str, Figure]
    ) -> None:
        contracts = {member.site: member.digest for member in members}
        release(
            self.out, trunk, run, self.key, self.lend, [(member.offer, member.once) for member in members], file,
            rounds=state.round, parts=parts_of(self.records, [member.offer for member in members], contracts),
            figures=figures, guards=_used(self.run.guards), sign=self.sign,
        )  # fmt: skip

    def _round(self, state: State) -> State:
        """The state after one round. Where sites may come back, a round that too few answered is begun again until enough have.

        Raises:
            QuorumError: too few, and nobody will come back or `outage_s` is over.
        """
        began, told = now(self.grid), False
        while True:
            try:
                after = self._one_round(state) if self.buffered is None else self.buffered.step(state)
            except QuorumError as error:
                waited = now(self.grid) - began
                if not self.far or waited >= self.run.cohort.outage_s:
                    raise
                if not told:
                    told = True
                    text = (
                        f"{str(error).split(' The run stopped')[0]} The round is begun again until they are back, for "
                        f"{self.run.cohort.outage_s / 3600:.3g} hours; what was admitted stays."
                    )
                    self.tell({"event": "waiting", "round": state.round + 1, "text": text})
                pause(self.grid, AGAIN_S, AGAIN_S)
            else:
                if after is state:  # all that were asked are away after all: again, once one is back
                    continue
                if told:
                    self._note(
                        f"Round {after.round}: enough sites are back after {now(self.grid) - began:.0f} s; the run goes on."
                    )
                return after

    def _one_round(self, state: State) -> State:
        started = time.monotonic()
        round = state.round + 1
        self.cohort.greet(deadline_s=min(10.0, self.run.cohort.deadline_s))
        members = self._asked(round)
        asked = len(members)
        tally = _Tally()
        self.tell({"event": "round", "round": round, "rounds": self.run.total_rounds})
        # sums come only to a strategy that is summable, whose mean takes them like single updates
        came = cast(Iterator[Update], self._updates(state, round, members, tally))
        after, mean = self.strategy.advance(state, came)
        if asked and not members:
            return state
        needed = max(1, -(-min(self.wanted, len(members)) * self.run.cohort.quorum // 1))
        if len(tally.sites) < needed:
            causes = " ".join(f"{one.site}: {one.cause}" for one in tally.refused) or "No site was online."
            raise QuorumError(
                f"Round {round}: {len(tally.sites)} of {len(members)} sites were admitted, {needed:g} are needed (quorum {self.run.cohort.quorum:g}). "
                f"{causes} The run stopped after round {state.round} with its state on disk; mend the sites and run again with --resume."
            )
        after = self._probe(after, {site: members[site] for site in tally.sites}, tally)
        record = RoundRecord(
            round=round,
            sites=sorted(tally.sites),
            refused=sorted(tally.refused, key=lambda one: one.site),
            seconds=time.monotonic() - started,
            bytes_up=tally.bytes_up,
            bytes_down=tally.bytes_down,
            train_loss=mean.metrics.get("train_loss"),
            metrics={site: tally.metrics[site] for site in sorted(tally.metrics)},
            admitted=dict(sorted(tally.admitted.items())),
        )
        self.records.append(record)
        self.tell(
            {"event": "round_end", "round": round, "rounds": self.run.total_rounds, "sites": len(record.sites), "seconds": record.seconds,
             "train_loss": record.train_loss, "validation_loss": mean.metrics.get("validation_loss"),
             "local_validation_loss": mean.metrics.get("local_validation_loss"), "bytes_up": record.bytes_up,
             "bytes_down": record.bytes_down, "refused": len(record.refused)}
        )  # fmt: skip
        was, cohorts = state.notes.get("cohorts"), after.notes.get("cohorts")
        if cohorts is not None and cohorts != was:
            self.tell({"event": "note", "text": f"Round {round}: {_cohorts_in_words(cohorts, was or {})}"})
        return after

    def _asked(self, round: int) -> dict[str, Member]:
        """The members that this round asks: all that are there, or a share drawn for it, and some more where it over-selects.

        While all are away by their hours it waits for the first to be back.
        """
        while True:
            members = {site: one for site, one in sorted(self.cohort.members.items()) if not self.cohort.gone(one.node)}
            there = self.presence.there(members)
            if there or not members:
                break
            self.presence.wait(members, self.grid)
            self.cohort.greet(deadline_s=min(10.0, self.run.cohort.deadline_s))
        members = there
        self.wanted = max(1, math.ceil(self.run.cohort.share * len(members)))
        if self.run.cohort.share == 1.0:
            return members
        count = min(len(members), math.ceil(self.run.cohort.share * len(members) * self.run.cohort.over_select))
        drawn = np.random.default_rng(seed_of(self.run.seed, "cohort", round)).permutation(len(members))[:count]
        names = list(members)
        return {names[place]: members[names[place]] for place in sorted(drawn.tolist())}

    def _summed(self, state: State, round: int, by_node: dict[int, Member], tally: _Tally) -> Iterator[Streamed]:
        """The updates of sites that a grid trains many at once, added up where they were made; they leave `by_node`.

        Only a simulation has such a grid, and its sites are its own: they check their updates themselves.
        """
        together = getattr(self.grid, "together", None)
        if (
            together is None
            or not self.strategy.summable
            or guards_of(self.run.guards)
            or self.run.cohort.over_select > 1
        ):
            return  # under a guard each site answers for itself, and its update is looked at alone; of more, some are too late
        everybody, sizes = len(by_node), {name: array.nbytes for name, array in state.trunk.items()}
        bytes_of: dict[tuple[str, ...], int] = {}  # most sites lend the same
        for part in together(self.requests.train(round), state.trunk, list(by_node)):
            for node, metrics in part.metrics.items():
                member = by_node.pop(node)
                tally.sites.append(member.site)
                tally.metrics[member.site] = metrics
                if (size := bytes_of.get(member.lends)) is None:
                    size = bytes_of[member.lends] = sum(sizes[name] for name in member.lends)
                tally.bytes_down, tally.bytes_up = tally.bytes_down + size, tally.bytes_up + size
            for node, problem in part.problems.items():
                site = by_node.pop(node).site
                cause = f"{site}, round {round}: update set aside. {problem}."
                tally.refused.append(Refusal(site=site, cause=cause))
                self.tell(
                    {
                        "event": "reply",
                        "round": round,
                        "site": site,
                        "refused": cause,
                        "in": len(tally.sites),
                        "of": everybody,
                    }
                )
            yield part.total
            self.tell(
                {"event": "reply", "round": round, "site": "", "refused": None, "in": len(tally.sites), "of": everybody}
            )

    def _updates(
        self, state: State, round: int, members: dict[str, Member], tally: _Tally
    ) -> Iterator[Update | Streamed]:
        """Ask every member, admit what comes, and hand it on at once: nothing is collected."""
        by_node = {member.node: member for member in members.values()}
        everybody = len(by_node)
        yield from self._summed(state, round, by_node, tally)
        serve = partial(self.strategy.serve, state)
        orders = address(self.requests.train(round), by_node)
        requests = contents(orders, serve, by_node)
        silent, self.silent = self.silent, set()
        patient = {node for node, member in by_node.items() if member.site not in silent}
        tally.bytes_down += sum(serve(member.site).only(member.lends).nbytes for member in by_node.values())
        answered: set[str] = set(tally.sites)
        questions = self._questions(serve, orders, by_node)
        for node, came in self._kept(round, by_node, questions):
            member = by_node.pop(node)
            answered.add(member.site)
            if (update := self._admit(member, orders[node], came, tally, everybody)) is not None:
                yield update
        self.asking |= {node: member.site for node, member in by_node.items()}
        for answer in ask(
            self.grid, "train", {node: requests[node] for node in by_node}, round=round, deadline_s=self.run.cohort.deadline_s,
            resend_s=self.run.cohort.resend_s, patient_for=patient & set(by_node) or set(by_node), gone=self.cohort.gone, late=self.late,
            away=lambda node: self.presence.away(by_node[node]) is not None, enough=lambda: len(tally.sites) >= self.wanted,
        ):  # fmt: skip
            member = by_node[answer.node]
            if answer.code == AWAY:
                self.presence.said(member, answer.failure)
                members.pop(member.site, None)  # nobody waits for it, and no quorum counts it
                continue
            if not answer.silent:
                answered.add(member.site)
            if answer.tries > 1 and not answer.silent:
                why = answer.lost or f"no answer within {self.run.cohort.resend_s:g} s"
                text = f"{member.site}, round {round}: asked {answer.tries} times until it answered ({why})."
                self.tell({"event": "recovered", "site": member.site, "round": round, "text": text})
            question = questions.get(answer.node)
            update = self._admit(member, orders[answer.node], answer, tally, everybody, question)
            if update is not None:
                yield update
        for site in set(members) - answered:
            if self.presence.away(members[site]) is not None:
                del members[site]  # it closed in the middle of the round
        if len(tally.sites) < self.wanted:  # else who is not in had no time to be
            self.silent = {site for site in members if site not in answered}

    def _questions(
        self, serve: Callable[[str], Arrays], orders: dict[int, TrainRequest], by_node: dict[int, Member]
    ) -> dict[int, str]:
        """node -> digest of what it is asked; empty where nothing is journalled."""
        if self.journal is None:
            return {}
        made: dict[tuple[int, str], str] = {}  # most sites are asked the same
        found = {}
        for node, member in by_node.items():
            served = serve(member.site)
            if (like := (id(served), member.digest)) not in made:
                made[like] = question_of(orders[node], served.only(member.lends))
            found[node] = made[like]
        return found

    def _kept(self, round: int, by_node: dict[int, Member], questions: dict[int, str]) -> Iterator[tuple[int, Came]]:
        """What the sites have answered already, before the centre was started again."""
        if self.journal is None:
            return
        for node, member in list(by_node.items()):
            if (came := self.journal.find(round, member.site, questions[node])) is not None:
                yield node, came

    def _admit(
        self,
        member: Member,
        request: TrainRequest,
        answer: Answer | Came,
        tally: _Tally,
        everybody: int,
        question: str | None = None,
    ) -> Update | None:
        """The update of an answer, on disk before it counts; None, and told, when it is set aside.

        Args:
            question: its digest, where the answer is to be journalled.
        """
        round, cause, update = request.round, None, None
        try:
            if isinstance(answer, Answer):
                if answer.content is None:
                    raise Refused(
                        f"{member.site}, round {round}: no update. {answer.failure.removeprefix(f'{member.site}: ')}"
                    )
                came: Came = open_records(answer.content)
            else:
                came = answer
            arrays, header, metrics = came
            update = admit(member.site, member.contract, request, Arrays(arrays), header, metrics)
        except ContractError as error:
            cause = str(error)
            if not isinstance(error, Refused):
                cause = f"{member.site}, round {round}: reply set aside. {cause}."
            tally.refused.append(Refusal(site=member.site, cause=cause))
        else:
            if self.journal is not None:
                tally.admitted[member.site] = update_digest(came)
                if question is not None:
                    self.journal.keep(round, member.site, question, came)
            self.presence.heard(member)
            tally.sites.append(member.site)
            tally.bytes_up += update.delta.nbytes
            tally.metrics[member.site] = dict(update.metrics)
        self.tell(
            {"event": "reply", "round": round, "site": member.site, "refused": cause, "in": len(tally.sites), "of": everybody}
        )  # fmt: skip
        return update

    def _probe(self, state: State, members: dict[str, Member], tally: _Tally) -> State:
        """Ask the sites of this round how each trunk of the strategy's fit queries fits them; who does not answer for all has no vote.

        Nothing is kept of it but what the strategy decides: a resumed run asks again and hears the same.
        """
        asked = self.strategy.fit_queries(state)
        fits: dict[str, dict[str, float]] = {site: {} for site in sorted(members)}
        for name, trunk in asked.items():
            heard = self._fits(name, trunk, state.round + 1, {site: members[site] for site in fits}, tally)
            fits = {site: {**told, name: heard[site]} for site, told in fits.items() if site in heard}
        return self.strategy.judge(state, fits) if asked else state

    def _fits(
        self, name: str, trunk: Arrays, round: int, members: dict[str, Member], tally: _Tally
    ) -> dict[str, float]:
        """site -> validation loss with these arrays as it would enter `round`, of the sites that say."""
        self._put_away()
        by_node = {member.node: member for member in self.presence.there(members).values()}
        orders = address(self.requests.fit(round), by_node)
        requests = contents(orders, lambda site: trunk, by_node)
        tally.bytes_down += sum(trunk.only(member.lends).nbytes for member in by_node.values())
        heard: dict[str, float] = {}
        for answer in ask(
            self.grid, "query", requests, round=round, deadline_s=self.run.cohort.deadline_s, resend_s=self.run.cohort.resend_s,
            gone=self.cohort.gone, away=lambda node: self.presence.away(by_node[node]) is not None,
        ):  # fmt: skip
            site = by_node[answer.node].site
            try:
                if answer.content is None:
                    raise Refused(f"{site}, round {round}: no answer. {answer.failure.removeprefix(f'{site}: ')}")
                arrays, header, metrics = open_records(answer.content)
                told = admit(site, FIT_CONTRACT, orders[answer.node], Arrays(arrays), header, metrics).metrics
                if FIT_METRIC not in told:
                    raise Refused(f"{site}, round {round}: answer set aside. It holds no `{FIT_METRIC}`.")
                heard[site] = told[FIT_METRIC]
            except ContractError as error:
                self.tell({"event": "note", "text": f"{error} It was asked how {name} fits; it has no vote this time."})
        return heard

    def _evaluate(self, state: State) -> list[tuple[str, TaskRow]]:
        """Every site scores the final trunk on its own test rows and sends the aggregates."""
        return sorted(self._cards(state, self.requests.score()), key=lambda one: one[0])

    def _decide(self, state: State) -> None:
        """Every site settles by its validation rows, for the last time before it trains on them."""
        self._cards(state, self.requests.decide())
        text = f"Every site has chosen by its validation rows. Rounds {self.run.rounds + 1} to {self.run.total_rounds} start anew and train on them too."
        self.tell({"event": "note", "text": text})

    def _cards(self, state: State, request: DecideRequest | ScoreRequest) -> list[tuple[str, TaskRow]]:
        """The rows of every site's Scorecard for the trunk it is served; a site that sends none, or another's, costs itself."""
        self._put_away()
        by_node = {member.node: member for member in self.cohort.members.values()}
        everybody, began, told = len(by_node), now(self.grid), False
        rows: list[tuple[str, TaskRow]] = []
        done, missed, limit = 0, set[str](), hours.now() + LAST_WAIT
        while by_node:
            there = {node: member for node, member in by_node.items() if self.presence.away(member) is None}
            answered = self._some_cards(state, request, there, rows, done, everybody) if there else []
            done += len(answered)
            for node in answered:
                del by_node[node]
            away = {member.site: member for member in by_node.values() if self.presence.away(member) is not None}
            enough = max(1, math.ceil(self.run.cohort.quorum * everybody))
            if not self.far or done >= enough or now(self.grid) - began >= self.run.cohort.outage_s:
                missed |= {member.site for member in by_node.values()} - away.keys()
                by_node = {member.node: member for member in away.values()}  # who says when it is back is waited for
                if not away or not self.presence.wait(away, self.grid, "Scoring", limit):
                    break
            elif len(away) == len(by_node):
                self.presence.wait(away, self.grid, "Scoring")
            elif not told:
                told = True
                names = ", ".join(sorted(member.site for member in by_node.values()))
                text = f"Scores of {done} of {everybody} sites are in, {enough} are needed; missing: {names}. They are asked until they are back."
                self.tell({"event": "waiting", "round": request.round, "text": text})
            self.cohort.greet(deadline_s=min(10.0, self.run.cohort.deadline_s))
            left = {member.site for member in by_node.values()}  # a site may have come back as another node
            by_node = {member.node: member for member in self.cohort.members.values() if member.site in left}
        for site in sorted(missed | {member.site for member in by_node.values()}):
            self._note(f"{site}: no scorecard. It was away when the sites were scored.")
        return rows

    def _some_cards(
        self,
        state: State,
        request: DecideRequest | ScoreRequest,
        by_node: dict[int, Member],
        rows: list[tuple[str, TaskRow]],
        done: int,
        everybody: int,
    ) -> list[int]:
        """Ask once; the nodes that answered or never will. Their rows are added to `rows`."""
        requests = contents(address(request, by_node), partial(self.strategy.serve, state), by_node)
        self.asking |= {node: member.site for node, member in by_node.items()}
        answers = ask(
            self.grid,
            "evaluate",
            requests,
            round=request.round,
            deadline_s=self.run.cohort.deadline_s,
            resend_s=self.run.cohort.resend_s,
            gone=self.cohort.gone,
            late=self.late,
            away=lambda node: self.presence.away(by_node[node]) is not None,
        )
        heard: list[int] = []
        for answer in answers:
            member = by_node[answer.node]
            if answer.code == AWAY:
                self.presence.said(member, answer.failure)
                continue
            if answer.silent and self.far:
                continue
            heard.append(answer.node)
            self.presence.heard(member)
            try:
                if answer.content is None:
                    raise Refused(f"{member.site}: no scorecard. {answer.failure.removeprefix(f'{member.site}: ')}")
                _, header, _ = open_records(answer.content)
                card = read_header(Scorecard, header, member.site, request.round)
                allowed = {one.task for one in member.offer.tasks}
                if card.site != member.site or card.run != self.key or not {row.task for row in card.rows} <= allowed:
                    raise Refused(
                        f"{member.site}: scorecard set aside. It is for {card.site!r}, run {card.run!r} or tasks it never offered."
                    )
                rows += [(member.site, row) for row in card.rows]
            except ContractError as error:
                self.tell({"event": "note", "text": str(error)})
            if isinstance(request, ScoreRequest):
                self.tell({"event": "evaluate", "in": done + len(heard), "of": everybody})
        return heard

    def _put_away(self) -> None:
        """Have sites that a grid keeps in memory between rounds write their state to their vaults."""
        if getattr(self.grid, "holding", False):
            self.grid.flush()  # type: ignore[attr-defined]

    def _save(self, state: State, started: float) -> None:
        """A checkpoint; while sites are in memory only now and then, because their vaults must be of the same round."""
        last = state.round % self.run.rounds == 0
        if getattr(self.grid, "holding", False) and not last and time.monotonic() - self.saved < CHECKPOINT_S:
            return
        self._put_away()
        self.saved = time.monotonic()
        cohort, beside = self.cohort.keep() if self.far or self.journal is not None else ({}, {})
        meta = {
            "key": self.key,
            "cohort": cohort,
            "config": self.digest,
            "records": [asdict(one) for one in self.records],
            "silent": sorted(self.silent),
            "seconds": self.seconds + time.monotonic() - started,
        }
        self.room(lambda: self.checkpoint.save(state, meta, beside))

    def _restore(self) -> tuple[State, dict[str, Any]] | None:
        found = self.checkpoint.load()
        if found is None:
            return None
        state, meta = found
        if meta["config"] != self.digest:
            was, is_ = _as_today(json.loads(meta["config"])), json.loads(self.digest)
            changed = ", ".join(key for key in {**is_, **was} if was.get(key) != is_.get(key))
            if changed:
                raise ConfigError(
                    f"{self.checkpoint.shelf.folder}: this run was started with another run.toml (different: {changed}). "
                    "Resume with the settings it was started with, or give another --out."
                )
        self.key = meta["key"]
        self.requests = replace(self.requests, key=self.key)
        self.silent = set(meta.get("silent", ()))
        self.seconds = meta["seconds"]
        self.records = [
            RoundRecord(**{**one, "refused": [Refusal(**refusal) for refusal in one["refused"]]})
            for one in meta["records"]
        ]
        return state, meta


def _as_today(config: dict[str, Any]) -> dict[str, Any]:
    """The settings of an older checkpoint, with what has come since at its default."""
    try:
        return dict(RunConfig.model_validate(current(RunConfig, config)).model_dump(mode="json"))
    except ValidationError:
        return config


def _used(settings: GuardSettings) -> tuple[GuardUsed, ...]:
    """The guards of a run as the card of its release has them."""
    if settings.clip_norm is None:
        return ()
    return (GuardUsed(name="clip", parameters={"norm": settings.clip_norm}),)


def _by_cohort(cohorts: Mapping[str, int]) -> list[tuple[int, list[str]]]:
    """Each cohort that has sites, with their names."""
    members: dict[int, list[str]] = {}
    for site, number in sorted(cohorts.items()):
        members.setdefault(number, []).append(site)
    return sorted(members.items())


def _cohorts_in_words(cohorts: Mapping[str, int], was: Mapping[str, int]) -> str:
    words = "Cohorts: " + "; ".join(f"{number}: {', '.join(sites)}" for number, sites in _by_cohort(cohorts)) + "."
    moved = [site for site in sorted(cohorts) if was.get(site, cohorts[site]) != cohorts[site]]
    there = ", ".join(f"{site} from {was[site]} to {cohorts[site]}" for site in moved)
    return f"{words} Moved: {there}." if moved else words
