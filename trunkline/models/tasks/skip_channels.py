"""Skip channels: each target's own channels reach its output directly, with the same weights for every target.

A path past the network for what is nearly linear: the autoregressive highway of LSTNet (Lai et al. 2018,
arXiv:1703.07015), with weights that all series share. Where there are many labels and each has inputs of its own (how often
an alarm rang, and how long ago), a network has to find out label by label which those are.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

CELLS = 250_000  # of samples x targets that the start is fitted to; a handful of unknowns needs no more
PULL = 1.0  # squared weights cost half of it, in nats beside the whole loss: a few samples must not fit themselves
NEWTON = 20  # steps at most; the problem is convex, and six or seven do
STEP = 1e-6  # a step is halved no further than this


class SkipHead(nn.Linear):
    """A linear head, and the weights of the skip channels behind its outputs: the same for every sample.

    Args:
        labels: K, targets.
        skips: J, skip channels of each target.

    Shape:
        (batch, width) -> (batch, K + J).
    """

    def __init__(self, width: int, labels: int, skips: int) -> None:
        super().__init__(width, labels)
        self.own = nn.Parameter(torch.zeros(skips))  # the name is part of stored and lent heads

    def forward(self, embedded: Tensor) -> Tensor:
        out = super().forward(embedded)
        return torch.cat([out, self.own.expand(len(out), -1)], dim=1)

    def start_from(self, weights: Tensor, level: Tensor) -> None:
        """Start from the skip channels alone: `weights` (J,), and `level` (K,) of each target's log-odds beside them."""
        with torch.no_grad():
            self.weight.zero_()
            self.bias.copy_(level)
            self.own.copy_(weights)


def select_channels(x: Tensor, indices: Tensor) -> Tensor:
    """The skip channels of every target, at the newest row of a window: 0 where a value is missing.

    Args:
        x: (batch, channels, time) or (batch, columns).
        indices: (J, K) index of channel j of target k among the inputs; negative where it is no input any more.

    Returns:
        (batch, J, K), float32.
    """
    newest = (x[:, :, -1] if x.ndim == 3 else x).float()
    selected = newest[:, indices.clamp(min=0).flatten()].view(len(x), *indices.shape)
    return torch.where(indices < 0, 0.0, selected.nan_to_num(0.0))


def fit_shared_weights(skips: Tensor, truth: Tensor) -> tuple[Tensor, float]:
    """Logistic regression of all targets' answers on their skip channels, one for all: (J,) weights and a level.

    Newton's method with halved steps, in float64, so that it is the same on every machine to within rounding.

    Args:
        skips: (n, J, K), as `select_channels` gives it.
        truth: (n, K) of 0 and 1, NaN where missing; at least one is present.
    """
    labelled = (~truth.isnan()).any(dim=1).nonzero()[:, 0]
    count = min(len(labelled), max(1, CELLS // truth.shape[1]))
    take = labelled[torch.linspace(0, len(labelled) - 1, count, dtype=torch.float64).long()]
    skips, truth = skips[take], truth[take]
    present = ~truth.isnan()
    x = skips.transpose(1, 2)[present].double()  # (cells, J)
    x = torch.cat([x, torch.ones_like(x[:, :1])], dim=1)
    y = truth[present].double()
    weights = torch.zeros(x.shape[1], dtype=torch.float64)

    def cost(point: Tensor) -> float:
        loss = F.binary_cross_entropy_with_logits(x @ point, y, reduction="sum") + 0.5 * PULL * point.square().sum()
        return float(loss)

    before = cost(weights)
    for _ in range(NEWTON):
        chance = torch.sigmoid(x @ weights)
        slope = x.T @ (chance - y) + PULL * weights
        bend = (x * (chance * (1.0 - chance))[:, None]).T @ x + PULL * torch.eye(len(weights), dtype=torch.float64)
        step = torch.linalg.solve(bend, slope)
        while (after := cost(weights - step)) > before and step.abs().max() > STEP:
            step = step / 2.0
        if after >= before:
            break
        weights, before = weights - step, after
    return weights[:-1].float(), float(weights[-1])
