"""The private stem of a site whose samples are table rows."""

import torch
from torch import Tensor, nn

from trunkline.errors import SensorMismatch


class ColumnStem(nn.Module):
    """Fold one factory's table columns, numbers and codes, into the width every trunk expects.

    Its columns are a site's own, and so is this (Liang et al. 2020, arXiv:2001.01523). A missing number counts as its
    mean (0) plus a contribution learnt for its absence; a code adds the vector learnt for it.

    Args:
        numeric: number columns, in the order of `channels` in the site's `site.toml`.
        categories: for each categorical column its number of codes, 0 (unknown or missing) included.
        width: channels the trunk reads; the same at every site of a run.

    Shape:
        numbers (batch, numeric), standardised per site, NaN where missing, and codes (batch, len(categories)) int64
        -> (batch, width), no NaN. A code at or beyond its column's number counts as unknown.

    Raises:
        SensorMismatch: the batch has another number of columns than the site declares.
    """

    def __init__(self, numeric: int, categories: tuple[int, ...], width: int) -> None:
        super().__init__()
        self.numeric = numeric
        self.values = nn.Linear(numeric, width)
        self.silent = nn.Linear(numeric, width, bias=False)
        nn.init.zeros_(self.silent.weight)  # before anything is learnt, a missing number is the mean
        self.counts = categories
        self.codes = nn.ModuleList(nn.Embedding(max(count, 1), width) for count in categories)
        for table in self.codes:
            assert isinstance(table, nn.Embedding)
            nn.init.normal_(table.weight, std=len(categories) ** -0.5)  # together as large as one standardised number
            with torch.no_grad():
                table.weight[0] = 0.0  # what training never saw must not add noise when it first appears

    def forward(self, x: Tensor, categorical: Tensor | None = None) -> Tensor:
        columns = 0 if categorical is None else categorical.shape[-1]
        if x.ndim != 2 or x.shape[1] != self.numeric or columns != len(self.codes):
            raise SensorMismatch(
                f"A batch should have shape (batch, {self.numeric} columns) and {len(self.codes)} categorical columns. "
                f"Found {tuple(x.shape)} and {columns}. Compare `channels` and `categorical` in site.toml with the data."
            )
        missing = x.isnan()
        out: Tensor = self.values(torch.where(missing, 0.0, x)) + self.silent(missing.to(x.dtype))
        if categorical is not None:
            for code, count, table in zip(categorical.unbind(1), self.counts, self.codes, strict=True):
                out = out + table(torch.where((code > 0) & (code < count), code, 0))
        return out  # (batch, width)
