"""A weighted mean of updates as they arrive, in memory that does not grow with sites."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trunkline.protocol.arrays import Arrays
from trunkline.protocol.messages import Update
from trunkline.strategies.exact_sum import ExactNumber, ExactSum


class Streamed:
    """A weighted mean of Updates in the making: each is added and forgotten, and no order of adding changes a bit."""

    def __init__(self) -> None:
        self.run, self.round = "", 0
        self.total = ExactNumber()
        self.dtypes: dict[str, np.dtype[np.generic]] = {}
        self.sums: dict[str, ExactSum] = {}
        self.weights: dict[str, ExactNumber] = {}
        self.metrics: dict[str, ExactNumber] = {}
        self.metric_weights: dict[str, ExactNumber] = {}

    def add(self, update: Update) -> None:
        self.run, self.round = update.run, update.round
        weight = float(update.weight)
        self.total.add(weight)
        for name, array in update.delta.items():
            self._sum_of(name, array.shape, array.dtype).add(array, weight)
            self.weights.setdefault(name, ExactNumber()).add(weight)
        for name, value in update.metrics.items():
            self.metrics.setdefault(name, ExactNumber()).add(value * weight)
            self.metric_weights.setdefault(name, ExactNumber()).add(weight)

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
        total = ExactNumber()
        for weight in weights.tolist():
            total.add(weight)
        self.total.merge(total)
        for name, rows in changes.items():
            self._sum_of(name, rows.shape[1:], rows.dtype).add_rows(rows, weights, largest[name] if largest else None)
            self.weights.setdefault(name, ExactNumber()).merge(total)
        for name in dict.fromkeys(name for site_metrics in metrics for name in site_metrics):
            reported = [
                (site_metrics[name], weight)
                for site_metrics, weight in zip(metrics, weights.tolist(), strict=True)
                if name in site_metrics
            ]
            weighted_sum, weight_sum = ExactNumber(), ExactNumber()
            for value, weight in reported:
                weighted_sum.add(value * weight)
            if len(reported) < len(weights):  # else it is the total
                for _, weight in reported:
                    weight_sum.add(weight)
            self.metrics.setdefault(name, ExactNumber()).merge(weighted_sum)
            self.metric_weights.setdefault(name, ExactNumber()).merge(
                weight_sum if len(reported) < len(weights) else total
            )

    def merge(self, other: "Streamed") -> None:
        """Add what another sum of the same round holds, in the same bits as if its updates had been added here."""
        self.run, self.round = other.run or self.run, other.round or self.round
        self.total.merge(other.total)
        for name, sum_ in other.sums.items():
            self._sum_of(name, sum_.coarse.shape, other.dtypes[name]).merge(sum_)
        for target, source in (
            (self.weights, other.weights), (self.metrics, other.metrics), (self.metric_weights, other.metric_weights),
        ):  # fmt: skip
            for name, total in source.items():
                target.setdefault(name, ExactNumber()).merge(total)

    def _sum_of(self, name: str, shape: tuple[int, ...], dtype: np.dtype[Any]) -> ExactSum:
        if name not in self.sums:
            self.sums[name], self.dtypes[name] = ExactSum(shape), dtype
        return self.sums[name]

    def value(self) -> Update:
        """The mean so far, as `weighted_mean` says."""
        sums, weights = self.sums, self.weights
        metrics, metric_weights = self.metrics, self.metric_weights
        return Update(
            site="",
            run=self.run,
            round=self.round,
            # sorted: which site answered first must not decide the order of the names
            delta=Arrays({name: sums[name].over(weights[name].value(), self.dtypes[name]) for name in sorted(sums)}),
            weight=self.total.value(),
            metrics={name: metrics[name].value() / metric_weights[name].value() for name in sorted(metrics)},
            weights={name: weights[name].value() for name in sorted(sums)},
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

    Only rules that compare sites with each other need this. Memory grows with the sites: one trunk each, in copies,
    because what arrives may be a view of what a transport has little room for.
    """
    kept = [
        replace(update, delta=Arrays({name: array.copy() for name, array in update.delta.items()}))
        for update in updates
    ]
    return sorted(kept, key=lambda update: update.site)


def with_equal_votes(updates: Sequence[Update], delta: Mapping[str, NDArray[np.floating[Any]]]) -> Update:
    """`delta` as the result of one vote a site; metrics are plain means.

    A site reports itself how many rows are behind its update, so a rule against Byzantine sites must not use that number.
    """
    mean = weighted_mean(replace(update, delta=Arrays(), weight=1.0) for update in updates)
    counts = {name: float(sum(name in update.delta for update in updates)) for name in delta}
    return replace(mean, delta=Arrays({name: delta[name] for name in sorted(delta)}), weights=counts)
