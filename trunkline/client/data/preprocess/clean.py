"""Cleaning: what cannot be right becomes missing, what is missing is filled within its own segment, all of it counted.

A *segment* is one group's rows of one part (train, validation or test) in order. Nothing is filled across its ends: a
training row never learns what a test row measured. Only exact duplicates are dropped.
"""

from dataclasses import dataclass

import numpy as np
import polars as pl
from numpy.typing import NDArray

from trunkline.config.site import CleanConfig, Missing

LARGEST = 1e30  # beyond it squares leave float64's range and no sensor measures it: counted as impossible
Floats = NDArray[np.float64]
Rows = NDArray[np.int64]


@dataclass(frozen=True)
class ChannelStatistics:
    """One channel over all rows, before filling and scaling.

    Args:
        minimum, median, maximum: of the possible values, in the channel's unit; None when there are none.
        missing: share of rows without a value, impossible ones included.
        impossible: infinite, or outside the channel's `valid` range.
        outliers: beyond `robust_z` of the training median of their regime.
    """

    channel: str
    minimum: float | None
    median: float | None
    maximum: float | None
    missing: float
    impossible: int
    outliers: int


def duplicates(frame: pl.DataFrame, rows: Rows, group: NDArray[np.int32], order: Floats) -> tuple[Rows, Rows]:
    """Positions in `rows` (sorted by group, then order) that repeat an earlier row exactly, and that contradict it.

    Returns:
        (exact, differing): exact copies of a row with the same group and order; rows with the same group and order as
        the one before them, but another value in some needed column.
    """
    same = (np.diff(group[rows]) == 0) & (np.diff(order[rows]) == 0.0)
    if not same.any():
        return np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.int64)
    involved = np.flatnonzero(np.concatenate([same, [False]]) | np.concatenate([[False], same]))
    # group and order are put in as read, so that rows alike in every needed column but of two moments stay two rows
    part = frame[rows[involved]].with_columns(
        pl.Series("__group__", group[rows[involved]]), pl.Series("__order__", order[rows[involved]])
    )
    copy = ~part.select(pl.struct(pl.all()).is_first_distinct()).to_series().to_numpy()
    exact = involved[copy]
    left = involved[~copy]
    repeated = (group[rows[left[1:]]] == group[rows[left[:-1]]]) & (order[rows[left[1:]]] == order[rows[left[:-1]]])
    return exact, left[1:][repeated]


def possible(values: Floats, valid: tuple[float, float] | None) -> tuple[Floats, int]:
    """`values` with infinite, absurd and out-of-range ones as NaN, and how many those were."""
    low, high = valid if valid else (-LARGEST, LARGEST)
    missing = np.isnan(values)
    wrong = ~((values >= max(low, -LARGEST)) & (values <= min(high, LARGEST))) & ~missing
    if not wrong.any():
        return values, 0
    return np.where(wrong, np.nan, values), int(wrong.sum())


def outliers(values: Floats, training: NDArray[np.bool_], regime: Rows, clean: CleanConfig) -> tuple[Floats, int]:
    """Values farther than `robust_z` x 1.4826 MAD from the training median of their operating regime.

    Counted, and with "clip" moved to that edge. The MAD (median absolute deviation; Iglewicz & Hoaglin 1993) is not
    moved by the very outliers it must find. A channel that rests on one value for most of its life has a MAD of 0; the
    standard deviation stands in.
    """
    if clean.outliers == "keep" or not len(values):
        return values, 0
    trains = training & ~np.isnan(values)
    centre, reach = np.zeros(int(regime.max()) + 1), np.full(int(regime.max()) + 1, np.inf)
    for code in range(len(centre)):
        in_regime = values[trains & (regime == code)]
        if len(in_regime):
            centre[code] = np.median(in_regime)
            spread = 1.4826 * float(np.median(np.abs(in_regime - centre[code]))) or float(in_regime.std())
            reach[code] = clean.robust_z * spread or np.inf
    low, high = (centre - reach)[regime], (centre + reach)[regime]
    far = (values < low) | (values > high)  # NaN compares false
    count = int(far.sum())
    return (np.clip(values, low, high) if clean.outliers == "clip" and count else values), count


def statistics(channel: str, values: Floats, impossible: int, outlying: int) -> ChannelStatistics:
    present = values[~np.isnan(values)]
    if not len(present):
        return ChannelStatistics(channel, None, None, None, 1.0, impossible, 0)
    share = 1.0 - len(present) / len(values)
    return ChannelStatistics(
        channel, float(present.min()), float(np.median(present)), float(present.max()), share, impossible, outlying
    )


def fill(scaled: NDArray[np.float32], first: Rows, last: Rows, order: Floats, policy: Missing) -> int:
    """Fill the NaN of one scaled channel in place, within each segment; returns how many stay missing.

    Filling happens after scaling: carried on raw, a value from one operating regime would be an absurd one in the next.

    Args:
        scaled: (rows,) values in standard deviations of their regime.
        first, last: (rows,) first and last row of each row's segment.
        order: (rows,) ascending within a segment; the straight line of "linear" runs over it.
        policy: "forward": the last value, and before the first one that first value. "linear": a straight line between
            neighbours, flat outside. "zero": the channel's mean. "keep": nothing; the stem has an answer to silence.
            A segment without any value of this channel stays missing under "forward" and "linear".
    """
    silent = np.isnan(scaled)
    if policy == "keep" or not silent.any():
        return int(silent.sum())
    if policy == "zero":
        scaled[silent] = 0.0
        return 0
    gap, left, right = neighbours(silent, first, last)
    if policy == "forward":
        scaled[gap] = scaled[left]
    else:
        width = order[right] - order[left]
        part = np.divide(order[gap] - order[left], width, out=np.zeros(len(gap)), where=width > 0.0)
        scaled[gap] = (1.0 - part) * scaled[left] + part * scaled[right]
    return int(silent.sum()) - len(gap)


def neighbours(silent: NDArray[np.bool_], first: Rows, last: Rows) -> tuple[Rows, Rows, Rows]:
    """For each silent row of a segment that also has a value: (its row, the nearest row before it with one, and after it).

    Where a segment has none on one side, the other side's row stands in.
    """
    rows = np.arange(len(silent))
    before = np.maximum.accumulate(np.where(silent, -1, rows))
    after = np.minimum.accumulate(np.where(silent, len(rows), rows)[::-1])[::-1]
    gap = np.flatnonzero(silent)
    left, right = before[gap], after[gap]
    has_left, has_right = left >= first[gap], right <= last[gap]
    left, right = np.where(has_left, left, right), np.where(has_right, right, left)
    fillable = has_left | has_right
    return gap[fillable], left[fillable], right[fillable]
