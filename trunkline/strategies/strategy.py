"""What an algorithm is: a plan for the sites, a way to combine their updates, and a step of the shared arrays."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Protocol

import numpy as np
from numpy.typing import NDArray

from trunkline.errors import ContractError
from trunkline.exchange import Arrays, Frozen, LocalPlan, TrunkSpec, Update


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

    def probes(self, state: State) -> dict[str, Arrays]:
        """Lent arrays whose fit every site is to be asked for after this round, by a name each; none: nobody is asked."""
        ...

    def judge(self, state: State, fits: Mapping[str, Mapping[str, float]]) -> State:
        """The state once the sites have answered `probes`: site -> name -> validation loss.

        Only sites that answered for every name are in it.
        """
        ...


AT_ONCE = 1 << 16  # numbers that are split at a time: half a megabyte, which a core's own cache holds


class ExactSum:
    """A sum of arrays that does not depend on the order of its terms, in memory that does not grow with them.

    Each term is split into an integer part in units of 2^-10 and a remainder in units of 2^-62, both int64; integers
    add without rounding, so any order (and any grouping) gives the same bits. The idea is that of reproducible
    summation in fixed bins (Demmel and Nguyen 2015, doi:10.1109/TC.2014.2345391); two bins do here because admitted
    updates are bounded.

    Raises:
        ContractError: a term is not finite, or the largest numbers of all terms together reach 2^52, near which the
            integer part could overflow; what intake admits stays below it up to some 4 million sites at their bounds.
    """

    COARSE = 10
    FINE = 52
    CARRY_EVERY = 1024  # terms: each adds at most 2^51 to `fine`, which holds 2^63

    def __init__(self, shape: tuple[int, ...]) -> None:
        self.coarse: NDArray[np.int64] = np.zeros(shape, np.int64)
        self.fine: NDArray[np.int64] = np.zeros(shape, np.int64)
        self._since = 0
        self._reach = 0.0  # no number of the sum is beyond it

    def add(self, term: NDArray[np.float64]) -> None:
        self._reaches(float(max(term.max(), -term.min())) if term.size else 0.0)
        # asarray: a number without dimensions would come back as a scalar, which nothing can be written into
        rest = np.asarray(np.multiply(term, 2.0**self.COARSE))
        whole = np.asarray(np.rint(rest))
        np.subtract(rest, whole, out=rest)  # exact: the two are within a factor of two, or `whole` is 0
        self.coarse += whole.astype(np.int64)
        np.multiply(rest, 2.0**self.FINE, out=rest)
        np.rint(rest, out=rest)
        self.fine += rest.astype(np.int64)
        self._since += 1
        if self._since == self.CARRY_EVERY:
            self._carry()

    def add_rows(
        self, rows: NDArray[np.float32], weights: NDArray[np.float64], largest: NDArray[np.float32] | None = None
    ) -> None:
        """Add each of `rows` times its weight: the same bits as one `add` a row.

        Shape:
            (n, ...) and (n,); `largest`, where it is known already, (n,) as `largest_of` gives it.
        """
        flat = rows.reshape(len(rows), -1)
        terms = (largest_of(rows) if largest is None else largest).astype(np.float64) * weights
        self._reaches(float(terms.sum()))
        few = min(self.CARRY_EVERY, max(1, AT_ONCE // max(flat.shape[1], 1)))
        at_most = float(terms.max(initial=0.0))
        small = at_most < 0.5  # so that several rows fit into the fine part, and nothing has to be split
        step = max(1, min(few, int(1.9 / at_most))) if small and at_most > 0.0 else few
        for start in range(0, len(flat), step):
            some = slice(start, start + step)
            if small:
                self._add_small(flat[some], weights[some])
            else:
                self._add_rows(flat[some], weights[some])

    def _add_small(self, rows: NDArray[np.float32], weights: NDArray[np.float64]) -> None:
        """Rows whose largest terms come to less than 1.9 together: an int64 holds 2.0 in fine units, and 2^-10 of it are taken."""
        fine = np.multiply(rows, (weights * 2.0 ** (self.COARSE + self.FINE))[:, None], dtype=np.float64)
        np.rint(fine, out=fine)
        if self._since:
            self._carry()
        self.fine += fine.astype(np.int64).sum(axis=0).reshape(self.fine.shape)
        self._carry()

    def _add_rows(self, rows: NDArray[np.float32], weights: NDArray[np.float64]) -> None:
        rest = np.multiply(rows, (weights * 2.0**self.COARSE)[:, None], dtype=np.float64)
        whole = np.rint(rest)
        np.subtract(rest, whole, out=rest)
        # whole numbers below 2^53 add exactly in float64, which is quicker than to make integers of each
        exact = self._reach * 2.0**self.COARSE < 2.0**53
        coarse = whole.sum(axis=0).astype(np.int64) if exact else whole.astype(np.int64).sum(axis=0)
        np.multiply(rest, 2.0**self.FINE, out=rest)
        np.rint(rest, out=rest)
        self._since += len(rows)
        if self._since >= self.CARRY_EVERY:
            self._carry()
        self.coarse += coarse.reshape(self.coarse.shape)
        self.fine += rest.astype(np.int64).sum(axis=0).reshape(self.fine.shape)

    def add_all(self, terms: NDArray[np.float64]) -> None:
        """Add each of (n,) terms to a sum of one number: the same bits as one `add` a term."""
        self._reaches(float(np.abs(terms).sum()))
        rest = terms * 2.0**self.COARSE
        whole = np.rint(rest)
        self._carry()
        self.coarse += whole.astype(np.int64).sum()
        self.fine += np.rint((rest - whole) * 2.0**self.FINE).astype(np.int64).sum()
        self._carry()

    def merge(self, other: "ExactSum") -> None:
        """Add what another sum holds: the same bits as if its terms had been added here."""
        self._reaches(other._reach)
        self._carry()
        carry = other.fine >> self.FINE  # what came from another process may be read-only
        self.coarse += other.coarse + carry
        self.fine += other.fine - (carry << self.FINE)
        self._carry()

    def _reaches(self, largest: float) -> None:
        if not self._reach + largest < 2.0**52:  # also for NaN, which both ends of an array that holds it are
            raise ContractError("a term of the sum is not finite, or the terms together are beyond 2^52")
        self._reach += largest

    def _carry(self) -> None:
        """Bring `fine` into [0, 2^52): one bit pattern for one value, however it was reached."""
        carry = self.fine >> self.FINE
        self.fine -= carry << self.FINE
        self.coarse += carry
        self._since = 0

    def value(self) -> NDArray[np.float64]:
        self._carry()
        return np.asarray((self.coarse + self.fine * 2.0**-self.FINE) * 2.0**-self.COARSE, dtype=np.float64)


def largest_of(rows: NDArray[np.float32]) -> NDArray[np.float32]:
    """(n, ...) -> (n,) the largest number of each, without its sign; NaN where one is NaN."""
    flat = rows.reshape(len(rows), -1)
    found: NDArray[np.float32] = np.maximum(flat.max(axis=1, initial=0.0), -flat.min(axis=1, initial=0.0))
    return found


class Streamed:
    """A weighted mean of Updates in the making: each is added and forgotten, and no order of adding changes a bit."""

    def __init__(self) -> None:
        self.run, self.round = "", 0
        self.total = ExactSum(())
        self.dtypes: dict[str, np.dtype[np.generic]] = {}
        self.sums: dict[str, ExactSum] = {}
        self.weights: dict[str, ExactSum] = {}
        self.metrics: dict[str, ExactSum] = {}
        self.metric_weights: dict[str, ExactSum] = {}

    def add(self, update: Update) -> None:
        self.run, self.round = update.run, update.round
        weight = np.float64(update.weight)
        self.total.add(np.asarray(weight))
        for name, array in update.delta.items():
            self.dtypes.setdefault(name, array.dtype)
            self.sums.setdefault(name, ExactSum(array.shape)).add(array.astype(np.float64) * weight)
            self.weights.setdefault(name, ExactSum(())).add(np.asarray(weight))
        for name, number in update.metrics.items():
            self.metrics.setdefault(name, ExactSum(())).add(np.asarray(np.float64(number) * weight))
            self.metric_weights.setdefault(name, ExactSum(())).add(np.asarray(weight))

    def add_stack(
        self, run: str, round: int, changes: Mapping[str, NDArray[np.float32]], weights: NDArray[np.float64],
        metrics: Sequence[Mapping[str, float]], largest: Mapping[str, NDArray[np.float32]] | None = None,
    ) -> None:  # fmt: skip
        """Add many sites at once, in the same bits as one by one.

        Args:
            changes: lent name -> (sites, ...); weights: (sites,); metrics: of each site.
            largest: lent name -> (sites,) as `largest_of` gives it, where that is known.
        """
        self.run, self.round = run, round
        one = np.ones((len(weights), 1), np.float32)
        total = ExactSum(())
        total.add_rows(one, weights)
        self.total.merge(total)
        for name, rows in changes.items():
            self.dtypes.setdefault(name, rows.dtype)
            self.sums.setdefault(name, ExactSum(rows.shape[1:])).add_rows(
                rows, weights, largest[name] if largest else None
            )
            self.weights.setdefault(name, ExactSum(())).merge(total)
        for name in sorted({name for told in metrics for name in told}):
            there = [place for place, told in enumerate(metrics) if name in told]
            numbers = np.array([metrics[place][name] for place in there])
            behind = weights[there]
            self.metrics.setdefault(name, ExactSum(())).add_all(numbers * behind)
            self.metric_weights.setdefault(name, ExactSum(())).add_all(behind)

    def merge(self, other: "Streamed") -> None:
        """Add what another sum of the same round holds, in the same bits as if its updates had been added here."""
        self.run, self.round = other.run or self.run, other.round or self.round
        self.total.merge(other.total)
        for name, dtype in other.dtypes.items():
            self.dtypes.setdefault(name, dtype)
        for mine, theirs in (
            (self.sums, other.sums), (self.weights, other.weights), (self.metrics, other.metrics),
            (self.metric_weights, other.metric_weights),
        ):  # fmt: skip
            for name, total in theirs.items():
                mine.setdefault(name, ExactSum(total.coarse.shape)).merge(total)

    def value(self) -> Update:
        """The mean so far, as `weighted_mean` says."""
        sums, weights = self.sums, self.weights
        metrics, metric_weights = self.metrics, self.metric_weights
        return Update(
            site="",
            run=self.run,
            round=self.round,
            # sorted: which site answered first must not decide the order of the names
            delta=Arrays(
                {name: (sums[name].value() / weights[name].value()).astype(self.dtypes[name]) for name in sorted(sums)}
            ),
            weight=float(self.total.value()),
            metrics={name: float(metrics[name].value() / metric_weights[name].value()) for name in sorted(metrics)},
            weights={name: float(weights[name].value()) for name in sorted(sums)},
        )


def weighted_mean(updates: "Iterable[Update | Streamed]") -> Update:
    """The mean of `updates` by weight, each array over the sites that have it; streams, and is exact in any order.

    Args:
        updates: single ones, and sums of several that were made elsewhere.

    Returns:
        An Update whose `weight` is the total and whose `weights` holds the total behind each array. No update at all
        gives no arrays and weight 0.
    """
    streamed = Streamed()
    for update in updates:
        if isinstance(update, Streamed):
            streamed.merge(update)
        else:
            streamed.add(update)
        del update  # or the loop would hold one update more than it works on
    return streamed.value()


def by_site(updates: Iterable[Update]) -> list[Update]:
    """All updates of a round at once, by name of site, so that the order of arrival decides nothing.

    Only rules that compare sites with each other need this. Memory grows with the sites: one trunk each.
    """
    return sorted(updates, key=lambda one: one.site)


def on_equal_terms(updates: Sequence[Update], delta: Mapping[str, NDArray[np.floating[Any]]]) -> Update:
    """`delta` as what one vote a site came to; metrics are plain means.

    A site says itself how many rows stand behind its update, so a rule against liars must not ask it.
    """
    mean = weighted_mean(replace(one, delta=Arrays(), weight=1.0) for one in updates)
    have = {name: float(sum(name in one.delta for one in updates)) for name in delta}
    return replace(mean, delta=Arrays({name: delta[name] for name in sorted(delta)}), weights=have)


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

    def probes(self, state: State) -> dict[str, Arrays]:
        return {}

    def judge(self, state: State, fits: Mapping[str, Mapping[str, float]]) -> State:
        return state
