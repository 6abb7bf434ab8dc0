"""What a strategy is: a state, and how a round's updates change it."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Protocol

from trunkline.protocol.arrays import Arrays
from trunkline.protocol.frozen import Frozen
from trunkline.protocol.messages import Update
from trunkline.protocol.plan import LocalPlan, TrunkSpec
from trunkline.strategies.streaming import weighted_mean


@dataclass(frozen=True)
class State:
    """The server's whole memory between rounds; a checkpoint is exactly this.

    Args:
        trunk: the lent arrays, as the sites get them next (unless the strategy serves sites differently).
        moments: what an algorithm remembers as arrays, name -> arrays (empty for a plain mean).
        round: rounds already stepped.
        notes: what it remembers otherwise, ready for JSON, such as which site is in which cohort.
    """

    trunk: Arrays
    moments: dict[str, Arrays] = field(default_factory=dict)
    round: int = 0
    notes: dict[str, Any] = field(default_factory=dict)


class Strategy(Protocol):
    """An algorithm; its file in this folder acts at both ends without importing either."""

    pooled: ClassVar[bool]

    @property
    def plan(self) -> LocalPlan:
        """What each site is asked to do."""
        ...

    @property
    def summable(self) -> bool:
        """Whether sums of updates do as well as single ones: none is looked at alone, and all sites get the same trunk."""
        ...

    def lends(self, named: tuple[str, ...]) -> tuple[str, ...]:
        """The parts that travel, given what run.toml names."""
        ...

    def trunk(self, spec: TrunkSpec) -> TrunkSpec:
        """The trunk that sites and centre build, given `[trunk]` of run.toml."""
        ...

    def start(self, trunk: Arrays) -> State: ...

    def again(self, state: State, trunk: Arrays) -> State:
        """Where a second pass starts from: as `start`, rounds counted on. What was decided by validation rows stays decided."""
        ...

    def serve(self, state: State, site: str) -> Arrays:
        """The lent arrays this site gets next; its update is the change to exactly these."""
        ...

    def combine(self, updates: Iterable[Update]) -> Update: ...

    def step(self, state: State, mean: Update) -> State: ...

    def advance(self, state: State, updates: Iterable[Update]) -> tuple[State, Update]:
        """One round: the state after it, and what was combined (its metrics go into the progress line).

        Sums of several updates come only to a strategy that is `summable`.
        """
        ...

    def fit_queries(self, state: State) -> dict[str, Arrays]:
        """Lent arrays whose fit every site is to be asked for after this round, by a name each; none: nobody is asked."""
        ...

    def judge(self, state: State, fits: Mapping[str, Mapping[str, float]]) -> State:
        """The state once the sites have answered the `fit_queries`: site -> name -> validation loss.

        Only sites that answered for every name are in it.
        """
        ...


class Averaging(Frozen):
    """The common case: one weighted mean a round, added to the trunk. Its subclasses change one thing each."""

    training: LocalPlan
    pooled: ClassVar[bool] = False
    robust: ClassVar[bool] = (
        False  # whether one liar among the sites moves the trunk by no more than honest ones differ
    )

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

    def start(self, trunk: Arrays) -> State:
        return State(trunk)

    def again(self, state: State, trunk: Arrays) -> State:
        return replace(self.start(trunk), round=state.round)

    def serve(self, state: State, site: str) -> Arrays:
        return state.trunk

    def combine(self, updates: Iterable[Update]) -> Update:
        return weighted_mean(updates)

    def step(self, state: State, mean: Update) -> State:
        moved = {name: array + mean.delta[name] if name in mean.delta else array for name, array in state.trunk.items()}
        return replace(state, trunk=Arrays(moved), round=state.round + 1)

    def advance(self, state: State, updates: Iterable[Update]) -> tuple[State, Update]:
        mean = self.combine(updates)
        return self.step(state, mean), mean

    def fit_queries(self, state: State) -> dict[str, Arrays]:
        return {}

    def judge(self, state: State, fits: Mapping[str, Mapping[str, float]]) -> State:
        return state
