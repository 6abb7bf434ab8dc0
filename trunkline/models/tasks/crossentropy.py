"""Cross entropy for rows that are not alike: rare answers that count more, hard rows that count more, labels less than sure.

Focal loss: Lin et al. 2017, arXiv:1708.02002. Label smoothing: Szegedy et al. 2016, arXiv:1512.00567.
"""

import torch
from torch import Tensor
from torch.nn import functional as F


def yes_or_no(logit: Tensor, truth: Tensor, emphasis: float | Tensor, focal: float, smoothing: float) -> Tensor:
    """The loss of every answer to a yes-or-no question, same shape as `logit`.

    Args:
        logit: log-odds of yes.
        truth: 0 or 1, same shape.
        emphasis: how much a true yes weighs beside a true no.
        focal: gamma; a row predicted with probability p of its truth counts (1 - p) ** gamma. 0: all count alike.
        smoothing: share of the label given to both answers alike.
    """
    if smoothing:
        truth = truth * (1.0 - smoothing) + 0.5 * smoothing
    # softplus(-z) = -log sigmoid(z), without overflow
    yes, no = F.softplus(-logit), F.softplus(logit)
    if focal:  # (1 - p) ** gamma = exp(-gamma * softplus(z)): no power of zero has to be differentiated
        yes, no = yes * torch.exp(-focal * no), no * torch.exp(-focal * yes)
    return emphasis * truth * yes + (1.0 - truth) * no


def one_of_many(output: Tensor, truth: Tensor, focal: float, smoothing: float) -> Tensor:
    """The loss of every row, (batch, classes) and (batch,) -> (batch,); `focal` and `smoothing` as in `yes_or_no`."""
    scores = output.log_softmax(dim=1)
    if not focal and not smoothing:
        return -scores.gather(1, truth[:, None])[:, 0]
    losses = -scores
    if focal:
        # from 1e-6 on, because a root of zero has no gradient
        losses = losses * (1.0 - scores.exp()).clamp(min=1e-6) ** focal
    return (1.0 - smoothing) * losses.gather(1, truth[:, None])[:, 0] + smoothing * losses.mean(dim=1)
