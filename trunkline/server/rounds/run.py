"""A run from its first request to its report: gather, rounds, release, evaluation, and a checkpoint after each round.

Flower's Strategy classes collect every reply before they look at one, and end the run on an inconsistent one. So this
loop stands on Flower's messages instead; docs/decisions.md has the comparison.
"""

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from trunkline.config.run import RunConfig
from trunkline.errors import ConfigError, QuorumError, StateLost
from trunkline.models.trunk import first_trunk
from trunkline.protocol.arrays import Arrays
from trunkline.runtime.events import LateReply, Note, OnEvent, RunEnded, RunStarted, Waiting
from trunkline.security.signatures import Sign
from trunkline.server.reporting.records import RoundRecord
from trunkline.server.reporting.report import build_report
from trunkline.server.rounds.availability import Availability
from trunkline.server.rounds.buffered import BufferedRounds, check_bufferable
from trunkline.server.rounds.cohort import Cohort
from trunkline.server.rounds.context import RunContext
from trunkline.server.rounds.disk_wait import DiskWait
from trunkline.server.rounds.messaging import LateReplies, Transport, flush_stacks, now, pause
from trunkline.server.rounds.persistence import RunPersistence, SavedRun
from trunkline.server.rounds.publication import publish
from trunkline.server.rounds.requests import RequestFactory
from trunkline.server.rounds.round import SynchronousRounds
from trunkline.server.rounds.scoring import decide, evaluate
from trunkline.server.rounds.update_journal import UpdateJournal
from trunkline.strategies import Strategy, StrategyState, build_strategy

Roster = Callable[[], Mapping[int, str]]
ROUND_RETRY_S = 1.0  # between two attempts at a round that too few sites answered
CHECKPOINT_S = 20.0  # between two checkpoints while the sites of a simulation are in memory


def run_rounds(
    transport: Transport, run: RunConfig, out: Path, *, resume: bool, on_event: OnEvent, key: str | None = None, score: bool = True,
    roster: Roster | None = None,
    sign: Sign | None = None,
) -> dict[str, Any]:  # fmt: skip
    """One whole run: gather, `rounds` rounds, evaluation. Returns the report; the final trunk is the last checkpoint.

    With `refit` the rounds come twice. After the first pass every site decides by its validation rows which model it will
    use, and its thresholds. The second pass starts from the first trunk again, and the sites train on those rows too.

    Args:
        out: folder of checkpoints and events; made if absent.
        resume: go on from the newest checkpoint in `out`; without one, start.
        on_event: takes every event of the run.
        key: names the run in the sites' vaults; by default made of the run's name and the time.
        roster: gives Flower's node id -> site of all sites that are enrolled now; None: every node may take part.
        score: False ends after the last round, for a trial of a search: no site looks at its test rows, nothing is released.
        sign: signs the release; None: it is not signed.

    Raises:
        QuorumError: too few sites, at the start or in a round. The state is on disk; `resume` goes on.
        ConfigError: `resume` with another run.toml than the checkpoint was made with.
        StorageError: a checkpoint could not be written; the one before it is intact.
        TrustError: the release could not be signed. The last round is on disk; `resume` goes on to the release.
    """
    return _Run(transport, run, out, on_event, key, roster, sign).execute(resume, score)


