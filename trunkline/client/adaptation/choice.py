"""Which candidate a newcomer uses: what every one lost on groups it did not see, and the rule that decides."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


@dataclass(frozen=True)
class Choice:
    """Which candidate, why, and what every candidate lost on groups it did not see.

    Args:
        name: a candidate; "interpolated" has its `share` of fine-tuned weights beside it.
        losses: candidate -> mean over held-out groups of the site's training loss; empty where none could be held out.
        outputs: task -> what the chosen candidate gave for `rows`, which it did not see; empty like `losses`.
        reference: as `outputs`, of the candidate that had to be beaten.
    """

    name: str
    share: float
    reason: str
    losses: dict[str, float] = field(default_factory=dict)
    rows: NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, np.int64))
    outputs: dict[str, Tensor] = field(default_factory=dict)
    reference: dict[str, Tensor] = field(default_factory=dict)

    @property
    def label(self) -> str:
        return label_of(self.name, self.share)


def label_of(name: str, share: float) -> str:
    return f"interpolated {share:.2f}" if name == "interpolated" else name


@dataclass
class Tried:
    """A candidate's outputs on rows it did not see, over the folds so far, and its loss on each held-out group."""

    rows: NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, np.int64))
    outputs: dict[str, Tensor] = field(default_factory=dict)
    losses: NDArray[np.float64] = field(default_factory=lambda: np.zeros(0))

    def add(self, rows: NDArray[np.int64], outputs: dict[str, Tensor], losses: NDArray[np.float64]) -> None:
        self.rows = np.concatenate([self.rows, rows])
        self.outputs = {
            name: torch.cat([*([self.outputs[name]] if self.outputs else []), output])
            for name, output in outputs.items()
        }
        self.losses = np.concatenate([self.losses, losses])


def choose_by_losses(tried: Mapping[tuple[str, float], Tried], prior: float, *, as_is: bool) -> Choice:
    """The candidate that beats the reference beyond noise on held-out groups, or else the prior's share, or the reference.

    Args:
        tried: (name, share) -> what the candidate gave on groups that it did not see.
        prior: share of fine-tuned weights that is taken where nothing speaks against it.
        as_is: whether the released model can be used unchanged; it is the reference then, and "scratch" otherwise.
    """
    losses = {key: result.losses for key, result in tried.items()}
    means = {label_of(*key): float(loss.mean()) for key, loss in losses.items()}
    count = len(next(iter(losses.values())))
    reference = ("as_is", 0.0) if as_is else ("scratch", 1.0)
    fallback, named = reference, "the released model as it is" if as_is else "training from scratch"
    best, best_mean = fallback, math.inf
    for key, loss in losses.items():
        gain = losses[reference] - loss
        noise = float(gain.std(ddof=1)) / math.sqrt(count)
        if key != reference and gain.mean() > noise and loss.mean() < best_mean:
            best, best_mean = key, float(loss.mean())
    held = f"{count} held-out group{'s' if count != 1 else ''}"
    # Few held-out groups prove little, and on average over draws interpolating by the prior was level with the release
    # at one engine and ahead from ten. Single draws lost up to 18 %, so it is not taken against held-out groups.
    as_well = as_is and losses["interpolated", prior].mean() <= losses[reference].mean()
    if best == reference and as_well:
        best = ("interpolated", prior)
    if best == ("interpolated", prior) and means[label_of(*best)] >= means[label_of(*reference)] - float(
        (losses[reference] - losses[best]).std(ddof=1)
    ) / math.sqrt(count):
        reason = f"On {held} nothing beat {named} beyond noise, and nothing speaks against going {prior:.0%} of the way to fine-tuned weights."
    elif best == reference:
        reason = f"On {held} nothing beat {named} beyond noise."
    else:
        gain = losses[reference] - losses[best]
        error = float(gain.std(ddof=1)) / math.sqrt(count)
        reason = (
            f"On {held} its loss is {losses[best].mean():.3g} where {named} has {losses[reference].mean():.3g}, "
            f"better by {gain.mean():.2g} with a standard error of {error:.2g}."
        )
    chosen, other = tried[best], tried[reference]
    return Choice(best[0], best[1], reason, means, chosen.rows, chosen.outputs, other.outputs)
