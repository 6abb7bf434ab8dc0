"""FedBN (Li et al. 2021, arXiv:2102.07623): all of the trunk is averaged but its norm layers."""

from typing import Literal

from trunkline.protocol.plan import TrunkSpec
from trunkline.strategies.strategy import Averaging


class FedBN(Averaging):
    """Norm layers stay home, so each site shifts and scales the trunk's channels as its own sensors need it.

    Args:
        norm: "private": BatchNorm with the site's own statistics, the paper's. "private-group": GroupNorm, of which only
            weight and bias are the site's own; it asks nothing of the batch, so it also does for few rows.
    """

    norm: Literal["private", "private-group"] = "private"

    def trunk(self, spec: TrunkSpec) -> TrunkSpec:
        return spec.model_copy(update={"norm": self.norm})
