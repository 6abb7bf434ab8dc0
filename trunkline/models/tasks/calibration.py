"""From scores to probabilities that mean what they say, and to the place where a yes is called. Pure numpy."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

ENOUGH = 20  # labels of each class below which a curve through the probabilities would be drawn through noise
BINS = 15
SHARPEST = (
    20.0  # bounds of slope and 1 / temperature: beyond, a few validation rows that happen to part would say "certain"
)
EDGE = 1e-7  # nearest a probability comes to 0 or 1; float32 knows nothing finer beside 1
PULL = 1e-5  # towards "leave it as it is", so that labels that part completely have a finite answer

Floats = NDArray[np.float64]


def logit(probability: NDArray[Any]) -> Floats:
    """The log-odds of probabilities; those of exactly 0 and 1 stay finite."""
    inside = np.clip(probability.astype(np.float64), EDGE, 1.0 - EDGE)
    return np.asarray(np.log(inside) - np.log1p(-inside))


def sigmoid(score: Floats) -> Floats:
    """The probabilities of log-odds, without overflow."""
    return np.asarray(0.5 * (1.0 + np.tanh(0.5 * score)))


def platt(score: Floats, truth: NDArray[np.bool_]) -> tuple[float, float]:
    """(slope > 0, shift) so that sigmoid(slope * score + shift) is the probability of `truth` (Platt 1999).

    Platt's own targets, not 0 and 1, keep a handful of rows from meaning certainty. A slope above 0 leaves the order of
    any two scores as it is.

    Args:
        score: (rows,) log-odds, finite.
        truth: (rows,) with both classes.
    """
    positive = int(truth.sum())
    negative = len(truth) - positive
    target = np.where(truth, (positive + 1.0) / (positive + 2.0), 1.0 / (negative + 2.0))
    slope, shift = _newton(score, target, np.array([1.0, 0.0]), with_slope=True)
    if not 1.0 / SHARPEST <= slope <= SHARPEST:
        slope = float(np.clip(slope, 1.0 / SHARPEST, SHARPEST))
        slope, shift = _newton(score, target, np.array([slope, 0.0]), with_slope=False)
    return slope, shift


def _newton(score: Floats, target: Floats, start: Floats, with_slope: bool) -> tuple[float, float]:
    """The least cross entropy by Newton's steps, halved while they lead uphill; the slope stays where not `with_slope`."""
    inputs = np.stack([score, np.ones_like(score)])[0 if with_slope else 1 :]  # (1 or 2, rows)

    def cost(point: Floats) -> float:
        z = point[0] * score + point[1]
        pull = PULL * float(np.square(point - [1.0, 0.0]).sum())
        return float((np.logaddexp(0.0, z) - target * z).mean()) + pull

    point, before = start, cost(start)
    for _ in range(50):
        guess = sigmoid(point[0] * score + point[1])
        move = slice(0 if with_slope else 1, 2)
        slope = inputs @ (guess - target) / len(score) + 2.0 * PULL * (point - [1.0, 0.0])[move]
        bend = (inputs * (guess * (1.0 - guess))) @ inputs.T / len(score) + 2.0 * PULL * np.eye(len(inputs))
        step = np.zeros(2)
        step[move] = np.linalg.solve(bend, slope)
        size = 1.0
        while (after := cost(point - size * step)) > before and size > 1e-6:
            size /= 2.0
        if after >= before - 1e-12:
            break
        point, before = point - size * step, after
    return float(point[0]), float(point[1])


def temperature(probability: NDArray[Any], truth: NDArray[np.int64]) -> float:
    """The T > 0 for which softmax(log probability / T) has the least cross entropy (Guo et al. 2017, arXiv:1706.04599).

    One number for all classes, so that the likeliest class of every row stays the likeliest.

    Args:
        probability: (rows, classes).
        truth: (rows,) places of the true classes.
    """
    scores = np.log(np.clip(probability.astype(np.float64), EDGE, 1.0))
    rows = np.arange(len(truth))

    def slope(sharpness: float) -> float:  # of the cross entropy, which is convex in 1 / T
        likely = soften(scores, sharpness)
        return float(((likely * scores).sum(axis=1) - scores[rows, truth]).mean()) + 2.0 * PULL * (sharpness - 1.0)

    low, high = 1.0 / SHARPEST, SHARPEST
    if slope(low) >= 0.0:
        return 1.0 / low
    if slope(high) <= 0.0:
        return 1.0 / high
    for _ in range(50):
        middle = float(np.sqrt(low * high))
        low, high = (middle, high) if slope(middle) < 0.0 else (low, middle)
    return 1.0 / float(np.sqrt(low * high))


def soften(scores: Floats, sharpness: float) -> Floats:
    """softmax(sharpness * scores) by row."""
    raised = np.exp(sharpness * (scores - scores.max(axis=1, keepdims=True)))
    return np.asarray(raised / raised.sum(axis=1, keepdims=True))


def calibration_error(confidence: NDArray[Any], truth: NDArray[Any]) -> float:
    """Expected calibration error: in 15 equal bins, how far confidence and frequency are apart, weighted by rows.

    Guo et al. 2017, arXiv:1706.04599. NaN where a confidence is NaN.

    Args:
        confidence: (rows,) probabilities.
        truth: (rows,) 0 or 1, whether what was said with that confidence is so.
    """
    confidence = confidence.astype(np.float64)
    if np.isnan(confidence).any():
        return float("nan")
    bins = np.clip(np.ceil(confidence * BINS).astype(np.int64) - 1, 0, BINS - 1)  # bins (0, 1/15], (1/15, 2/15], ...
    gaps = np.bincount(bins, weights=confidence - truth, minlength=BINS)
    return float(np.abs(gaps).sum() / len(confidence))


def best_cut(score: NDArray[Any], truth: NDArray[np.bool_], near: float) -> float | None:
    """The place between two scores above which calling yes has the best F1; of equally good ones the nearest to `near`.

    Args:
        score: (rows,) probabilities, no NaN.
        truth: (rows,).

    Returns:
        None where there is no F1 (no true row), or nothing to cut (all scores 0).
    """
    order = np.argsort(-score, kind="stable")
    score = score[order].astype(np.float64)
    hits = np.cumsum(truth[order])
    below = np.append(score[1:], 0.0)[: len(score)]
    possible = score > below  # equal scores cannot be told apart
    if not possible.any() or not hits[-1]:
        return None
    cut = (score + below) / 2.0  # between two scores: what is called positive is above it
    f1 = np.where(possible, 2.0 * hits / (np.arange(1, len(score) + 1) + hits[-1]), -1.0)
    best = cut[f1 == f1.max()]
    return float(best[np.argmin(np.abs(best - near))])
