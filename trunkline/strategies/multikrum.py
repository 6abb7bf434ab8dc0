"""Multi-Krum (Blanchard et al. 2017, arXiv:1703.02757): the mean of the updates that have many others close by."""

from collections.abc import Iterable, Sequence
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from trunkline.errors import QuorumError
from trunkline.protocol.messages import Update
from trunkline.strategies.strategy import Averaging
from trunkline.strategies.streaming import by_site, with_equal_votes


class MultiKrum(Averaging):
    """A site's score is the sum of its squared distances to its n - f - 2 nearest; the m best scores are averaged.

    It judges whole updates where median and trimmed mean judge single numbers. Many dimensions help a careful attacker
    (El Mhamdi et al. 2018, arXiv:1802.07927): small changes everywhere, or a large one in a single number, stay within
    honest distances. Claimed weights are ignored: a Byzantine site would claim the largest. Memory grows with the sites.

    Distances are taken over the arrays that all sites have. Any other array (a head only some lend) is averaged over
    the chosen sites that have it, and stays as it was where none of them has.

    Args:
        f: Byzantine sites to withstand; needs 2 f + 3 sites. None: as many as the sites of the round allow.
        m: updates to average, at most n - f - 2 (with more, a Byzantine one may be among them by number alone). None: that many.
    """

    robust: ClassVar[bool] = True
    f: int | None = Field(default=None, ge=0)
    m: int | None = Field(default=None, ge=1)

    def combine(self, updates: Iterable[Update]) -> Update:
        collected = by_site(updates)
        chosen = [collected[index] for index in self._choose(collected)]
        delta: dict[str, NDArray[np.floating[Any]]] = {}
        for name in sorted({name for update in chosen for name in update.delta}):
            votes = np.stack([update.delta[name] for update in chosen if name in update.delta])  # (chosen, *shape)
            delta[name] = votes.astype(np.float64).mean(axis=0).astype(votes.dtype)
        return with_equal_votes(chosen, delta)

    def _choose(self, updates: Sequence[Update]) -> list[int]:
        """Indices of the updates to average, ascending.

        Raises:
            QuorumError: too few sites for the `f` that was asked for; averaging on would drop the promise in silence.
        """
        count = len(updates)
        if self.f is not None and 0 < count < 2 * self.f + 3:
            raise QuorumError(
                f"Round {updates[0].round}: multi-Krum against f = {self.f} liars needs at least {2 * self.f + 3} sites; {count} were "
                "admitted. The state before this round is on disk: mend the missing sites and resume, or run anew with a lower `f`."
            )
        byzantine = self.f if self.f is not None else max(0, (count - 3) // 2)
        near = count - byzantine - 2  # neighbours that count, and the most that may be averaged
        if near < 1:  # one or two sites: none can be outvoted
            return list(range(count))
        common = [name for name in updates[0].delta if all(name in update.delta for update in updates)]
        distance = np.zeros((count, count))
        for row in range(count):
            for column in range(row):
                for name in sorted(common):
                    gap = updates[row].delta[name].astype(np.float64) - updates[column].delta[name]
                    distance[row, column] += np.square(gap).sum()
        distance = np.sort(distance + distance.T, axis=1)[:, 1 : near + 1]  # without the distance to itself
        score = distance.sum(axis=1)
        best = np.argsort(score, kind="stable")[: min(self.m or near, near)]  # a tie goes to the first by name
        return sorted(best.tolist())
