"""The private stem of a site that records sensor windows."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from trunkline.errors import SensorMismatch


class ChannelStem(nn.Module):
    """Fold one factory's sensors into the width every trunk expects.

    A press with 3 accelerometers and a kiln with 40 thermocouples share no columns, so each site learns its own stem
    and never sends it unless the run names it (Liang et al. 2020, arXiv:2001.01523).

    A silent sensor counts as its own mean (0) plus a contribution learnt for its silence, so that "no reading" can
    mean something else than "an average reading". Without NaN this is exactly one 1x1 convolution.

    Args:
        channels: sensor columns, in the order of the site's `site.toml`.
        width: channels the trunk reads; the same at every site of a run.
        kernel: rows that a second, short convolution sees; 1: none.

    Shape:
        (batch, channels, time), standardised per site, NaN where a sensor was silent
        -> (batch, width, time), no NaN.

    Raises:
        SensorMismatch: the batch has another number of columns than the site declares.
    """

    def __init__(self, channels: int, width: int, kernel: int = 1) -> None:
        super().__init__()
        self.channels = channels
        self.values = nn.Conv1d(channels, width, 1)
        self.silent = nn.Conv1d(channels, width, 1, bias=False)
        nn.init.zeros_(self.silent.weight)  # before anything is learnt, silence is the mean
        self.around = (kernel // 2, (kernel - 1) // 2)  # rows of zeros before and behind, so that the length stays
        self.short = nn.Conv1d(width, width, kernel) if kernel > 1 else None

    def forward(self, x: Tensor, categorical: Tensor | None = None) -> Tensor:
        if x.ndim != 3 or x.shape[1] != self.channels:
            raise SensorMismatch(
                f"A batch should have shape (batch, {self.channels} channels, time). Found {tuple(x.shape)}. "
                f"Compare `channels` in site.toml with the columns of the data; a new sensor needs a new run."
            )
        if categorical is not None and categorical.shape[-1] > 0:
            raise SensorMismatch(
                f"Windows should have no categorical columns. Found {categorical.shape[-1]}. "
                f"Leave `categorical` out of site.toml, or leave `window` out to train on single rows."
            )
        silence = x.isnan()
        x = self.values(torch.where(silence, 0.0, x)) + self.silent(silence.to(x.dtype))  # (batch, width, time)
        return x if self.short is None else self.short(F.pad(F.gelu(x), self.around))
