"""What the parts of a run share."""

from collections.abc import Callable
from dataclasses import dataclass, field

from trunkline.config.run import CohortConfig, RunConfig
from trunkline.protocol.arrays import Arrays
from trunkline.runtime.events import Note, OnEvent
from trunkline.server.reporting.records import RoundRecord
from trunkline.server.rounds.availability import Availability
from trunkline.server.rounds.cohort import Cohort
from trunkline.server.rounds.messaging import LateReplies, Transport
from trunkline.server.rounds.requests import RequestFactory
from trunkline.server.rounds.update_journal import UpdateJournal
from trunkline.strategies import Strategy

GREET_MOST_S = 10.0  # longest that a round waits for the answer of a site that has just come online

Serve = Callable[[str], Arrays]  # site -> the arrays that the strategy gives it


@dataclass
class RunContext:
    """One run: its settings, its sites, and how to reach them.

    Args:
        journal: of the round in progress; None where no server can be started again in the middle of a round.
        records: of the finished rounds, oldest first.
        asked: node -> site, of all sites that were ever asked.
    """

    config: RunConfig
    transport: Transport
    strategy: Strategy
    requests: RequestFactory
    cohort: Cohort
    availability: Availability
    late: LateReplies
    journal: UpdateJournal | None
    on_event: OnEvent
    records: list[RoundRecord]
    asked: dict[int, str] = field(default_factory=dict)

    @property
    def settings(self) -> CohortConfig:
        """`[cohort]` of run.toml."""
        return self.config.cohort

    def note(self, text: str) -> None:
        self.on_event(Note(text))

    def greet(self) -> None:
        """Let sites join that have come online since the last look."""
        self.cohort.greet(deadline_s=min(GREET_MOST_S, self.settings.deadline_s))
