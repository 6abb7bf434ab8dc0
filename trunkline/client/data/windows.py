"""Windows without copies: where each one ends, and the rows it is cut from when a batch asks for it."""

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trunkline.models.labels import Labels, known

Index = NDArray[np.integer[Any]] | NDArray[np.bool_] | slice
Rows = NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class WindowSet:
    """The samples of one part (train, validation or test) of a site.

    Args:
        values: (rows, channels) float32, scaled, sorted by group then order; NaN where a sensor was silent.
        categorical: (rows, k) codes, 0 = a value unknown in training; k may be 0.
        first: (n,) first row of each sample's group in this part. A window that would reach before it repeats that row.
        ends: (n,) last row (inclusive) of each window.
        window: rows a window; None: each sample is the one row `values[ends]`.
        labels: task -> (n,) or (n, k) float32, the label of the window's last row, NaN where it is missing.
        groups: (n,) int32, places in `group_names`.
        order: (n,) time or cycle of the last row.
        group_names: of the whole site, the same for its three parts.
    """

    values: NDArray[np.float32]
    categorical: Rows
    first: Rows
    ends: Rows
    window: int | None
    labels: dict[str, Labels]
    groups: NDArray[np.int32]
    order: NDArray[np.float64]
    group_names: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.ends)

    def codes(self, index: Index) -> Rows:
        """The categorical codes of the samples at `index`: (b, k)."""
        return self.categorical[self.ends[index]]

    def subset(self, index: Index) -> "WindowSet":
        """The samples at `index` (positions or a mask), over the same rows."""
        return replace(
            self,
            first=self.first[index],
            ends=self.ends[index],
            labels={task: label[index] for task, label in self.labels.items()},
            groups=self.groups[index],
            order=self.order[index],
        )

    def joined(self, other: "WindowSet") -> "WindowSet":
        """These samples and those of another part of the same site; no window reaches from one part into the other."""
        rows = len(self.values)
        return replace(
            self,
            values=np.concatenate([self.values, other.values]),
            categorical=np.concatenate([self.categorical, other.categorical]),
            first=np.concatenate([self.first, other.first + rows]),
            ends=np.concatenate([self.ends, other.ends + rows]),
            labels={task: np.concatenate([label, other.labels[task]]) for task, label in self.labels.items()},
            groups=np.concatenate([self.groups, other.groups]),
            order=np.concatenate([self.order, other.order]),
        )

    def labelled(self) -> "WindowSet":
        """The samples that carry a label of at least one task."""
        return self.subset(np.any([known(label) for label in self.labels.values()], axis=0))

    def spread(self, most: int) -> "WindowSet":
        """At most `most` samples, evenly over groups and time; the same ones every time."""
        if len(self) <= most:
            return self
        return self.subset(((np.arange(most) + 0.5) * len(self) / most).astype(np.int64))


def ends_of(first: Rows, last: Rows, stride: int, only_last: bool) -> Rows:
    """The rows at which windows end, ascending.

    Args:
        first, last: (rows,) first and last row of each row's group.
        stride: every so many rows, counted back from each group's last row, which always is one: on a run to failure it
            is the row that matters most.
        only_last: just that last row.
    """
    back = last - np.arange(len(last))
    return np.flatnonzero(back == 0 if only_last else back % stride == 0)


def segments(*keys: NDArray[Any]) -> tuple[Rows, Rows]:
    """(first, last) row of the run of equal keys each row belongs to; (rows,) each."""
    size = len(keys[0])
    change = np.zeros(size, dtype=bool)
    for key in keys:
        change[1:] |= key[1:] != key[:-1]
    starts = np.flatnonzero(change) if not size else np.concatenate([[0], np.flatnonzero(change)])
    run = np.cumsum(change)
    stops = np.append(starts[1:], size) - 1
    return starts[run].astype(np.int64), stops[run].astype(np.int64)
