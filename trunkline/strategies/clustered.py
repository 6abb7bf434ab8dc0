"""Clustered federated learning: several trunks, each for the sites whose updates point the same way.

After Sattler et al. 2021, arXiv:1910.01991 (cosines of the sites' updates decide which belong together), and, where sites may
move later, Ghosh et al. 2020, arXiv:2006.04088 (IFCA: a site belongs where its loss is lowest).
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, ValidationInfo, field_validator
from scipy.cluster.hierarchy import fcluster, linkage

from trunkline.protocol.arrays import Arrays, seed_of
from trunkline.protocol.messages import Update
from trunkline.strategies.strategy import Averaging, StrategyState, unchanged
from trunkline.strategies.streaming import Streamed, weighted_mean

TRUNK = "cohort-"  # and the number: a cluster's trunk among the moments. Checkpoints and reports hold this word
SKETCH = 1024  # numbers an update is folded to for comparison; a cosine is then right to about 1/32

Vector = NDArray[np.float64]


def sketch(delta: Arrays) -> Vector:
    """An update folded to `SKETCH` numbers that keeps inner products (count sketch; Charikar et al. 2002, ICALP).

    Each number of the update is added with a random sign to a random bin; both come from the array's name, so that all
    sites are folded alike. It takes a site's part in memory from a trunk to 8 kB.

    Returns:
        (SKETCH,) float64.
    """
    folded = np.zeros(SKETCH)
    for name, array in delta.items():
        draw = np.random.default_rng(seed_of("sketch", name))
        bins = draw.integers(0, SKETCH, array.size)
        sign = draw.integers(0, 2, array.size) * 2.0 - 1.0
        folded += np.bincount(bins, weights=sign * array.ravel().astype(np.float64), minlength=SKETCH)
    return folded


def cluster_sketches(sketches: NDArray[np.float64], count: int) -> NDArray[np.int64]:
    """Cluster of each row, 0 .. count - 1 in order of first appearance: average linkage on one minus the cosine.

    Shape:
        (sites, k) -> (sites,).
    """
    if len(sketches) <= count or count == 1:
        return np.arange(len(sketches)) if count > 1 else np.zeros(len(sketches), np.int64)
    directions = _unit(sketches)
    distance = 1.0 - directions @ directions.T
    clusters = fcluster(linkage(distance[np.triu_indices(len(directions), 1)], "average"), count, "maxclust")
    _, first, member = np.unique(clusters, return_index=True, return_inverse=True)
    ranked: NDArray[np.int64] = np.argsort(np.argsort(first))[member]
    return ranked


def _unit(rows: NDArray[np.float64]) -> NDArray[np.float64]:
    length = np.linalg.norm(rows, axis=-1, keepdims=True)
    return np.asarray(np.divide(rows, length, out=np.zeros_like(rows), where=length > 0.0), dtype=np.float64)


class Clustered(Averaging):
    """One common trunk for `warm_rounds`, then `count` trunks, each averaged over the sites of its cluster.

    A site that joins (or first answers) after the split gets the common trunk as it was then. Its first update is compared
    with those of the clusters' sites, decides its cluster, and is not averaged.

    With `assign = "similarity"` a site then stays. With "validation" every site is asked, every `every` rounds after the
    split, for its validation loss with each cluster's trunk, and moves to the lowest. A tie, or an answer that is missing
    for one of the trunks, leaves it where it is. Its stem and heads are those it trained with its own cluster, so it
    moves only where another trunk fits better even under them; lent heads come with each trunk. A cluster that all its
    sites have left keeps its trunk, and sites are asked about it again. Each time costs a site `count` trunks down and one
    pass over its validation rows with each.

    `StrategyState.notes["cohorts"]` holds the cluster of each site. `StrategyState.trunk` is then the mean of the clusters'
    trunks by their weight, the best single guess for a plant that is in none. Memory grows with the clusters, and by 8 kB
    a site.

    A site unlike all others gets a cluster of its own, which is local training: no harm, and no gain.

    Args:
        count: trunks.
        warm_rounds: rounds of one common trunk whose updates are compared.
        assign: what decides after the split.
        every: rounds between two queries, with "validation" only.
    """

    count: int = Field(default=2, ge=1, le=100)
    warm_rounds: int = Field(default=3, ge=1)
    assign: Literal["similarity", "validation"] = "similarity"
    every: int = Field(default=5, ge=1)

    @field_validator("every")
    @classmethod
    def _of_validation(cls, every: int, info: ValidationInfo) -> int:
        if info.data.get("assign") == "similarity":
            raise ValueError("only `assign = 'validation'` asks sites again; set that, or leave `every` out")
        return every

    def restart(self, state: StrategyState, trunk: Arrays) -> StrategyState:
        """The clusters as they are, each with the first trunk; no site is asked any more which trunk fits its validation rows."""
        if "cohorts" not in state.notes:
            return super().restart(state, trunk)
        trunks = {name: trunk for name in state.moments if name == "common" or name.startswith(TRUNK)}
        moments = {"sketches": state.moments["sketches"], **trunks}
        return StrategyState(trunk, moments, state.round, {**state.notes, "settled": True})

    def serve(self, state: StrategyState, site: str) -> Arrays:
        if "cohorts" not in state.notes:
            return state.trunk
        cluster = state.notes["cohorts"].get(site)
        return state.moments["common" if cluster is None else f"{TRUNK}{cluster}"]

    def advance(
        self, state: StrategyState, updates: Iterable[Update], finish: Callable[[Update], Update] = unchanged
    ) -> tuple[StrategyState, Update]:
        advance = self._advance_clusters if "cohorts" in state.notes else self._advance_common
        return advance(state, updates, finish)

    def _advance_common(
        self, state: StrategyState, updates: Iterable[Update], finish: Callable[[Update], Update]
    ) -> tuple[StrategyState, Update]:
        """A round of the common trunk; the last of them ends with the split."""
        sketches = dict(state.moments.get("sketches", {}))

        def add_sketches() -> Iterator[Update]:
            for update in updates:
                sketches[update.site] = sketches.get(update.site, np.zeros(SKETCH)) + sketch(update.delta)
                yield update

        mean = finish(weighted_mean(add_sketches()))
        after = self.step(state, mean)
        seen = Arrays({site: sketches[site] for site in sorted(sketches)})
        after = replace(after, moments={"sketches": seen})
        if after.round < self.warm_rounds or not seen:
            return after, mean
        member = cluster_sketches(np.stack(list(seen.values())), self.count)
        trunks = {f"{TRUNK}{cluster}": after.trunk for cluster in sorted(set(member.tolist()))}
        notes = {"cohorts": dict(zip(seen, member.tolist(), strict=True))}
        return replace(after, moments={"sketches": seen, "common": after.trunk, **trunks}, notes=notes), mean

    def _advance_clusters(
        self, state: StrategyState, updates: Iterable[Update], finish: Callable[[Update], Update]
    ) -> tuple[StrategyState, Update]:
        """A round of the clusters, each its own exact mean, all of them streamed at once."""
        assigned: dict[str, int] = dict(state.notes["cohorts"])
        sums: dict[int, Streamed] = {}
        total, late = Streamed(), Streamed()
        for update in updates:
            cluster = assigned.get(update.site)
            if cluster is None:
                assigned[update.site] = self._nearest(state, update)
                late.add(replace(update, delta=Arrays()))
            else:
                sums.setdefault(cluster, Streamed()).add(update)
            total.add(replace(update, delta=Arrays()))
        moments = dict(state.moments)
        means: list[tuple[float, Arrays]] = []
        for cluster, streamed in sorted(sums.items()):
            mean = finish(streamed.value())
            moved = self.step(replace(state, trunk=moments[f"{TRUNK}{cluster}"]), mean).trunk
            moments[f"{TRUNK}{cluster}"] = moved
            means.append((mean.weight, moved))
        notes = {**state.notes, "cohorts": {site: assigned[site] for site in sorted(assigned)}}
        after = replace(state, trunk=_mean(means) or state.trunk, moments=moments, notes=notes, round=state.round + 1)
        return after, total.value()

    def fit_queries(self, state: StrategyState) -> dict[str, Arrays]:
        since = state.round - self.warm_rounds
        if self.assign == "similarity" or since <= 0 or since % self.every or state.notes.get("settled"):
            return {}
        trunks = {name: arrays for name, arrays in state.moments.items() if name.startswith(TRUNK)}
        return trunks if len(trunks) > 1 else {}

    def reassign(self, state: StrategyState, fits: Mapping[str, Mapping[str, float]]) -> StrategyState:
        assigned: dict[str, int] = dict(state.notes["cohorts"])
        for site, fit in fits.items():
            if site in assigned and min(fit.values()) < fit[f"{TRUNK}{assigned[site]}"]:
                assigned[site] = int(min(fit, key=lambda name: fit[name]).removeprefix(TRUNK))
        return replace(state, notes={**state.notes, "cohorts": assigned})

    def _nearest(self, state: StrategyState, update: Update) -> int:
        """The cluster whose sites' updates the late one is most like; a tie goes to the first."""
        seen, assigned = state.moments["sketches"], state.notes["cohorts"]
        rows = np.stack([seen[site] for site in seen])
        direction = _unit(sketch(update.delta))
        clusters = sorted({assigned[site] for site in seen})
        member = np.array([assigned[site] for site in seen])
        middles = [_unit(rows[member == cluster]).mean(axis=0) for cluster in clusters]
        return int(clusters[int(np.argmax([float((direction * middle).sum()) for middle in middles]))])


def _mean(trunks: list[tuple[float, Arrays]]) -> Arrays | None:
    if not trunks:
        return None
    total = sum(weight for weight, _ in trunks)
    mean: dict[str, NDArray[Any]] = {}
    for name, array in trunks[0][1].items():
        summed = np.zeros(array.shape)
        for weight, trunk in trunks:
            summed += weight / total * trunk[name].astype(np.float64)
        mean[name] = summed.astype(array.dtype)
    return Arrays(mean)
