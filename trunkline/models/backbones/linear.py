"""One matrix, nothing else: the reference case whose answer is known."""

from collections.abc import Mapping
from typing import ClassVar, Self

from torch import Tensor, nn

from trunkline.errors import ConfigError
from trunkline.models.backbones.backbone import Backbone, Size
from trunkline.protocol.plan import TrunkSpec


class Linear(Backbone):
    """The shared linear representation of the theory: y = <head, W x> (Collins et al. 2021, arXiv:2102.07078).

    It reads a table's columns as they are, so all sites need the same columns in the same order and there is no stem.
    With `[data] scale = "none"` and `intercept = false` a run is exactly the model the theory is about. It is also the
    right trunk where theory holds: calibration curves of the same meter, a few directions out of many channels.

    Args:
        columns: numbers it reads; `width`: numbers it hands to the heads, the rank of the representation.

    Shape:
        (batch, columns) -> (batch, width).
    """

    reads = "rows"
    sizes: ClassVar[Mapping[str, Size]] = {"small": Size(2, 1), "base": Size(8, 1)}

    def __init__(self, size: str, width: int | None, dropout: float, columns: int = 1) -> None:
        super().__init__(size, width, dropout)
        self.width = width or self.sizes[size].width
        self.columns = columns
        self.matrix = nn.Linear(columns, self.width, bias=False)
        self.norm_widths = ()

    @classmethod
    def of(cls, spec: TrunkSpec) -> Self:
        if spec.columns is None:
            raise ConfigError(
                "backbone 'linear' reads a table as it is: say in `[trunk]` of run.toml how many `columns` every site has."
            )
        return cls(spec.size, spec.width, spec.dropout, spec.columns)

    def forward(self, x: Tensor, norms: nn.ModuleList) -> Tensor:
        out: Tensor = self.matrix(x)
        return out
