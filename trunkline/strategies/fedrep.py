"""FedRep (Collins et al. 2021, arXiv:2102.07078): first the private parts on the frozen trunk, then the trunk."""

from dataclasses import replace

from pydantic import Field

from trunkline.protocol.arrays import Arrays
from trunkline.protocol.messages import Update
from trunkline.protocol.plan import LocalPlan, Phase
from trunkline.strategies.strategy import Averaging, StrategyState


class FedRep(Averaging):
    """Two phases a round.

    Args:
        head_share: share of the round's steps that fits stem and heads to the trunk that arrived.
        joint: in the second phase, let the private parts move on with the trunk. The paper freezes them; its
            alternation is for linear representations, and few steps a round make freezing costly.
        server_rate: factor on the mean update. Every site moves the trunk only where its own rows point, so the mean of
            many is shorter than what all of them want; going further is over-relaxation (the paper leaves it at 1).
    """

    head_share: float = Field(default=0.5, gt=0.0, lt=1.0)
    joint: bool = False
    server_rate: float = Field(default=1.0, gt=0.0, le=10.0)

    @property
    def plan(self) -> LocalPlan:
        phases = (
            Phase(parts=("stem", "heads"), share=self.head_share),
            Phase(parts=("stem", "trunk", "heads") if self.joint else ("trunk",), share=1.0 - self.head_share),
        )
        return self.training.model_copy(update={"phases": phases})

    def step(self, state: StrategyState, mean: Update) -> StrategyState:
        if self.server_rate == 1.0:
            return super().step(state, mean)
        longer = {name: (self.server_rate * delta).astype(delta.dtype) for name, delta in mean.delta.items()}
        return super().step(state, replace(mean, delta=Arrays(longer)))
