"""Conflict-averse merge: UPGrad over the sites' updates (Quinton and Rey 2024, arXiv:2406.16232)."""

from collections.abc import Iterable
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import nnls

from trunkline.protocol.arrays import Arrays
from trunkline.protocol.messages import Update
from trunkline.strategies.strategy import Averaging
from trunkline.strategies.streaming import by_site, weighted_mean

Matrix = NDArray[np.float64]


def resolve_conflicts(gramian: Matrix, preference: NDArray[np.float64]) -> NDArray[np.float64]:
    """Weights v of a merge J^T v that opposes none of its rows: J J^T v >= 0.

    Every row is projected onto the cone of directions that oppose no row, and the projections are summed with the
    weights `preference`. The projection of row i is J^T u with the u >= e_i that makes |J^T u| smallest: a least-squares
    problem over non-negative numbers.

    Shape:
        gramian (n, n) = J J^T, preference (n,) -> (n,).
    """
    count = len(gramian)
    scale = float(np.trace(gramian)) / count
    if not scale > 0.0 or not (gramian < 0.0).any():
        return preference  # nothing moves, or nothing conflicts: the weighted mean itself, to the bit
    values, vectors = np.linalg.eigh(gramian / scale)
    root = np.sqrt(np.maximum(values, 0.0))[:, None] * vectors.T  # root^T root = gramian; rank-deficient is fine
    merged = np.zeros(count)
    for row in range(count):
        projection, _ = nnls(root, -root[:, row], maxiter=100 * count)
        projection[row] += 1.0
        merged += preference[row] * projection
    return merged


class ConflictAverse(Averaging):
    """The server's step never opposes a site's update: its inner product with each of them is not negative.

    A plain mean lets many similar sites pull the trunk where a few different ones lose. The step equals the weighted mean
    where no two updates conflict. Conflict is measured over all arrays that every site has, as one vector a site; any
    other array (a head that only some lend) is averaged. This does not protect against Byzantine sites: their directions
    are respected too. Memory grows with the sites.
    """

    def combine(self, updates: Iterable[Update]) -> Update:
        collected = by_site(updates)
        mean = weighted_mean(collected)
        common = sorted(name for name in mean.delta if all(name in update.delta for update in collected))
        if len(collected) < 2 or not common:
            return mean
        gramian = np.zeros((len(collected), len(collected)))
        for row, left in enumerate(collected):
            for column, right in enumerate(collected[: row + 1]):
                # summed by numpy, not by a threaded matrix product: its bits would depend on the machine's load
                product = sum(float((left.delta[name].astype(np.float64) * right.delta[name]).sum()) for name in common)
                gramian[row, column] = gramian[column, row] = product
        preference = np.array([update.weight for update in collected]) / mean.weight
        weights = resolve_conflicts(gramian, preference)
        if weights is preference:
            return mean
        delta: dict[str, NDArray[Any]] = dict(mean.delta)
        for name in common:
            moved = np.zeros(delta[name].shape)
            for weight, update in zip(weights, collected, strict=True):
                moved += weight * update.delta[name].astype(np.float64)
            delta[name] = moved.astype(delta[name].dtype)
        return Update(
            site="",
            run=mean.run,
            round=mean.round,
            delta=Arrays(delta),
            weight=mean.weight,
            metrics=mean.metrics,
            weights=mean.weights,
        )
