"""The requests of a run: who builds them, and the message that carries each to its site."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, TypedDict, TypeVar

from flwr.app import RecordDict

from trunkline.config.run import RunConfig, with_settings
from trunkline.flower.records import to_records
from trunkline.privacy.guards import settings_table
from trunkline.protocol.arrays import Arrays
from trunkline.protocol.messages import (
    AgreedRequest,
    DecideRequest,
    FitQuery,
    OfferRequest,
    ScoreRequest,
    TrainRequest,
)
from trunkline.protocol.plan import About, LocalBaseline, LocalPlan, SelectionSettings, TrunkSpec
from trunkline.server.membership.audit_log import operator
from trunkline.server.rounds.cohort import Member
from trunkline.strategies import Strategy

Agreed = TypeVar("Agreed", bound=AgreedRequest)


class _Terms(TypedDict):
    run: str
    seed: int
    rounds: int
    trunk: TrunkSpec
    plan: LocalPlan
    lend: tuple[str, ...]
    weight_cap: int
    baseline: bool
    local_baseline: LocalBaseline | None
    about: About
    selection: SelectionSettings


@dataclass(frozen=True)
class RequestFactory:
    """Builds every request of one run, so that all of them repeat the same terms.

    Args:
        key: names the run in the vaults of the sites.
        about: the run and its operator, in words that a plant reads.
        trunk, lend: as the strategy has them for this run.
    """

    run: RunConfig
    strategy: Strategy
    key: str
    about: About
    trunk: TrunkSpec
    lend: tuple[str, ...]

    @classmethod
    def of(cls, run: RunConfig, strategy: Strategy, key: str) -> "RequestFactory":
        lend = strategy.lends(run.lend)
        if lend and "scaler" in run.lend and "scaler" not in lend:  # no part of the model: not the strategy's to choose
            lend = (*lend, "scaler")
        about = About(
            operator=run.operator or operator(), name=run.name, strategy=run.strategy.name, rounds=run.total_rounds,
            guards=settings_table(run.guards),
        )  # fmt: skip
        return cls(run, strategy, key, about, strategy.trunk(run.trunk), lend)

    def offer(self) -> OfferRequest:
        return OfferRequest(**self._terms())

    def train(self, round: int) -> TrainRequest:
        return TrainRequest(**self._terms(), round=round, passed=self._passed(round))

    def fit(self, round: int) -> FitQuery:
        """How well arrays fit the sites as they would enter `round`."""
        return FitQuery(**self._terms(), round=round, passed=self._passed(round))

    def decide(self) -> DecideRequest:
        """After the first pass of a run that refits."""
        return DecideRequest(**self._terms(), round=self.run.rounds + 1)

    def score(self) -> ScoreRequest:
        round = self.run.total_rounds + 1
        return ScoreRequest(**self._terms(), round=round, passed=self._passed(round))

    def _terms(self) -> _Terms:
        run = self.run
        return _Terms(
            run=self.key, seed=run.seed, rounds=run.rounds, trunk=self.trunk, plan=self.strategy.plan, lend=self.lend,
            weight_cap=run.cohort.weight_cap, baseline=run.report.baseline and bool(self.lend),
            local_baseline=self._local_baseline(), about=self.about, selection=run.selection,
        )  # fmt: skip

    def _local_baseline(self) -> LocalBaseline | None:
        if not self.run.report.local:
            return None
        settings = with_settings(self.run, self.run.report.local, "[report] local")
        return LocalBaseline(trunk=self.strategy.trunk(settings.trunk), plan=settings.training)

    def _passed(self, round: int) -> int:
        """Rounds of the passes before the one that `round` belongs to."""
        return self.run.rounds if round > self.run.rounds and self.run.refit else 0


def address(request: Agreed, members: Mapping[int, Member]) -> dict[int, Agreed]:
    """Node -> the request with the digest of its member's contract; members with equal contracts share one object."""
    by_contract: dict[str, Agreed] = {}
    addressed = {}
    for node, member in members.items():
        if member.digest not in by_contract:
            by_contract[member.digest] = request.model_copy(update={"contract": member.digest})
        addressed[node] = by_contract[member.digest]
    return addressed


def contents(
    requests: Mapping[int, AgreedRequest], serve: Callable[[str], Arrays], members: Mapping[int, Member]
) -> dict[int, Callable[[], RecordDict]]:
    """Node -> the maker of its message: the request, and of what it is served the arrays that it lends.

    Args:
        serve: site -> the arrays that it gets.
    """
    last: tuple[Any, Any, RecordDict] | None = None

    def content(node: int) -> RecordDict:
        """The object of the message before, where the site gets the same: nobody changes it."""
        nonlocal last
        member, request = members[node], requests[node]
        served = serve(member.site)
        if last is None or last[0] is not served or last[1] is not request:
            last = served, request, to_records(served.only(member.lends), request.model_dump_json())
        return last[2]

    return {node: partial(content, node) for node in members}
