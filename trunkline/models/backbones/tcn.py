"""Dilated convolutions over time: the default trunk, and one that is told the levels too."""

from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from trunkline.models.backbones.backbone import Backbone, Size


class TCN(Backbone):
    """A strided convolution, then residual convolutions of growing reach (Bai et al. 2018, arXiv:1803.01271).

    Not causal: a window ends now, so nothing in it lies in the future. The summary is an attention-weighted mean over
    time (what happened) beside the last step (where it stands).

    Shape:
        (batch, width, time), any time >= 1 -> (batch, width).
    """

    reads = "windows"
    sizes = {"small": Size(48, 3), "base": Size(96, 4)}  # noqa: RUF012  (declared ClassVar in Backbone)
    pieces: ClassVar[int] = 2  # of `width` numbers each, that `summary` gives

    def __init__(self, size: str, width: int | None, dropout: float) -> None:
        super().__init__(size, width, dropout)
        self.width = width = width or self.sizes[size].width
        # stride 2 halves the work of every block after it and cost nothing in accuracy on turbofans
        self.entry = nn.Conv1d(width, width, kernel_size=5, stride=2, padding=2)
        self.blocks = nn.ModuleList(
            nn.Conv1d(width, width, kernel_size=3, padding=2**level, dilation=2**level)
            for level in range(self.sizes[size].depth)
        )
        self.dropout = nn.Dropout(dropout)
        self.attend = nn.Linear(width, 1)
        self.out = nn.Linear(self.pieces * width, width)
        self.norm_widths = (width,) * (1 + len(self.blocks))

    def forward(self, x: Tensor, norms: nn.ModuleList) -> Tensor:
        entered = x
        x = F.gelu(norms[0](self.entry(x)))  # (batch, width, time) -> (batch, width, ceil(time / 2))
        for conv, norm in zip(self.blocks, norms[1:], strict=True):
            x = x + self.dropout(F.gelu(norm(conv(x))))
        out: Tensor = self.out(torch.cat(self.summary(entered, x.transpose(1, 2)), dim=1))
        return out

    def summary(self, entered: Tensor, steps: Tensor) -> list[Tensor]:
        """(batch, width, time) as the stem gave it, and (batch, steps, width) -> `pieces` times (batch, width)."""
        mean = (self.attend(steps).softmax(dim=1) * steps).sum(dim=1)
        return [mean, steps[:, -1]]


class StatsTCN(TCN):
    """A TCN whose summary also says how high and how low things went, and where the stem's own channels lay.

    For signals whose level carries the answer (a pressure, a temperature): every norm layer takes some of it away, and a
    mean over time hides a short peak. Statistics over time beside what was learnt: Snyder et al. 2018, X-vectors.
    """

    pieces = 7

    def summary(self, entered: Tensor, steps: Tensor) -> list[Tensor]:
        """As of `TCN`, and the maximum over the steps; mean, spread, maximum and minimum over time of what entered."""
        spread = entered.std(dim=2, correction=0)
        return [
            *super().summary(entered, steps), steps.amax(dim=1),
            entered.mean(dim=2), spread, entered.amax(dim=2), entered.amin(dim=2),
        ]  # fmt: skip
