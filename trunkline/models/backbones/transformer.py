"""Attention over patches of time."""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from trunkline.models.backbones.backbone import Backbone, Size

PATCH = 4  # rows a token


class Transformer(Backbone):
    """A pre-norm transformer (Vaswani et al. 2017, arXiv:1706.03762) over patches (Nie et al. 2023, arXiv:2211.14730).

    Positions count back from the end of the window, where every site's "now" is, and are computed for whatever length
    arrives: sites with windows of 16 and of 500 rows share one body. The norms are over channels and patches together.

    Shape:
        (batch, width, time), any time >= 1 -> (batch, width).
    """

    reads = "windows"
    sizes = {"small": Size(64, 2), "base": Size(128, 4)}  # noqa: RUF012  (declared ClassVar in Backbone)

    def __init__(self, size: str, width: int | None, dropout: float) -> None:
        super().__init__(size, width, dropout)
        self.width = width = width or self.sizes[size].width
        self.patch = nn.Conv1d(width, width, kernel_size=PATCH, stride=PATCH)
        self.place = nn.Linear(width, width, bias=False)
        self.blocks = nn.ModuleList(_Block(width, dropout) for _ in range(self.sizes[size].depth))
        self.out = nn.Linear(2 * width, width)
        self.norm_widths = (width,) * (2 * len(self.blocks) + 1)

    def forward(self, x: Tensor, norms: nn.ModuleList) -> Tensor:
        # Repeat the first row in front, as short windows are padded everywhere: the last patch must end now.
        lead = -x.shape[-1] % PATCH
        x = self.patch(torch.cat([x[..., :1].expand(-1, -1, lead), x], dim=-1))  # (batch, width, patches)
        x = x + self.place(_positions(x.shape[-1], self.width, x)).transpose(0, 1)
        for index, block in enumerate(self.blocks):
            x = block(x, norms[2 * index], norms[2 * index + 1])
        x = norms[-1](x)
        out: Tensor = self.out(torch.cat([x.mean(dim=-1), x[..., -1]], dim=1))  # (batch, 2 width) -> (batch, width)
        return out


class _Block(nn.Module):
    """Attention, then a small network a token; both residual. The norms come from outside."""

    def __init__(self, width: int, dropout: float) -> None:
        super().__init__()
        self.heads = max(count for count in (1, 2, 3, 4) if width % count == 0)
        self.mix = nn.Linear(width, 3 * width)
        self.back = nn.Linear(width, width)
        self.wide = nn.Linear(width, 2 * width)
        self.narrow = nn.Linear(2 * width, width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, before: nn.Module, between: nn.Module) -> Tensor:
        tokens = before(x).transpose(1, 2)  # (batch, patches, width)
        x = x + self.dropout(self._attention(tokens)).transpose(1, 2)
        tokens = between(x).transpose(1, 2)
        out: Tensor = x + self.dropout(self.narrow(F.gelu(self.wide(tokens)))).transpose(1, 2)
        return out

    def _attention(self, tokens: Tensor) -> Tensor:
        # Written out: the fused kernel has no rule for stacked parameters, and a window has few patches.
        batch, patches, width = tokens.shape
        mixed = self.mix(tokens).reshape(batch, patches, 3, self.heads, width // self.heads)
        query, key, value = mixed.permute(2, 0, 3, 1, 4).unbind(0)  # (batch, heads, patches, width / heads)
        weight = (query @ key.transpose(-1, -2) / math.sqrt(width // self.heads)).softmax(dim=-1)
        out: Tensor = self.back((weight @ value).transpose(1, 2).reshape(batch, patches, width))
        return out


def _positions(patches: int, width: int, like: Tensor) -> Tensor:
    """Sines and cosines of the distance to the last patch, (patches, width); made anew, because a table is a buffer."""
    back = torch.arange(patches - 1, -1, -1, device=like.device, dtype=torch.float32)
    rate = torch.exp(torch.arange(0, width, 2, device=like.device, dtype=torch.float32) * (-math.log(1e4) / width))
    angle = back[:, None] * rate  # (patches, ceil(width / 2))
    return torch.cat([angle.sin(), angle.cos()], dim=1)[:, :width]
