"""FedRep (Collins et al. 2021, arXiv:2102.07078): first the private parts on the frozen trunk, then the trunk."""

from pydantic import Field

from trunkline.exchange import LocalPlan, Phase
from trunkline.strategies.strategy import Averaging


class FedRep(Averaging):
    """Two phases a round.

    Args:
        head_share: share of the round's steps that fits stem and heads to the trunk that arrived.
        joint: in the second phase, let the private parts move on with the trunk. The paper freezes them; its
            alternation is for linear representations, and few steps a round make freezing costly.
    """

    head_share: float = Field(default=0.5, gt=0.0, lt=1.0)
    joint: bool = False

    @property
    def plan(self) -> LocalPlan:
        phases = (
            Phase(parts=("stem", "heads"), share=self.head_share),
            Phase(parts=("stem", "trunk", "heads") if self.joint else ("trunk",), share=1.0 - self.head_share),
        )
        return self.training.model_copy(update={"phases": phases})
