"""What a label array looks like, for everything that handles labels without caring for their kind. No torch in here."""

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

Labels = NDArray[np.float32]  # (rows,), or (rows, k) for a task with several numbers a sample; NaN where one is missing


class Places(NamedTuple):
    """Where the samples of one part lie among its rows, which are sorted by group then order.

    Args:
        ends: (n,) the row each sample ends at.
        first, last: (rows,) first and last row of each row's group in this part; what lies behind `last` belongs to
            another machine or another part, and no label may come from there.
        order: (rows,) time or cycle of each row; None: rows follow each other one by one.
    """

    ends: NDArray[np.int64]
    first: NDArray[np.int64]
    last: NDArray[np.int64]
    order: NDArray[np.float64] | None = None


def known(labels: NDArray[Any]) -> NDArray[np.bool_]:
    """Which samples carry a label: (rows,). Of several numbers a sample, one that is there is enough."""
    present: NDArray[np.bool_] = ~np.isnan(labels)
    return present if present.ndim == 1 else np.asarray(present.any(axis=1))
