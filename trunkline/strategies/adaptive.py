"""What FedAdam and FedYogi share: the mean update is a gradient for an adaptive optimiser at the server."""

from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from trunkline.protocol.arrays import Arrays
from trunkline.protocol.messages import Update
from trunkline.strategies.strategy import Averaging, StrategyState

Numbers = NDArray[np.floating[Any]]


class Adaptive(Averaging):
    """Adaptive server optimisation (Reddi et al. 2021, arXiv:2003.00295, Algorithm 2), without bias correction as there.

    Args:
        server_learning_rate: step of the server; near the size of a useful change of one weight a round.
        beta1, beta2: memory of the mean and of the square.
        tau: floor of the root of the square; the larger, the closer to a plain mean.
    """

    server_learning_rate: float = Field(default=1e-2, gt=0.0)
    beta1: float = Field(default=0.9, ge=0.0, lt=1.0)
    beta2: float = Field(default=0.99, ge=0.0, lt=1.0)
    tau: float = Field(default=1e-3, gt=0.0)

    def remember(self, square: Numbers, delta: Numbers) -> Numbers:
        """The running square after `delta`; here Adam's, a fading mean."""
        return self.beta2 * square + (1 - self.beta2) * np.square(delta)

    def start(self, trunk: Arrays) -> StrategyState:
        zeros = Arrays({name: np.zeros_like(array) for name, array in trunk.items()})
        squares = Arrays({name: np.full_like(array, self.tau**2) for name, array in trunk.items()})
        return StrategyState(trunk, {"mean": zeros, "square": squares})

    def step(self, state: StrategyState, mean: Update) -> StrategyState:
        trunk, first, second = dict(state.trunk), dict(state.moments["mean"]), dict(state.moments["square"])
        for name, delta in mean.delta.items():
            first[name] = (self.beta1 * first[name] + (1 - self.beta1) * delta).astype(delta.dtype)
            second[name] = self.remember(second[name], delta).astype(delta.dtype)
            move = self.server_learning_rate * first[name] / (np.sqrt(second[name]) + self.tau)
            trunk[name] = (trunk[name] + move).astype(delta.dtype)
        moments = {"mean": Arrays(first), "square": Arrays(second)}
        return replace(state, trunk=Arrays(trunk), moments=moments, round=state.round + 1)
