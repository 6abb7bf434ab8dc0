"""A site's samples as tensors on one device: a batch is an index into them, so a step copies nothing from the host."""

import itertools
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from trunkline.client.data import WindowSet


def device() -> torch.device:
    """CUDA where there is one; TRUNKLINE_DEVICE overrides."""
    return torch.device(os.environ.get("TRUNKLINE_DEVICE") or ("cuda" if torch.cuda.is_available() else "cpu"))


@dataclass(frozen=True)
class DeviceDataset:
    """A WindowSet as tensors on one device; windows are gathered there, never stored.

    Rows that would not fit stay in the memory of the host, and batches are gathered there and sent: the host does that
    while the device is still at the step before, because no step waits for the device.
    """

    values: Tensor  # (rows, channels)
    categorical: Tensor  # (rows, k)
    first: Tensor  # (n,)
    ends: Tensor  # (n,)
    window: int | None
    labels: dict[str, Tensor]  # task -> (n,) or (n, k), on `where`
    goes: torch.device | None = None  # where batches of rows that stay in the host's memory are sent

    @classmethod
    def of(cls, windows: WindowSet, where: torch.device) -> "DeviceDataset":
        goes = None if fits(windows.values.nbytes, where) else where
        home = where if goes is None else torch.device("cpu")
        return cls(
            values=torch.from_numpy(np.ascontiguousarray(windows.values)).to(home),
            categorical=torch.from_numpy(np.ascontiguousarray(windows.categorical)).to(home),
            first=torch.from_numpy(windows.first).to(home),
            ends=torch.from_numpy(windows.ends).to(home),
            window=windows.window,
            labels={
                task: torch.from_numpy(np.ascontiguousarray(column)).to(where)
                for task, column in windows.labels.items()
            },
            goes=goes,
        )

    @classmethod
    def joined(cls, parts: Sequence["DeviceDataset"]) -> "DeviceDataset":
        """The samples of several sites, one site behind the other; no window reaches into another's rows."""
        starts = [0, *itertools.accumulate(len(part.values) for part in parts)]
        goes = next((part.goes for part in parts if part.goes is not None), None)  # where one stays at home, all do
        home = parts[0].values.device if goes is None else torch.device("cpu")
        return cls(
            values=torch.cat([part.values.to(home) for part in parts]),
            categorical=torch.cat([part.categorical.to(home) for part in parts]),
            first=torch.cat([part.first.to(home) + start for part, start in zip(parts, starts, strict=False)]),
            ends=torch.cat([part.ends.to(home) + start for part, start in zip(parts, starts, strict=False)]),
            window=parts[0].window,
            labels={name: torch.cat([part.labels[name] for part in parts]) for name in parts[0].labels},
            goes=goes,
        )

    def begun(self, count: int) -> "DeviceDataset":
        """Its first `count` samples."""
        labels = {task: column[:count] for task, column in self.labels.items()}
        return replace(self, first=self.first[:count], ends=self.ends[:count], labels=labels)

    def moved(self, by: Tensor) -> "DeviceDataset":
        """The same samples, each channel moved by its entry of `by`, (channels,)."""
        return replace(self, values=self.values + by)

    def __len__(self) -> int:
        return len(self.ends)

    @property
    def where(self) -> torch.device:
        """Where its batches are."""
        return self.goes or self.values.device

    def batch(self, index: Tensor) -> tuple[Tensor, Tensor]:
        """Inputs (b, channels, window), or (b, channels) for rows, and categorical codes (b, k), on `where`.

        Args:
            index: (b,) positions, on the device of the rows.
        """
        x, categorical = self._gathered(index)
        if self.goes is None:
            return x, categorical
        if self.goes.type == "cuda":  # from pinned memory a copy does not keep the host waiting
            x, categorical = x.pin_memory(), categorical.pin_memory()
        return x.to(self.goes, non_blocking=True), categorical.to(self.goes, non_blocking=True)

    def _gathered(self, index: Tensor) -> tuple[Tensor, Tensor]:
        ends = self.ends[index]
        categorical = self.categorical[ends]
        if self.window is None:
            return self.values[ends], categorical
        back = torch.arange(self.window - 1, -1, -1, device=ends.device)
        rows = torch.maximum(
            ends[:, None] - back, self.first[index][:, None]
        )  # (b, window): before its start a group repeats its first row
        x = self.values.index_select(0, rows.reshape(-1)).view(len(index), self.window, -1)
        return x.transpose(1, 2).contiguous(), categorical  # once here, or once in every layer that reads it


def fits(nbytes: int, where: torch.device) -> bool:
    """Whether rows may lie on that device: in no more than half of what is free there, because a model needs room too."""
    return where.type != "cuda" or nbytes <= torch.cuda.mem_get_info(where)[0] // 2
