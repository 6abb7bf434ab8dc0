"""What every shared body promises."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import ClassVar, Literal, NamedTuple, Self

from torch import Tensor, nn

from trunkline.protocol.plan import TrunkSpec


class Size(NamedTuple):
    """`size` of `[trunk]` in run.toml."""

    width: int  # channels the trunk reads and the embedding it gives
    depth: int  # blocks


class Backbone(nn.Module, ABC):
    """The shared body, between stem and heads.

    It owns no norm layer and no buffer: the model hands the norms in, because they may belong to the site.
    Norm `i` is over `norm_widths[i]` channels, the second dimension of whatever it is given.

    Shape:
        (batch, width, time) for any time >= 1, or (batch, width) where `reads` is "rows" -> (batch, width).
    """

    reads: ClassVar[Literal["windows", "rows"]]
    sizes: ClassVar[Mapping[str, Size]]
    width: int
    norm_widths: tuple[int, ...]

    @abstractmethod
    def __init__(self, size: str, width: int | None, dropout: float) -> None:
        super().__init__()

    @classmethod
    def of(cls, spec: TrunkSpec) -> Self:
        """The body `[trunk]` of run.toml asks for."""
        return cls(spec.size, spec.width, spec.dropout)

    @abstractmethod
    def forward(self, x: Tensor, norms: nn.ModuleList) -> Tensor: ...
