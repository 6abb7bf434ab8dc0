"""The laws every strategy keeps, stated once; a new strategy is tested by being in the table."""

from collections.abc import Sequence

import numpy as np

from trunkline.exchange import Arrays, Update
from trunkline.strategies.strategy import State, Strategy


def update(site: str, delta: dict[str, np.ndarray], weight: float = 1.0, **metrics: float) -> Update:
    return Update(site=site, run="r", round=1, delta=Arrays(delta), weight=weight, metrics=metrics)


def step(strategy: Strategy, state: State, updates: Sequence[Update]) -> State:
    return strategy.step(state, strategy.combine(iter(updates)))


def assert_order_does_not_matter(strategy: Strategy, state: State, updates: Sequence[Update]) -> None:
    """Byte-equal, not close: deployment, Ray and loopback promise the same trunk."""
    forward = step(strategy, state, updates)
    for other in (list(reversed(updates)), sorted(updates, key=lambda one: hash(one.site))):
        assert step(strategy, state, other).trunk.digest() == forward.trunk.digest()


def assert_no_change_is_a_fixed_point(strategy: Strategy, state: State) -> None:
    """Sites that learnt nothing leave the trunk where it is."""
    still = {name: np.zeros_like(array) for name, array in state.trunk.items()}
    after = step(strategy, state, [update("a", still), update("b", still, 7.0)])
    assert after.trunk.digest() == state.trunk.digest()
    assert after.round == state.round + 1


def assert_agreement_moves_every_weighting_alike(strategy: Strategy, state: State) -> None:
    """When all sites send the same change, how they are weighted is of no consequence."""
    rng = np.random.default_rng(3)
    delta = {name: rng.normal(size=array.shape).astype(array.dtype) for name, array in state.trunk.items()}
    one = step(strategy, state, [update("a", delta)])
    many = step(strategy, state, [update("a", delta, 3.0), update("b", delta, 1000.0), update("c", delta, 0.5)])
    for name in state.trunk:
        np.testing.assert_allclose(many.trunk[name], one.trunk[name], rtol=1e-6, atol=1e-7)
