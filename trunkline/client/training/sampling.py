"""Which samples a step sees: every one once a pass, or the rare classes more often."""

from collections.abc import Mapping

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from trunkline.config.tasks import CLASSED
from trunkline.models.labels import Labels, known
from trunkline.models.tasks.task import Task, effective_number
from trunkline.protocol.arrays import seed_of


class Batches:
    """An endless row of batches of positions, the same for the same seed.

    Args:
        samples: how many there are; none is an error of the caller.
        size: of a batch; a site with fewer samples gets them all.
        seed: of the order.
        where: device the positions are put on, a pass at a time rather than a batch at a time.
        chances: (samples,) of being drawn, with replacement; None: a fresh order each pass.
    """

    def __init__(
        self, samples: int, size: int, seed: int, where: torch.device, chances: NDArray[np.float64] | None = None
    ) -> None:
        self.samples = samples
        self.size = size
        self.draw = np.random.default_rng(seed_of(seed, "batches"))
        self.left = torch.empty(0, dtype=torch.int64, device=where)
        self.below = None if chances is None else np.cumsum(chances)

    def next(self) -> Tensor:
        """(b,) positions."""
        if len(self.left) < min(self.size, self.samples):
            more = torch.from_numpy(self._pass()).to(self.left.device)
            self.left = torch.cat([self.left, more]) if len(self.left) else more
        batch, self.left = self.left[: self.size], self.left[self.size :]
        return batch

    def _pass(self) -> NDArray[np.int64]:
        if self.below is None:
            return self.draw.permutation(self.samples)
        points = self.draw.random(self.samples) * self.below[-1]
        positions: NDArray[np.int64] = np.searchsorted(self.below, points, side="right").astype(np.int64)
        return np.minimum(positions, self.samples - 1)  # rounding can put a point on the far end


def chances(labels: Mapping[str, Labels], tasks: Mapping[str, Task]) -> NDArray[np.float64] | None:
    """How often each sample should be drawn, in sum 1: the inverse of its class's effective number of samples.

    With several tasks of classes each has an equal say. A sample without that task's label is as likely as if nobody had
    asked; a row of several labels (multilabel) belongs to the rarest one it has.

    Returns:
        None where no task has classes: then all are alike. Effective number: Cui et al. 2019, arXiv:1901.05555.
    """
    says = [
        _say(labels[name] if task.kind in CLASSED else _rarest(labels[name]))
        for name, task in tasks.items()
        if task.kind in CLASSED or task.kind == "multilabel"
    ]
    return np.mean(says, axis=0) if says else None


def _say(classes: Labels) -> NDArray[np.float64]:
    """(n,) chances by one task's classes, NaN where a sample has none."""
    labelled = known(classes)
    chance = np.full(len(classes), 1.0 / len(classes))
    if labelled.any():
        _, member, counts = np.unique(classes[labelled], return_inverse=True, return_counts=True)
        scarce = 1.0 / effective_number(counts.astype(np.float64))[member]
        chance[labelled] = scarce / scarce.sum() * labelled.mean()
    return chance


def _rarest(labels: Labels) -> Labels:
    """(n, k) of 0 and 1 -> (n,) the rarest column each row is 1 in, k for a row without any; NaN where nothing is known."""
    positive = labels > 0.5
    counts = np.where(positive, positive.sum(axis=0), np.inf)  # (n, k): how common each label of a row is
    rarest = np.where(positive.any(axis=1), counts.argmin(axis=1), labels.shape[1])
    return np.where(known(labels), rarest, np.nan).astype(np.float32)
