"""Training samples varied anew each time they are seen: `[training.augment]` in run.toml, off by default.

Inputs are standardised, so one number fits all channels. Silence is NaN, as for a sensor that gave no reading, and the
stem knows what to make of it. Whether any of this helps is for validation to say: where levels carry the class it hurts.
"""

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from trunkline.models.tasks.task import Task
from trunkline.protocol.arrays import seed_of
from trunkline.protocol.plan import Augment


class Sample(NamedTuple):
    """A batch as training sees it."""

    x: Tensor  # what the model reads
    clean: Tensor  # what a task that reconstructs its input should give back
    terms: tuple[tuple[float, dict[str, Tensor]], ...]  # share of the loss, and the labels it is taken on


class Augmenter:
    """Vary batches; random numbers come from a generator of its own, on the device, so that off is as if it were not there.

    Args:
        plan: which variations, and how strong.
        tasks: of the site.
        categorical: codes a sample has. Codes cannot be mixed, so with them mixup is left out.
        where: the device the batches are on.
        seed: of the round and site.
    """

    def __init__(
        self, plan: Augment, tasks: Mapping[str, Task], categorical: int, where: torch.device, seed: int
    ) -> None:
        self.plan = plan
        self.mixup = plan.mixup if not categorical else 0.0
        self.reconstructs = {
            name for name, task in tasks.items() if type(task).combine_with_inputs is not Task.combine_with_inputs
        }
        self.draw = torch.Generator(where).manual_seed(seed_of(seed, "augment"))
        self.shares = np.random.default_rng(seed_of(seed, "mixup"))  # torch draws no Beta from a generator of one's own

    @staticmethod
    def wanted(plan: Augment) -> bool:
        return plan != Augment()

    def __call__(self, x: Tensor, labels: Mapping[str, Tensor]) -> Sample:
        """x (batch, channels, time) or (batch, columns), labels (batch,) or (batch, k) a task."""
        terms: tuple[tuple[float, dict[str, Tensor]], ...] = ((1.0, dict(labels)),)
        if self.mixup and len(x) > 1:
            share = float(self.shares.beta(self.mixup, self.mixup))
            # the batch is in random order, so the next one is as good a partner as one drawn
            x = share * x + (1.0 - share) * x.roll(1, 0)
            terms = self._mixed(share, labels)
        return Sample(self._varied(x), x, terms)

    def _mixed(self, share: float, labels: Mapping[str, Tensor]) -> tuple[tuple[float, dict[str, Tensor]], ...]:
        """Both samples' labels with their shares (Zhang et al. 2018, arXiv:1710.09412).

        For cross entropy this is the paper's mixture of labels, and it holds for every loss. A label whose partner is
        missing is left out: the model has seen both samples.
        """
        first, second = dict(labels), {name: label.roll(1, 0) for name, label in labels.items()}
        for name in labels:
            label, partner = first[name], second[name]
            if name in self.reconstructs:  # its label says what not to learn from, and the input is half the other's
                first[name] = second[name] = torch.fmax(label, partner)
            else:
                missing = label.isnan() | partner.isnan()
                first[name], second[name] = (mixed.masked_fill(missing, torch.nan) for mixed in (label, partner))
        return (share, first), (1.0 - share, second)

    def _varied(self, x: Tensor) -> Tensor:
        plan, where = self.plan, x.device
        if plan.scaling:  # a factor a sample and channel
            factor = torch.randn(x.shape[:2], generator=self.draw, device=where)
            x = x * (1.0 + plan.scaling * factor.view(*factor.shape, *([1] * (x.ndim - 2))))
        if plan.jitter:
            x = x + plan.jitter * torch.randn(x.shape, generator=self.draw, device=where)
        if plan.time_mask and x.ndim == 3:
            time = x.shape[2]
            length = max(1, round(plan.time_mask * time))
            start = torch.rand(len(x), 1, generator=self.draw, device=where) * (time - length + 1)
            behind = torch.arange(time, device=where) - start.floor()  # (batch, time) rows since the stretch began
            x = x.masked_fill(((behind >= 0) & (behind < length))[:, None], torch.nan)
        if plan.channel_drop:
            drop = torch.rand(x.shape[:2], generator=self.draw, device=where) < plan.channel_drop
            x = x.masked_fill(drop.view(*drop.shape, *([1] * (x.ndim - 2))), torch.nan)
        return x
