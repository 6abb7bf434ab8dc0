"""Cohorts: several trunks, each for sites whose updates point the same way (clustered federated learning).

After Sattler et al. 2021, arXiv:1910.01991 (cosines of the sites' updates tell who belongs together), and, where sites may
move later, Ghosh et al. 2020, arXiv:2006.04088 (IFCA: a site belongs where its loss is lowest).
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, ValidationInfo, field_validator
from scipy.cluster.hierarchy import fcluster, linkage

from trunkline.protocol.arrays import Arrays, seed_of
from trunkline.protocol.messages import Update
from trunkline.strategies.strategy import Averaging, State
from trunkline.strategies.streaming import Streamed, weighted_mean

TRUNK = "cohort-"  # and the number: a cohort's trunk among the moments
SKETCH = 1024  # numbers an update is folded to for comparison; a cosine is then right to about 1/32

Vector = NDArray[np.float64]


def sketch(delta: Arrays) -> Vector:
    """An update folded to `SKETCH` numbers that keeps inner products (count sketch; Charikar et al. 2002, ICALP).

    Each number of the update is added with a random sign to a random place; both come from the array's name, so that all
    sites are folded alike. It takes a site's part in memory from a trunk to 8 kB.
    """
    folded = np.zeros(SKETCH)
    for name, array in delta.items():
        draw = np.random.default_rng(seed_of("sketch", name))
        place = draw.integers(0, SKETCH, array.size)
        sign = draw.integers(0, 2, array.size) * 2.0 - 1.0
        folded += np.bincount(place, weights=sign * array.ravel().astype(np.float64), minlength=SKETCH)
    return folded


def alike(sketches: NDArray[np.float64], count: int) -> NDArray[np.int64]:
    """Cohort of each row, 0 .. count - 1 in order of first appearance: average linkage on one minus the cosine.

    Shape:
        (sites, k) -> (sites,).
    """
    if len(sketches) <= count or count == 1:
        return np.arange(len(sketches)) if count > 1 else np.zeros(len(sketches), np.int64)
    own = _unit(sketches)
    apart = 1.0 - own @ own.T
    found = fcluster(linkage(apart[np.triu_indices(len(own), 1)], "average"), count, "maxclust")
    _, first, member = np.unique(found, return_index=True, return_inverse=True)
    ranked: NDArray[np.int64] = np.argsort(np.argsort(first))[member]
    return ranked


def _unit(rows: NDArray[np.float64]) -> NDArray[np.float64]:
    length = np.linalg.norm(rows, axis=-1, keepdims=True)
    return np.asarray(np.divide(rows, length, out=np.zeros_like(rows), where=length > 0.0), dtype=np.float64)


class Clustered(Averaging):
    """One common trunk for `warm_rounds`, then `count` trunks, each averaged over the sites of its cohort.

    A site that joins (or first answers) after the split gets the common trunk as it was then; its first update is
    compared with those of the cohorts' sites, decides where it belongs, and is not averaged.

    With `assign = "similarity"` a site then stays. With "validation" every site is asked, every `every` rounds after the
    split, for its validation loss with each cohort's trunk, and moves to the lowest. A tie, or an answer that is missing
    for one of the trunks, leaves it where it is. Its stem and heads are those it trained with its own cohort, so it
    moves only where another trunk fits better even under them; lent heads come with each trunk. A cohort that all its
    sites have left keeps its trunk and is asked for again. Each time costs a site `count` trunks down and one pass over its
    validation rows with each.

    `State.notes["cohorts"]` says who is where; `State.trunk` is then the mean of the cohorts' trunks by their weight, the
    best single guess for a plant that is in none. Memory grows with the cohorts, and by 8 kB a site.

    A site unlike all others gets a cohort of its own, which is local training: no harm, and no gain.

    Args:
        count: trunks.
        warm_rounds: rounds of one common trunk whose updates are compared.
        assign: what decides after the split.
        every: rounds between two askings, with "validation" only.
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

    def again(self, state: State, trunk: Arrays) -> State:
        """The cohorts as they are, each with the first trunk; nobody is asked any more what fits its validation rows."""
        if "cohorts" not in state.notes:
            return super().again(state, trunk)
        trunks = {name: trunk for name in state.moments if name == "common" or name.startswith(TRUNK)}
        moments = {"sketches": state.moments["sketches"], **trunks}
        return State(trunk, moments, state.round, {**state.notes, "settled": True})

    def serve(self, state: State, site: str) -> Arrays:
        if "cohorts" not in state.notes:
            return state.trunk
        number = state.notes["cohorts"].get(site)
        return state.moments["common" if number is None else f"{TRUNK}{number}"]

    def advance(self, state: State, updates: Iterable[Update]) -> tuple[State, Update]:
        return self._apart(state, updates) if "cohorts" in state.notes else self._together(state, updates)

    def _together(self, state: State, updates: Iterable[Update]) -> tuple[State, Update]:
        """A round of the common trunk; the last of them ends in cohorts."""
        sketches = dict(state.moments.get("sketches", {}))

        def watched() -> Iterator[Update]:
            for one in updates:
                sketches[one.site] = sketches.get(one.site, np.zeros(SKETCH)) + sketch(one.delta)
                yield one

        mean = weighted_mean(watched())
        after = self.step(state, mean)
        seen = Arrays({site: sketches[site] for site in sorted(sketches)})
        after = replace(after, moments={"sketches": seen})
        if after.round < self.warm_rounds or not seen:
            return after, mean
        member = alike(np.stack(list(seen.values())), self.count)
        trunks = {f"{TRUNK}{number}": after.trunk for number in sorted(set(member.tolist()))}
        notes = {"cohorts": dict(zip(seen, member.tolist(), strict=True))}
        return replace(after, moments={"sketches": seen, "common": after.trunk, **trunks}, notes=notes), mean

    def _apart(self, state: State, updates: Iterable[Update]) -> tuple[State, Update]:
        """A round of cohorts, each its own exact mean, all of them streamed at once."""
        assigned: dict[str, int] = dict(state.notes["cohorts"])
        sums: dict[int, Streamed] = {}
        total, late = Streamed(), Streamed()
        for one in updates:
            number = assigned.get(one.site)
            if number is None:
                assigned[one.site] = self._nearest(state, one)
                late.add(replace(one, delta=Arrays()))
            else:
                sums.setdefault(number, Streamed()).add(one)
            total.add(replace(one, delta=Arrays()))
        moments = dict(state.moments)
        means: list[tuple[float, Arrays]] = []
        for number, streamed in sorted(sums.items()):
            mean = streamed.value()
            moved = self.step(replace(state, trunk=moments[f"{TRUNK}{number}"]), mean).trunk
            moments[f"{TRUNK}{number}"] = moved
            means.append((mean.weight, moved))
        notes = {**state.notes, "cohorts": {site: assigned[site] for site in sorted(assigned)}}
        after = replace(state, trunk=_mean(means) or state.trunk, moments=moments, notes=notes, round=state.round + 1)
        return after, total.value()

    def fit_queries(self, state: State) -> dict[str, Arrays]:
        since = state.round - self.warm_rounds
        if self.assign == "similarity" or since <= 0 or since % self.every or state.notes.get("settled"):
            return {}
        trunks = {name: arrays for name, arrays in state.moments.items() if name.startswith(TRUNK)}
        return trunks if len(trunks) > 1 else {}

    def judge(self, state: State, fits: Mapping[str, Mapping[str, float]]) -> State:
        assigned: dict[str, int] = dict(state.notes["cohorts"])
        for site, fit in fits.items():
            if site in assigned and min(fit.values()) < fit[f"{TRUNK}{assigned[site]}"]:
                assigned[site] = int(min(fit, key=lambda name: fit[name]).removeprefix(TRUNK))
        return replace(state, notes={**state.notes, "cohorts": assigned})

    def _nearest(self, state: State, update: Update) -> int:
        """The cohort whose sites' updates the late one is most like; a tie goes to the first."""
        seen, assigned = state.moments["sketches"], state.notes["cohorts"]
        rows = np.stack([seen[site] for site in seen])
        own = _unit(sketch(update.delta))
        numbers = sorted({assigned[site] for site in seen})
        member = np.array([assigned[site] for site in seen])
        middles = [_unit(rows[member == number]).mean(axis=0) for number in numbers]
        return int(numbers[int(np.argmax([float((own * middle).sum()) for middle in middles]))])


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
