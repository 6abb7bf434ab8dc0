"""FedAvgM (Hsu et al. 2019, arXiv:1909.06335): the server keeps a momentum of the mean updates."""

from dataclasses import replace

import numpy as np
from pydantic import Field

from trunkline.protocol.arrays import Arrays
from trunkline.protocol.messages import Update
from trunkline.strategies.strategy import Averaging, StrategyState


class FedAvgM(Averaging):
    """The trunk moves by a fading sum of mean updates: what sites disagree on cancels over rounds, what they share adds up.

    Unlike the FedAvg it is named after it lends what run.toml names, so it also works with private stems and heads.

    Args:
        momentum: share of the last movement that is kept. A constant update ends at 1 / (1 - momentum) times its size.
        server_learning_rate: factor on the movement.
    """

    momentum: float = Field(default=0.9, ge=0.0, lt=1.0)
    server_learning_rate: float = Field(default=1.0, gt=0.0, le=10.0)

    def start(self, trunk: Arrays) -> StrategyState:
        return StrategyState(trunk, {"velocity": Arrays({name: np.zeros_like(array) for name, array in trunk.items()})})

    def step(self, state: StrategyState, mean: Update) -> StrategyState:
        trunk, velocity = dict(state.trunk), dict(state.moments["velocity"])
        for name, delta in mean.delta.items():
            velocity[name] = (self.momentum * velocity[name] + delta).astype(delta.dtype)
            trunk[name] = (trunk[name] + self.server_learning_rate * velocity[name]).astype(delta.dtype)
        return replace(state, trunk=Arrays(trunk), moments={"velocity": Arrays(velocity)}, round=state.round + 1)
