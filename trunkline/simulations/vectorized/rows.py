"""The rows of several sites as one data set, and the batches that each site draws from its own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from trunkline.client.training.device_dataset import DeviceDataset
from trunkline.client.training.sampling import Batches


@dataclass(frozen=True)
class JoinedRows:
    """The samples of several sites, one site behind the other.

    Args:
        starts: (sites,) position of each site's first sample.
        sizes: samples of each site.
    """

    data: DeviceDataset
    starts: NDArray[np.int64]
    sizes: list[int]

    @classmethod
    def of(cls, datasets: Sequence[DeviceDataset]) -> JoinedRows:
        sizes = [len(dataset) for dataset in datasets]
        return cls(DeviceDataset.joined(datasets), np.cumsum([0, *sizes])[:-1], sizes)

    def batch(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """(sites, batch) positions -> inputs (sites, batch, ...) and codes (sites, batch, k)."""
        x, codes = self.data.batch(rows.reshape(-1))
        return x.reshape(*rows.shape, *x.shape[1:]), codes.reshape(*rows.shape, codes.shape[1])

    def labels_at(self, rows: Tensor, padding: Tensor | None) -> dict[str, Tensor]:
        """task -> (sites, batch, ...) labels, NaN where `padding` (sites, batch) marks a position that only fills up."""
        labels = {}
        for name, column in self.data.labels.items():
            values = column[rows]
            if padding is not None:
                values = torch.where(padding.reshape(*padding.shape, *[1] * (values.ndim - 2)), torch.nan, values)
            labels[name] = values
        return labels

    def all_of(self, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
        """All samples of these sites: (sites, most) positions, filled up with each site's last, and (sites,) how many count."""
        sizes = np.array([self.sizes[index] for index in indices])
        most = max(1, int(sizes.max(initial=0)))
        offsets = np.minimum(np.arange(most)[None, :], np.maximum(sizes[:, None] - 1, 0))
        rows = self.starts[list(indices)][:, None] + offsets
        where = self.data.ends.device
        rows = np.minimum(rows, max(len(self.data) - 1, 0))
        return torch.from_numpy(rows).to(where), torch.from_numpy(sizes).to(where)


class JoinedBatches:
    """The batches of several sites, each site's own draw, filled up to one length.

    Args:
        indices: of the sites in `data`.
        size: of a batch; a site with fewer samples gets them all.
        seeds: one a site.
        in_order: a site that sees all its rows in every step may see them in their own order. Only where nothing else is
            drawn: a dropout mask belongs to a position in the batch.
    """

    def __init__(
        self, data: JoinedRows, indices: Sequence[int], size: int, seeds: Sequence[int], *, in_order: bool
    ) -> None:
        where = data.data.ends.device
        self.data, self.indices = data, list(indices)
        self.sizes = [min(size, data.sizes[index]) for index in indices]
        self.fixed: tuple[Tensor, Tensor | None] | None = None
        most = max(self.sizes)
        if in_order and all(data.sizes[index] <= size for index in indices):
            rows, counts = data.all_of(indices)
            padding = torch.arange(most, device=where)[None, :] >= counts[:, None]
            self.fixed = rows, padding if min(self.sizes) < most else None
            return
        cpu = torch.device("cpu")
        self.draws = [Batches(data.sizes[index], size, seed, cpu) for index, seed in zip(indices, seeds, strict=True)]
        self.most, self.where = most, where
        padding = torch.arange(most)[None, :] >= torch.tensor(self.sizes)[:, None]
        self.padding = padding.to(where) if min(self.sizes) < most else None

    def next(self) -> tuple[Tensor, Tensor | None]:
        """(sites, batch) positions in the joined rows, and which of them only fill up."""
        if self.fixed is not None:
            return self.fixed
        rows = torch.empty((len(self.indices), self.most), dtype=torch.int64)
        for row, index, draw in zip(rows, self.indices, self.draws, strict=True):
            drawn = draw.next() + int(self.data.starts[index])
            row[: len(drawn)] = drawn
            row[len(drawn) :] = drawn[0]
        return rows.to(self.where), self.padding
