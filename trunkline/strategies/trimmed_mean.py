"""Coordinate-wise trimmed mean (Yin et al. 2018, arXiv:1803.01498): the extremes on both sides do not count."""

import math
from collections.abc import Iterable
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from trunkline.protocol.messages import Update
from trunkline.strategies.strategy import Averaging
from trunkline.strategies.streaming import by_site, with_equal_votes


class TrimmedMean(Averaging):
    """Every number of the trunk moves by the mean of what is left when the most extreme sites on each side are cut off.

    Closer to the mean than the median is, and safe from as many Byzantine sites as are cut off on one side. Claimed weights are
    ignored: a Byzantine site would claim the largest. An array is voted on by the sites that have it. Memory grows with the sites.

    Args:
        share: of the sites cut off on each side, rounded up, but at least one site (two of an even number) is left.
    """

    robust: ClassVar[bool] = True
    share: float = Field(default=0.25, gt=0.0, lt=0.5)

    def combine(self, updates: Iterable[Update]) -> Update:
        collected = by_site(updates)
        delta: dict[str, NDArray[np.floating[Any]]] = {}
        for name in sorted({name for update in collected for name in update.delta}):
            votes = np.stack([update.delta[name] for update in collected if name in update.delta])  # (sites, *shape)
            cut = min(math.ceil(self.share * len(votes)), (len(votes) - 1) // 2)
            kept = np.sort(votes.astype(np.float64), axis=0)[cut : len(votes) - cut]
            delta[name] = kept.mean(axis=0).astype(votes.dtype)
        return with_equal_votes(collected, delta)
