"""A residual network for table rows."""

from torch import Tensor, nn
from torch.nn import functional as F

from trunkline.models.backbones.backbone import Backbone, Size


class MLP(Backbone):
    """Pre-norm residual blocks, the strong simple choice for tables (Gorishniy et al. 2021, arXiv:2106.11959).

    Shape:
        (batch, width) -> (batch, width).
    """

    reads = "rows"
    sizes = {"small": Size(64, 2), "base": Size(128, 4)}  # noqa: RUF012  (declared ClassVar in Backbone)

    def __init__(self, size: str, width: int | None, dropout: float) -> None:
        super().__init__(size, width, dropout)
        self.width = width = width or self.sizes[size].width
        depth = self.sizes[size].depth
        self.wide = nn.ModuleList(nn.Linear(width, 2 * width) for _ in range(depth))
        self.narrow = nn.ModuleList(nn.Linear(2 * width, width) for _ in range(depth))
        self.dropout = nn.Dropout(dropout)
        self.out = nn.Linear(width, width)
        self.norm_widths = (width,) * (depth + 1)

    def forward(self, x: Tensor, norms: nn.ModuleList) -> Tensor:
        for wide, narrow, norm in zip(self.wide, self.narrow, norms[:-1], strict=True):
            x = x + self.dropout(narrow(F.gelu(wide(norm(x)))))
        out: Tensor = self.out(F.gelu(norms[-1](x)))
        return out
