"""No stem at all, for a trunk that reads a table's columns as they are."""

import torch
from torch import Tensor, nn

from trunkline.errors import SensorMismatch


class RawColumns(nn.Module):
    """Hands a row on unchanged; it has no parameters, so nothing of it is private or lent.

    Args:
        numeric: number columns of the site.
        categories: codes of each categorical column; there may be none, since a code is no number.
        columns: what the trunk reads.

    Shape:
        (batch, numeric), NaN where missing -> the same, 0 where missing.

    Raises:
        SensorMismatch: the site's columns are not what the trunk reads.
    """

    def __init__(self, numeric: int, categories: tuple[int, ...], columns: int) -> None:
        super().__init__()
        if numeric != columns or categories:
            raise SensorMismatch(
                f"This run's trunk reads {columns} number columns as they are; this site has {numeric} and {len(categories)} "
                "categorical ones. Compare `channels` in site.toml with `columns` in `[trunk]` of run.toml, or take a "
                "backbone with stems of its own."
            )
        self.numeric = numeric

    def forward(self, x: Tensor, categorical: Tensor | None = None) -> Tensor:
        if x.ndim != 2 or x.shape[1] != self.numeric or (categorical is not None and categorical.shape[-1] > 0):
            raise SensorMismatch(
                f"A batch should have shape (batch, {self.numeric} columns) and no codes. Found {tuple(x.shape)}. "
                "Compare `channels` in site.toml with the columns of the data."
            )
        return torch.nan_to_num(x, nan=0.0)
