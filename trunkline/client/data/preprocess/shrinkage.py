"""Statistics of a site with little data, pulled towards the federation's: what matters more than the first labels do.

The mean of one engine's sensors is that engine's. A newcomer that scales by it sees its fleet through one engine's
eyes; leaning on what other sites saw costs nothing where there is data, and helps most where there is none.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from trunkline.client.data.preprocess.regimes import GAP, Regimes
from trunkline.release import PooledScale

WORTH = 1.0  # own groups that the federation's statistics count as
BLOCK = 500  # rows of one group that count as another group: a year of one machine is more than one engine
STRANGE = 6.0  # federation's standard deviations between two means: another unit under the same name, or another sensor
Floats = NDArray[np.float64]


def groups_seen(group: NDArray[np.integer], regime: NDArray[np.int64], regimes: int) -> Floats:
    """(regimes,) how many groups a regime's training rows are worth: rows of one group repeat each other."""
    groups = int(group.max(initial=-1)) + 1
    rows = np.bincount(regime * groups + group, minlength=regimes * groups).reshape(regimes, groups)
    worth: Floats = np.where(rows > 0, np.maximum(1.0, rows / BLOCK), 0.0).sum(axis=1)
    return worth


@dataclass(frozen=True, eq=False)
class PooledPrior:
    """The federation's statistics laid beside one site's regimes.

    Args:
        nearest: (regimes,) the federation's regime of each of the site's own; -1 where it has none.
        groups: (regimes,) own groups behind the site's statistics.
    """

    pooled: PooledScale
    nearest: NDArray[np.int64]
    groups: Floats

    def shrink(self, channel: str, count: NDArray[np.int64], mean: Floats, std: Floats) -> tuple[Floats, Floats]:
        """The site's mean and standard deviation of one channel, as if WORTH groups of the federation were its own.

        A channel or regime that the federation does not know keeps its own, and so does one whose own mean lies so far
        off that the two cannot be the same sensor in the same unit.

        Shape:
            count, mean, std (regimes,) -> (regimes,) each.
        """
        if channel not in self.pooled.channels:
            return mean, std
        column = self.pooled.channels.index(channel)
        pooled = np.array([self.pooled.count, self.pooled.mean, self.pooled.variance])[:, :, column][:, self.nearest]
        groups = np.where(count > 0, self.groups, 0.0)
        far = np.abs(mean - pooled[1]) > STRANGE * np.sqrt(pooled[2])
        leans = (self.nearest >= 0) & (pooled[0] > 0.0) & ~(far & (groups > 0.0) & (pooled[2] > 0.0))
        share = groups / (groups + WORTH)
        middle = share * mean + (1.0 - share) * pooled[1]
        spread = share * (std**2 + (mean - middle) ** 2) + (1.0 - share) * (pooled[2] + (pooled[1] - middle) ** 2)
        return np.where(leans, middle, mean), np.where(leans, np.sqrt(spread), std)

    def knows(self, channel: str) -> bool:
        """Whether the federation saw `channel` move in a regime of this site: it need not move in this site's few rows."""
        if channel not in self.pooled.channels:
            return False
        column = self.pooled.channels.index(channel)
        return any(regime >= 0 and self.pooled.variance[regime][column] > 0.0 for regime in self.nearest.tolist())


def match_pooled(scales: Sequence[PooledScale], regimes: Regimes, groups: Floats) -> PooledPrior | None:
    """The statistics of the sites with the same settings, matched to `regimes` by centre; None where no site has them."""
    for pooled in scales:
        if pooled.settings != regimes.settings:
            continue
        low, width = (np.array([span[part] for span in regimes.spans], dtype=np.float64) for part in (0, 1))
        centres = low + np.array(regimes.centres, dtype=np.float64).reshape(len(regimes), len(width)) * width
        pooled_centres = np.array(pooled.centres, dtype=np.float64).reshape(len(pooled.centres), len(width))
        every = np.concatenate([pooled_centres, centres])
        reach = np.maximum(np.array(pooled.widths), np.ptp(every, axis=0)) if len(width) else width
        apart = np.abs(centres[:, None] - pooled_centres[None]) / np.where(
            reach > 0.0, reach, 1.0
        )  # (own, known, settings)
        farthest = apart.max(axis=2, initial=0.0)
        nearest = farthest.argmin(axis=1)
        nearest_within_gap = np.where(farthest[np.arange(len(regimes)), nearest] <= GAP, nearest, -1)
        return PooledPrior(pooled, nearest_within_gap.astype(np.int64), groups)
    return None
