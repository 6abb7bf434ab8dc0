"""Which model a site should really use: decided on validation data only, task by task, and only beyond noise.

The federated model is held until another is better by more than a margin. Two validation engines are typical for a small
plant, and there the better figure is decided by chance: picking it would throw plants back to training alone that the
federation serves better, which is worse than no gate at all.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trunkline.models.labels import Labels
from trunkline.models.tasks.task import Task

SURE = 0.9  # how likely another model must be the better one before the one held is left
SURE_HALF = 0.7  # the same for a model that is half the one held: it can lose half as much, and averaging errors helps
UNITS = 40  # most parts a validation set is cut into; more cost time and tell the error of a figure no better
BLOCKS = 10  # stretches of time that stand for groups where there is one group only
PRIOR = 2  # degrees of freedom of what is assumed about noise before it is measured; see `margin`
APART = 0.5  # of the error itself: how far two models' errors on one group usually differ, beyond their mean difference


@dataclass(frozen=True)
class Tried:
    """One model on one task's validation rows.

    Args:
        task: the site's task, calibrated for this model.
        prediction: (n, ...) what it predicts.
        score: its primary metric; None where that is undefined, and where the predictions are not finite.
        tries: versions of it of which this is the best on these very rows; the margin grows with them (Bonferroni).
        half: whether half of every prediction is the held model's own, as in an ensemble of two.
    """

    task: Task
    prediction: NDArray[Any]
    score: float | None
    tries: int = 1
    half: bool = False


def choose(tried: Mapping[str, Tried], labels: Labels, groups: NDArray[np.int32], held: str = "federated") -> str:
    """The name of the model to use.

    The one held stays, unless the advantage of another exceeds its `margin`; of those that do, the best is used. Without
    labels there is nothing to choose by, and the federated model, which has seen more plants, stays. A model whose figure
    is undefined where that of others is not has diverged and is no candidate.

    Args:
        tried: name -> model; `held` is one of them.
        labels: (n,) or (n, k), NaN where missing.
        groups: (n,) what belongs together, in order of time within each.
    """
    left = {name: model for name, model in tried.items() if model.score is not None}
    if not left:
        return held
    if held not in left:
        held = next(iter(left))
    parts = units(left[held].task.scored_mask(labels), groups)
    without = {name: _without_each(model, labels, parts) for name, model in left.items()}
    best, most = held, 0.0
    for name, other in left.items():
        bar = margin(left[held], other, without[held], without[name]) if name != held else None
        gain = _better_by(left[held], other)
        if bar is not None and gain > max(bar, most):
            best, most = name, gain
    return best


def units(judged: NDArray[np.bool_], groups: NDArray[np.int32]) -> list[NDArray[np.intp]]:
    """The rows that count, cut into parts that do not depend on each other: at most UNITS of them.

    Groups where there are two or more, several of them together where there are many. A single group (one machine, split
    in time) is cut into BLOCKS stretches of equal length: neighbouring rows repeat each other, far ones hardly (Künsch
    1989, Annals of Statistics 17).
    """
    rows = np.flatnonzero(judged)
    codes, member = np.unique(groups[rows], return_inverse=True)
    if len(codes) < 2:
        return [part for part in np.array_split(rows, BLOCKS) if len(part)]
    member = member % UNITS
    return [rows[member == unit] for unit in range(min(len(codes), UNITS))]


def margin(held: Tried, other: Tried, of_held: NDArray[np.float64], of_other: NDArray[np.float64]) -> float | None:
    """By how much the other model must be better than the one held: the SURE point of the difference's own noise.

    The noise is the jackknife's standard error over the validation parts (Efron 1982): each part is left out once and the
    difference is worked out anew. Unlike a bootstrap it means something with two parts, and it takes any metric. Two parts
    often agree by chance: of sixteen turbofan plants with two validation engines each, one showed an advantage of 6.1
    cycles with a standard error of 0.9 for a model that was 8.3 cycles worse in truth. So the measured noise is averaged
    with a guess that counts as PRIOR parts more: APART of the error itself, or the noise of each model's own figure where
    that is larger. With two parts another model must have 40 % less error to be believed, with eight 10 %; with twenty the
    guess hardly matters. What is left of the uncertainty widens the margin as Student's distribution does.

    An ensemble with the one held differs from it half as much, so half is what is assumed of it; and it is asked for less
    certainty. Asked for as much as any other model, it was never taken on turbofans where it was the best in eight cases
    of eight. In drawn worlds (tests/client/model_selection/test_gate.py) SURE_HALF costs less than SURE whatever the number of groups.

    Args:
        mine, theirs: (parts,) the two models' metrics with each part left out, NaN where undefined.

    Returns:
        None with fewer than two parts to go by: then nothing is known about the noise.
    """
    defined = np.isfinite(of_held) & np.isfinite(of_other)
    freedom = int(defined.sum()) - 1
    if freedom < 1:
        return None
    of_held, of_other = of_held[defined], of_other[defined]
    nearer = 0.5 if other.half else 1.0
    apart = APART * (_error(held) + _error(other)) / 2.0
    guessed = nearer**2 * max(apart**2 / len(of_held), (_jackknife(of_held) + _jackknife(of_other)) / 2.0)
    variance = (freedom * _jackknife(of_held - of_other) + PRIOR * guessed) / (freedom + PRIOR)
    sure = 1.0 - (1.0 - (SURE_HALF if other.half else SURE)) / other.tries
    return _student(sure, freedom + PRIOR) * float(np.sqrt(variance))


def _error(model: Tried) -> float:
    """How far a model is from perfect: its metric where lower is better, else what it lacks of 1."""
    score = model.score or 0.0
    return abs(score if model.task.card.better == "lower" else 1.0 - score)


def _jackknife(values: NDArray[np.float64]) -> float:
    """Variance of a figure, out of its (parts,) values with one part left out each."""
    return float((len(values) - 1) / len(values) * np.square(values - values.mean()).sum())


def _student(sure: float, freedom: int) -> float:
    """Student's quantile by two terms of Fisher's expansion; within 2 % from 3 degrees of freedom on, up to 95 %."""
    z = NormalDist().inv_cdf(sure)
    return z + (z**3 + z) / (4 * freedom) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * freedom**2)


def _better_by(held: Tried, other: Tried) -> float:
    if held.score is None or other.score is None:
        return 0.0
    return held.score - other.score if held.task.card.better == "lower" else other.score - held.score


def _without_each(model: Tried, labels: Labels, parts: list[NDArray[np.intp]]) -> NDArray[np.float64]:
    values = np.full(len(parts), np.nan)
    for index in range(len(parts) if len(parts) > 1 else 0):
        rows = np.concatenate([part for other, part in enumerate(parts) if other != index])
        value = model.task.score(model.prediction[rows], labels[rows])
        values[index] = np.nan if value is None else value
    return values