class _Run:
    def __init__(
        self, transport: Transport, run: RunConfig, out: Path, on_event: OnEvent, key: str | None, roster: Roster | None,
        sign: Sign | None,
    ) -> None:  # fmt: skip
        self.transport = transport
        self.run = run
        self.out = out
        self.on_event = on_event
        self.roster = roster
        self.sign = sign
        self.strategy: Strategy = build_strategy(run.strategy.name, run.strategy.options, run.training)
        if self.strategy.pooled:
            raise ConfigError(
                "[strategy] name = 'central' pools rows, which only `trunkline simulate` can. Choose another strategy."
            )
        if run.cohort.mode == "buffered":
            check_bufferable(self.strategy, run.strategy.name)
        self.named = key is not None
        # sites in this process or on a simulated clock do not come back later, nor does the disk
        self.disk_wait = DiskWait(out, self._note, run.cohort.outage_s if self.transport.durable else 0.0)
        self.persistence = RunPersistence(out, run, key, self.disk_wait, self._note)
        self.journal = UpdateJournal(out, self._note) if transport.journalled else None
        self.records: list[RoundRecord] = []
        self.saved = 0.0  # when the last checkpoint was written

    def execute(self, resume: bool, score: bool) -> dict[str, Any]:
        saved = self.persistence.restore() if resume else None
        if self.transport.durable and not self.named:
            self.persistence.keep_key(new=not resume)
        requests = RequestFactory.of(self.run, self.strategy, self.persistence.key)
        trunk = first_trunk(requests.trunk, self.run.seed) if "trunk" in requests.lend else Arrays()
        self._assemble(requests, trunk, saved)
        first = self.context.cohort.first_arrays(trunk)
        if saved is None:
            state = self.strategy.start(first)
            self._save(state)
        else:
            state = saved.state
        size = sum(array.size for array in state.trunk.values())
        self.on_event(
            RunStarted(
                self.run.name, self.run.strategy.name, self.run.total_rounds, tuple(sorted(self.context.cohort.members)), size,
                resumed_at=saved.state.round if saved else None,
            )
        )  # fmt: skip
        state = self._all_rounds(state, trunk)
        if not score:
            return self._report([], size)
        self.disk_wait(lambda: publish(self.context, self.out, state, self.sign))
        rows = evaluate(self.context, state)
        self.on_event(RunEnded(self.persistence.seconds))
        report = self._report(rows, size)
        if (cohorts := state.notes.get("cohorts")) is not None:
            report["cohorts"] = cohorts  # site -> index of its trunk
        if self.journal is not None:
            self.journal.clear()
        return report

    def _report(self, rows: list[Any], size: int) -> dict[str, Any]:
        return build_report(
            run=self.run, rows=rows, rounds=self.records, trunk_parameters=size, seconds=self.persistence.seconds
        )

    def _assemble(self, requests: RequestFactory, trunk: Arrays, saved: SavedRun | None) -> None:
        """Gather the cohort, and put the parts of the run together."""
        availability = Availability(self.on_event)
        cohort = Cohort(self.transport, self.run.cohort, requests.offer(), trunk, self.on_event, self.roster)
        late = LateReplies(self._note_late)
        self.context = RunContext(
            config=self.run, transport=self.transport, strategy=self.strategy, requests=requests, cohort=cohort,
            availability=availability, late=late, journal=self.journal, on_event=self.on_event, records=self.records,
        )  # fmt: skip
        if saved is not None:
            self.records[:] = saved.records
        if saved is not None and saved.cohort:
            cohort.restore(saved.cohort, saved.arrays)
            cohort.gather_again()
        else:
            cohort.gather()
        buffered = self.run.cohort.mode == "buffered"
        self.rounds: SynchronousRounds | BufferedRounds = (
            BufferedRounds(self.context) if buffered else SynchronousRounds(self.context)
        )
        if saved is not None:
            self.rounds.silent = saved.silent

    def _all_rounds(self, state: StrategyState, trunk: Arrays) -> StrategyState:
        """The state after the last round.

        Args:
            trunk: what the first round of each pass starts from.
        """
        while state.round < self.run.total_rounds:
            try:
                if state.round == self.run.rounds:
                    decide(self.context, state)
                    state = self.strategy.restart(state, self.context.cohort.first_arrays(trunk))
                state = self._round(state)
                self._save(state)
            except StateLost as lost:
                saved = self.persistence.restore()
                assert saved is not None  # one was saved before the first round
                state, self.records[:], self.rounds.silent = saved.state, saved.records, saved.silent
                self._note(f"{lost} Going back to round {state.round}, the last that is on disk.")
        return state

    def _round(self, state: StrategyState) -> StrategyState:
        """The state after one round. Where sites may come back, a round that too few answered is begun again until enough have.

        Raises:
            QuorumError: too few, and no site will come back or `outage_s` is over.
        """
        began, waiting_reported = now(self.transport), False
        while True:
            try:
                after = self.rounds.step(state)
            except QuorumError as error:
                if not self.transport.durable or now(self.transport) - began >= self.run.cohort.outage_s:
                    raise
                if not waiting_reported:
                    waiting_reported = True
                    text = (
                        f"{error.situation} The round is begun again until they are back, for "
                        f"{self.run.cohort.outage_s / 3600:.3g} hours; what was admitted stays."
                    )
                    self.on_event(Waiting(text, state.round + 1))
                pause(self.transport, ROUND_RETRY_S, ROUND_RETRY_S)
            else:
                if after is state:  # all sites that were asked are away after all: again, once one is back
                    continue
                if waiting_reported:
                    self._note(
                        f"Round {after.round}: enough sites are back after {now(self.transport) - began:.0f} s; the run goes on."
                    )
                return after

    def _save(self, state: StrategyState) -> None:
        """A checkpoint; while sites are in memory only now and then, because their vaults must be of the same round."""
        last = state.round % self.run.rounds == 0
        stacks = self.transport.stacks
        holding = stacks is not None and stacks.holding
        if holding and not last and time.monotonic() - self.saved < CHECKPOINT_S:
            return
        flush_stacks(self.transport)
        self.saved = time.monotonic()
        cohort, arrays = self.context.cohort.keep() if self.transport.journalled else ({}, {})
        self.persistence.save(state, self.records, self.rounds.silent, cohort, arrays)

    def _note(self, text: str) -> None:
        self.on_event(Note(text))

    def _note_late(self, node: int, round: int) -> None:
        site = self.context.asked.get(node, f"node {node}")
        text = f"{site}, round {round}: a second answer came, to a question that was asked again. It was not counted."
        self.on_event(LateReply(site, round, text))
