"""FedProx (Li et al. 2020, arXiv:1812.06127): local training is pulled back to the trunk that arrived."""

from pydantic import Field

from trunkline.protocol.plan import LocalPlan
from trunkline.strategies.strategy import Averaging


class FedProx(Averaging):
    """Args: mu, the weight of half the squared distance between the lent arrays and what arrived."""

    mu: float = Field(default=0.01, ge=0.0)

    @property
    def plan(self) -> LocalPlan:
        return self.training.model_copy(update={"proximal": self.mu})
