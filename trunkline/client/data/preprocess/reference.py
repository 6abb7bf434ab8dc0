"""What each machine looked like when it was new: the running mean of a group's first rows, as further inputs."""

import numpy as np
from numpy.typing import NDArray

from trunkline.client.data.layout import Layout

MARK = "@start"  # behind the name of the channel it is the reference of


def reference(scaled: NDArray[np.float32], layout: Layout, rows: int) -> NDArray[np.float32]:
    """For every row the mean of its group's first `rows` rows up to this row; nothing in it lies in the future.

    No two machines are built alike: what tells wear is the distance from a machine's own beginning, and a window of its
    last rows does not reach back that far. Where a group's rows are on both sides of a split by time, the later part
    still refers to the group's own beginning.

    Shape:
        scaled (rows of the site, channels), NaN where silent -> the same; 0 (the mean) while nothing was heard.
    """
    order = np.lexsort((layout.order, layout.group))  # each group from its beginning, whatever part its rows are in
    group = layout.group[order]
    start = np.flatnonzero(np.concatenate([[True], group[1:] != group[:-1]]))
    first = np.repeat(start, np.diff(np.append(start, len(order))))
    position = np.arange(len(order)) - first
    values = scaled[order].astype(np.float64)
    heard = ~np.isnan(values) & (position < rows)[:, None]
    total = np.cumsum(np.where(heard, values, 0.0), axis=0)
    count = np.cumsum(heard, axis=0)
    before = np.maximum(first - 1, 0)
    none = (first == 0)[:, None]
    total = total - np.where(none, 0.0, total[before])
    count = count - np.where(none, 0, count[before])
    out = np.empty_like(scaled)
    out[order] = np.divide(total, count, out=np.zeros_like(total), where=count > 0)
    return out
