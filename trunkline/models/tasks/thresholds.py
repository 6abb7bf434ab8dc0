"""Where each of many yes-or-no labels is called, chosen on validation rows. Pure numpy."""

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from trunkline.models.tasks.calibration import best_cut, logit, sigmoid

SUPPORT = 10  # positives below which a label cannot choose a threshold of its own
BELIEF = 10.0  # positives' worth of all labels together that are laid beside a label's own when it chooses
# own thresholds tried, as log-odds from the common one: itself first, and of equally good ones the nearest wins
REACH = np.array(sorted(np.linspace(-3.0, 3.0, 49), key=abs))
Flags = NDArray[np.bool_]


class Counts(NamedTuple):
    """What some rows say about every label at every cut.

    Args:
        hits: (K, cuts) cells that are called and true.
        called: (K, cuts) cells above the cut.
        true: (K,) cells that are true.
    """

    hits: NDArray[np.int64]
    called: NDArray[np.int64]
    true: NDArray[np.int64]


def choose_thresholds(
    prediction: NDArray[Any], truth: Flags, present: Flags, *, near: float, macro: bool
) -> NDArray[np.float32] | None:
    """(K,) thresholds: one for all labels, and another one for a label whose rows support it.

    The common one has the best micro-F1. A rare label would fit a threshold of its own to two or three rows, so a label
    needs `SUPPORT` positives, and chooses on its own rows with those of all labels laid beside them. Even so the
    thresholds of single labels are taken only where those chosen on one half of the rows are better on the other half.

    Args:
        prediction: (rows, K) probabilities; rows in their order, because neighbours repeat each other.
        truth, present: (rows, K) what is true, and which cells count.
        near: of equally good common thresholds the nearest to this.
        macro: choose for the mean of the labels' F1 instead of the F1 over all cells.

    Returns:
        None where no cell is true, or every probability is 0.
    """
    common = best_cut(prediction[present], truth[present], near)
    if common is None:
        return None
    cuts = sigmoid(logit(np.array(common)) + REACH).astype(np.float32)
    cuts[0] = np.float32(common)
    if cuts[0] > common:  # rounded up, it could lie on the very score that it should let through
        cuts[0] = np.nextafter(cuts[0], np.float32(0.0))
    half = len(prediction) // 2
    first, second = (
        _count(prediction[rows], truth[rows], present[rows], cuts) for rows in (slice(half), slice(half, None))
    )
    common_cuts = np.zeros(prediction.shape[1], dtype=np.int64)
    single = _f1(first, _best_cuts(second, macro), macro) + _f1(second, _best_cuts(first, macro), macro)
    if single > _f1(first, common_cuts, macro) + _f1(second, common_cuts, macro):
        total = Counts(first.hits + second.hits, first.called + second.called, first.true + second.true)
        return cuts[_best_cuts(total, macro)]
    return cuts[common_cuts]


def _count(prediction: NDArray[Any], truth: Flags, present: Flags, cuts: NDArray[np.float32]) -> Counts:
    hits, called = [], []
    truth = truth & present
    for cut in cuts:
        above = (prediction > cut) & present
        called.append(above.sum(axis=0))
        hits.append((above & truth).sum(axis=0))
    return Counts(np.stack(hits, axis=1), np.stack(called, axis=1), truth.sum(axis=0))


def _best_cuts(counts: Counts, macro: bool) -> NDArray[np.int64]:
    """(K,) the index of each label's best cut; 0, the common one, where it has too few positives."""
    belief = BELIEF / max(counts.true.sum(), 1)
    hits = counts.hits + belief * counts.hits.sum(axis=0)
    called = counts.called + belief * counts.called.sum(axis=0)
    supported = counts.true >= SUPPORT
    indices = np.zeros(len(hits), dtype=np.int64)
    if macro:
        return np.where(supported, (hits / (called + counts.true[:, None] + BELIEF)).argmax(axis=1), indices)
    # the best ratio 2 hits / (called + true) over all labels together: with the ratio at hand each label alone maximises
    # hits - ratio / 2 * called, which gives a better ratio, until it stays (Dinkelbach 1967)
    for _ in range(20):
        before, ratio = indices, _f1(counts, indices, macro=False)
        indices = np.where(supported, (hits - 0.5 * ratio * called).argmax(axis=1), 0)
        if (indices == before).all():
            break
    return indices


def _f1(counts: Counts, indices: NDArray[np.int64], macro: bool) -> float:
    """The micro- or macro-F1 of calling each label (K,) at its cut."""
    labels = np.arange(len(indices))
    hits, either = counts.hits[labels, indices], counts.called[labels, indices] + counts.true
    if not macro:
        return float(2.0 * hits.sum() / max(either.sum(), 1))
    return float((2.0 * hits[either > 0] / either[either > 0]).mean()) if either.any() else 0.0
