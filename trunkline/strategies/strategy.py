"""What a strategy is: a state, and how a round's updates change it."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Protocol, runtime_checkable

from trunkline.protocol.arrays import Arrays
from trunkline.protocol.frozen import Frozen
from trunkline.protocol.messages import Update
from trunkline.protocol.plan import LocalPlan, TrunkSpec
from trunkline.strategies.streaming import weighted_mean


@dataclass(frozen=True)
class StrategyState:
    """The server's whole memory between rounds; a checkpoint is exactly this.

    Args:
        trunk: the lent arrays, as the sites get them next (unless the strategy serves sites differently).
        moments: what an algorithm remembers as arrays, name -> arrays (empty for a plain mean).
        round: rounds already stepped.
        notes: what it remembers otherwise, ready for JSON, such as which site is in which cluster.
    """

    trunk: Arrays
    moments: dict[str, Arrays] = field(default_factory=dict)
    round: int = 0
    notes: dict[str, Any] = field(default_factory=dict)


def unchanged(mean: Update) -> Update:
    return mean


class Strategy(Protocol):
    """An algorithm; its file in this folder acts at both ends without importing either.

    What it changes of a run is said before the first round by `pooled`, `summable`, `plan`, `lends` and `trunk`; what
    happens in a run is `start`, then `serve` and `advance` in every round, and `restart` before a second pass.
    """

    pooled: ClassVar[bool]

    @property
    def plan(self) -> LocalPlan:
        """The work that each site is asked to do."""
        ...

    @property
    def summable(self) -> bool:
        """Whether sums of updates do as well as single ones: none is looked at alone, and all sites get the same trunk."""
        ...

    def lends(self, named: tuple[str, ...]) -> tuple[str, ...]:
        """The parts that travel, given what run.toml names."""
        ...

    def trunk(self, spec: TrunkSpec) -> TrunkSpec:
        """The trunk that sites and server build, given `[trunk]` of run.toml."""
        ...

    def start(self, trunk: Arrays) -> StrategyState:
        """The state before the first round."""
        ...

    def restart(self, state: StrategyState, trunk: Arrays) -> StrategyState:
        """The state before a second pass: as `start`, rounds counted on. Decisions by validation rows stay as they are."""
        ...

    def serve(self, state: StrategyState, site: str) -> Arrays:
        """The lent arrays this site gets next; its update is the change to exactly these."""
        ...

    def advance(
        self, state: StrategyState, updates: Iterable[Update], finish: Callable[[Update], Update] = unchanged
    ) -> tuple[StrategyState, Update]:
        """One round: the state after it, and the combined update (its metrics go into the progress line).

        `finish` is applied to each mean before it moves a trunk; the server hands in the guards of the run.

        Sums of several updates come only to a strategy that is `summable`.
        """
        ...


@runtime_checkable
class FitQuerying(Protocol):
    """A strategy that also asks sites, between two rounds, how well some trunks fit them."""

    def fit_queries(self, state: StrategyState) -> dict[str, Arrays]:
        """Lent arrays whose fit every site is asked for after this round, by a name each; empty: no site is asked."""
        ...

    def reassign(self, state: StrategyState, fits: Mapping[str, Mapping[str, float]]) -> StrategyState:
        """The state once the sites have answered: site -> name -> validation loss.

        Only sites that answered for every name are in it.
        """
        ...


class Averaging(Frozen):
    """The common case: one weighted mean a round, added to the trunk. Its subclasses change one thing each.

    `combine` makes one update of a round's updates, `step` moves the trunk by it.
    """

    training: LocalPlan
    pooled: ClassVar[bool] = False
    robust: ClassVar[bool] = False  # whether one Byzantine site moves the trunk by no more than honest ones differ

    @property
    def plan(self) -> LocalPlan:
        return self.training

    @property
    def summable(self) -> bool:
        return all(getattr(type(self), name) is getattr(Averaging, name) for name in ("combine", "advance", "serve"))

    def lends(self, named: tuple[str, ...]) -> tuple[str, ...]:
        return named

    def trunk(self, spec: TrunkSpec) -> TrunkSpec:
        return spec

    def start(self, trunk: Arrays) -> StrategyState:
        return StrategyState(trunk)

    def restart(self, state: StrategyState, trunk: Arrays) -> StrategyState:
        return replace(self.start(trunk), round=state.round)

    def serve(self, state: StrategyState, site: str) -> Arrays:
        return state.trunk

    def combine(self, updates: Iterable[Update]) -> Update:
        return weighted_mean(updates)

    def step(self, state: StrategyState, mean: Update) -> StrategyState:
        moved = {name: array + mean.delta[name] if name in mean.delta else array for name, array in state.trunk.items()}
        return replace(state, trunk=Arrays(moved), round=state.round + 1)

    def advance(
        self, state: StrategyState, updates: Iterable[Update], finish: Callable[[Update], Update] = unchanged
    ) -> tuple[StrategyState, Update]:
        mean = finish(self.combine(updates))
        return self.step(state, mean), mean
