"""Coordinate-wise median (Yin et al. 2018, arXiv:1803.01498): withstands attacks by fewer than half of the sites."""

from collections.abc import Iterable
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from trunkline.protocol.messages import Update
from trunkline.strategies.strategy import Averaging
from trunkline.strategies.streaming import by_site, with_equal_votes


class Median(Averaging):
    """Every number of the trunk moves by the median of what the sites ask for, each site counting once.

    Claimed weights are ignored: a Byzantine site would claim the largest. An array is voted on by the sites that have it, so a
    head lent by two sites is safe from neither. Honest sites that differ much (other sensors, other labels) pay for the
    protection: the median forgets the minority. Memory grows with the sites.
    """

    robust: ClassVar[bool] = True

    def combine(self, updates: Iterable[Update]) -> Update:
        collected = by_site(updates)
        delta: dict[str, NDArray[np.floating[Any]]] = {}
        for name in sorted({name for update in collected for name in update.delta}):
            votes = np.stack([update.delta[name] for update in collected if name in update.delta])  # (sites, *shape)
            delta[name] = np.median(votes.astype(np.float64), axis=0).astype(votes.dtype)
        return with_equal_votes(collected, delta)
