"""Ditto (Li et al. 2021, arXiv:2012.04221): beside the shared model every site trains one of its own, pulled to the shared trunk."""

from pydantic import Field

from trunkline.protocol.plan import LocalPlan
from trunkline.strategies.strategy import Averaging


class Ditto(Averaging):
    """Two models a site: the lent trunk is trained and averaged as ever; the personal one is what the site uses.

    The personal model has a trunk, stem and heads of its own. Its trunk is pulled to the trunk that arrived (soft
    sharing): with a pull of 0 it is local training, with a large one it is the shared model. It never leaves the site.
    A round costs the site twice the training.

    Args:
        pull: lambda of the paper, the weight of half the squared distance between the two trunks.
    """

    pull: float = Field(default=0.1, gt=0.0)

    @property
    def plan(self) -> LocalPlan:
        return self.training.model_copy(update={"personal": self.pull})
