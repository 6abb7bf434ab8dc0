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


def undisturbed(gramian: Matrix, preference: NDArray[np.float64]) -> NDArray[np.float64]:
    """Weights v of a merge J^T v that goes against none of its rows: J J^T v >= 0.

    Every row is projected onto the cone of directions that go against no row, and the projections are added up as
    `preference` says. The projection of row i is J^T u with the u >= e_i that makes |J^T u| smallest: a least-squares
    problem over non-negative numbers.

    Shape:
        gramian (n, n) = J J^T, preference (n,) -> (n,).
    """
    number = len(gramian)
    scale = float(np.trace(gramian)) / number
    if not scale > 0.0 or not (gramian < 0.0).any():
        return preference  # nothing moves, or nothing conflicts: the weighted mean itself, to the bit
    values, vectors = np.linalg.eigh(gramian / scale)
    root = np.sqrt(np.maximum(values, 0.0))[:, None] * vectors.T  # root^T root = gramian; rank-deficient is fine
    merged = np.zeros(number)
    for place in range(number):
        beyond, _ = nnls(root, -root[:, place], maxiter=100 * number)
        beyond[place] += 1.0
        merged += preference[place] * beyond
    return merged


class ConflictAverse(Averaging):
    """No site's update is worked against: the trunk moves so that its product with each of them is not negative.

    A plain mean lets many alike sites pull the trunk where a few different ones lose. Equal to the weighted mean where no
    two updates point against each other. Conflict is judged over all arrays that every site has, as one vector a site;
    any other array (a head only some lend) is averaged as ever. Not a protection against liars: a liar's direction is
    respected too. Memory grows with the sites.
    """

    def combine(self, updates: Iterable[Update]) -> Update:
        came = by_site(updates)
        mean = weighted_mean(came)
        common = sorted(name for name in mean.delta if all(name in one.delta for one in came))
        if len(came) < 2 or not common:
            return mean
        gramian = np.zeros((len(came), len(came)))
        for place, one in enumerate(came):
            for place_of_other, other in enumerate(came[: place + 1]):
                # summed by numpy, not by a threaded matrix product: its bits would depend on the machine's load
                product = sum(float((one.delta[name].astype(np.float64) * other.delta[name]).sum()) for name in common)
                gramian[place, place_of_other] = gramian[place_of_other, place] = product
        preference = np.array([one.weight for one in came]) / mean.weight
        weights = undisturbed(gramian, preference)
        if weights is preference:
            return mean
        delta: dict[str, NDArray[Any]] = dict(mean.delta)
        for name in common:
            moved = np.zeros(delta[name].shape)
            for weight, one in zip(weights, came, strict=True):
                moved += weight * one.delta[name].astype(np.float64)
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
