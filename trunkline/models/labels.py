"""What a label array looks like, for everything that handles labels without caring for their kind. No torch in here."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

Labels = NDArray[np.float32]  # (rows,), or (rows, k) for a task with several numbers a sample; NaN where one is missing


def known(labels: NDArray[Any]) -> NDArray[np.bool_]:
    """Which samples carry a label: (rows,). Of several numbers a sample, one that is there is enough."""
    there: NDArray[np.bool_] = ~np.isnan(labels)
    return there if there.ndim == 1 else np.asarray(there.any(axis=1))
