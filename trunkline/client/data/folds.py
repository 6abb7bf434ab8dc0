"""Groups dealt to shares that look alike: what `folds` in site.toml stands on."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

OUTSIZED = 2.0  # times the rows of a mean group


@dataclass(frozen=True)
class SplitInput:
    """What splitting looks at: the rows of `files` (not of `test_files`), sorted by group, then order.

    Args:
        names: group names; `group` holds places in it.
        order: ascending within a group.
        present: (groups, classes) whether a group holds a class of some binary or multiclass task; (groups, 0) if none.
    """

    names: tuple[str, ...]
    group: NDArray[np.int32]
    order: NDArray[np.float64]
    present: NDArray[np.bool_]


def assign_folds(data: SplitInput, places: list[int], shares: int, assigned: dict[str, int]) -> dict[str, int]:
    """Group -> share, for the groups at `places`: those of `known`, then the others, so that shares are equally many
    groups and hold about as many rows of every class.

    Outsized groups are dealt out first, then the rarest class, each group to the share that has least of what it brings
    (after iterative stratification; Sechidis, Tsoumakas, Vlahavas: On the Stratification of Multi-Label Data, ECML
    PKDD 2011).

    Args:
        places: in the seeded order that decides between equals.
    """
    share = dict(assigned)
    rows = np.bincount(data.group, minlength=len(data.names))
    groups = np.zeros(shares, dtype=np.int64)
    brings = np.column_stack([data.present, np.ones(len(rows), dtype=bool)])  # (groups, classes + 1), the last: rows
    whole = np.maximum(rows @ brings, 1)
    held = np.zeros((shares, len(whole)))  # part of all rows of each class, and of all rows
    waiting = []
    for index in places:
        if (old := share.get(data.names[index])) is None:
            waiting.append(index)
        else:
            groups[old] += 1
            held[old] += rows[index] * brings[index] / whole
    waiting.sort(key=lambda index: -int(rows[index]))
    low, extra = divmod(len(places), shares)
    batch = [index for index in waiting if rows[index] > OUTSIZED * rows[waiting].mean()]
    while waiting:
        left = data.present[waiting].sum(axis=0)
        if not batch and left.any():
            rarest = int(np.argmin(np.where(left > 0, left, len(data.names) + 1)))
            batch = [index for index in waiting if data.present[index, rarest]]
        for index in batch or waiting:
            # equal loads differ by rounding, and would be told apart by it
            cost = np.round(held[:, brings[index]].sum(axis=1), 9)
            spare = extra > int((groups > low).sum())  # shares that may still hold one group more than the others
            best = min(np.flatnonzero(groups < low + spare).tolist(), key=lambda fold: (cost[fold], groups[fold]))
            share[data.names[index]] = best
            groups[best] += 1
            held[best] += rows[index] * brings[index] / whole
        waiting = [index for index in waiting if data.names[index] not in share]
        batch = []
    return share


def validation_cost(data: SplitInput, places: list[int], share: dict[str, int], validate: int) -> tuple[int, float]:
    """What it costs to validate on share `validate` of `places`: classes that training or validation would not have,
    and how far its rows are from those of an even share.
    """
    validates = np.array([share[data.names[index]] == validate for index in places])
    train, validation = (data.present[places][rows_of_part].any(axis=0) for rows_of_part in (~validates, validates))
    rows = np.bincount(data.group, minlength=len(data.names))[places]
    return 100 * int((~train).sum()) + int((~validation).sum()), abs(
        rows[validates].sum() / rows.sum() - validates.mean()
    )
