"""Low-rank adaptation: a trunk that learns by adding a product of two thin matrices to each of its weights.

Hu et al. 2021, arXiv:2106.09685. The weights that came stay as they are; with rank r a layer of n inputs and m outputs
learns r (n + m) numbers instead of n m, so that a handful of labels cannot bend the trunk far.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from trunkline.models.trunk import TrunkModel
from trunkline.protocol.arrays import seed_of

RANK = 4
SCALE = 2.0  # what the product counts (alpha / r of the paper): twice, so that the rate of full fine-tuning does


class LowRank(nn.Module):
    """A Linear or Conv1d whose weight is the one it had, frozen, plus `up @ down`.

    `up` starts at zero: before anything is learnt the layer gives what it gave. A convolution's weight
    (outputs, inputs, kernel) is adapted as the matrix (outputs, inputs * kernel).

    Args:
        layer: whose weight and bias are taken over; they are no longer parameters of the model.
        rank: at most that of the weight itself.
        seed: of `down`.
    """

    weight_: Tensor
    bias: Tensor | None

    def __init__(self, layer: nn.Linear | nn.Conv1d, rank: int, seed: int) -> None:
        super().__init__()
        self.layer = [layer]  # in a list: its parameters are not this module's to train
        self.register_buffer("weight_", layer.weight.detach().clone())
        self.register_buffer("bias", None if layer.bias is None else layer.bias.detach().clone())
        outputs, inputs = layer.weight.shape[0], layer.weight[0].numel()
        rank = min(rank, outputs, inputs)
        draw = torch.Generator().manual_seed(seed % 2**63)
        down = torch.randn(rank, inputs, generator=draw) / math.sqrt(inputs)
        self.down = nn.Parameter(down.to(layer.weight.device))
        self.up = nn.Parameter(torch.zeros(outputs, rank, device=layer.weight.device))

    @property
    def weight(self) -> Tensor:
        """The weight the layer works with now."""
        return self.weight_ + SCALE * (self.up @ self.down).view_as(self.weight_)

    def forward(self, x: Tensor) -> Tensor:
        layer = self.layer[0]
        if isinstance(layer, nn.Linear):
            return F.linear(x, self.weight, self.bias)
        return F.conv1d(x, self.weight, self.bias, layer.stride, layer.padding, layer.dilation, layer.groups)

    def merged(self) -> nn.Linear | nn.Conv1d:
        """The plain layer with the product added to its weight."""
        layer = self.layer[0]
        with torch.no_grad():
            layer.weight.copy_(self.weight)
        return layer


def add_low_rank(model: TrunkModel, rank: int = RANK, *, seed: int) -> None:
    """Put LowRank in the place of every Linear and Conv1d of the trunk; stem, heads and norms stay as they are.

    From here on `parameters_of("trunk")` is the thin matrices and the norms; `merge_low_rank` makes it a plain trunk
    again, which has to happen before it is shared or stored.
    """
    for name, module in list(model.trunk.named_modules()):
        for child, layer in list(module.named_children()):
            if isinstance(layer, nn.Linear | nn.Conv1d) and getattr(layer, "padding_mode", "zeros") == "zeros":
                setattr(module, child, LowRank(layer, rank, seed_of(seed, "lora", name, child)))


def merge_low_rank(model: TrunkModel) -> None:
    """Add each product to its weight and put the plain layers back; what the model computes stays the same."""
    for module in list(model.trunk.modules()):
        for child, layer in list(module.named_children()):
            if isinstance(layer, LowRank):
                setattr(module, child, layer.merged())
