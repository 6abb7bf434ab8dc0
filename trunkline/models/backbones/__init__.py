"""Shared bodies: one file each, and one line here."""

from trunkline.models.backbones.backbone import Backbone
from trunkline.models.backbones.linear import Linear
from trunkline.models.backbones.mlp import MLP
from trunkline.models.backbones.tcn import TCN, StatsTCN
from trunkline.models.backbones.transformer import Transformer

BACKBONES: dict[str, type[Backbone]] = {
    "tcn": TCN,
    "tcn-stats": StatsTCN,
    "transformer": Transformer,
    "mlp": MLP,
    "linear": Linear,
}
