"""The laws every strategy keeps, stated once; a new strategy is tested by being in the table."""

from collections.abc import Sequence

import numpy as np

from trunkline.protocol.arrays import Arrays
from trunkline.protocol.messages import Update
from trunkline.strategies.strategy import Averaging, StrategyState


def update(site: str, delta: dict[str, np.ndarray], weight: float = 1.0, **metrics: float) -> Update:
    return Update(site=site, run="r", round=1, delta=Arrays(delta), weight=weight, metrics=metrics)


def step(strategy: Averaging, state: StrategyState, updates: Sequence[Update]) -> StrategyState:
    return strategy.advance(state, iter(updates))[0]


def bytes_of(state: StrategyState) -> tuple[object, ...]:
    """All a checkpoint would hold, comparable: the trunk, what is remembered, and what is noted."""
    moments = [(name, arrays.digest()) for name, arrays in sorted(state.moments.items())]
    return state.trunk.digest(), moments, state.notes, state.round


def assert_order_does_not_matter(strategy: Averaging, state: StrategyState, rounds: Sequence[Sequence[Update]]) -> None:
    """Byte-equal, not close, over several rounds: deployment, Ray and loopback promise the same trunk."""

    def after(order: str) -> StrategyState:
        ended = state
        for updates in rounds:
            came = list(updates)
            if order == "reversed":
                came.reverse()
            elif order == "shuffled":
                came.sort(key=lambda one: hash(one.site))
            ended = step(strategy, ended, came)
        return ended

    forward = bytes_of(after("as sent"))
    assert bytes_of(after("reversed")) == forward
    assert bytes_of(after("shuffled")) == forward


def assert_no_change_is_a_fixed_point(strategy: Averaging, state: StrategyState) -> None:
    """Sites that learnt nothing leave the trunk where it is, this round and the next ones."""
    still = {name: np.zeros_like(array) for name, array in state.trunk.items()}
    after = state
    for _ in range(5):
        after = step(strategy, after, [update("a", still), update("b", still, 7.0)])
    assert after.trunk.digest() == state.trunk.digest()
    assert after.round == state.round + 5
    for site in ("a", "b", "never seen"):
        assert strategy.serve(after, site).digest() == state.trunk.digest()


def assert_agreement_moves_every_weighting_alike(strategy: Averaging, state: StrategyState) -> None:
    """When all sites send the same change, how they are weighted is of no consequence."""
    rng = np.random.default_rng(3)
    delta = {name: rng.normal(size=array.shape).astype(array.dtype) for name, array in state.trunk.items()}
    one = step(strategy, state, [update("a", delta)])
    many = step(strategy, state, [update("a", delta, 3.0), update("b", delta, 1000.0), update("c", delta, 0.5)])
    for name in state.trunk:
        np.testing.assert_allclose(many.trunk[name], one.trunk[name], rtol=1e-6, atol=1e-7)


def assert_combining_follows_the_scale(strategy: Averaging, updates: Sequence[Update]) -> None:
    """Changes twice as large combine to twice the change; a power of two, so that not even rounding differs."""
    for factor in (2.0, 2.0**-10):
        larger = [
            update(one.site, {name: array * np.float32(factor) for name, array in one.delta.items()}, one.weight)
            for one in updates
        ]
        plain, scaled = strategy.combine(iter(updates)).delta, strategy.combine(iter(larger)).delta
        assert list(plain) == list(scaled)
        for name in plain:
            np.testing.assert_allclose(scaled[name], plain[name] * factor, rtol=2e-6, atol=1e-9 * factor)


def assert_one_liar_is_bounded(strategy: Averaging, honest: Sequence[Update], lie: Update) -> None:
    """Whatever one site sends, the outcome stays as near to the honest sites as these are to each other.

    The bound is the honest sites' own: the widest they differ in any number, in every number at once. It does not
    depend on the lie, and neither the size of the lie nor the weight it claims moves it.
    """
    combined = strategy.combine(iter([*honest, lie])).delta
    for name in honest[0].delta:
        told = np.stack([one.delta[name] for one in honest]).astype(np.float64)
        width = float(np.ptp(told, axis=0).max()) * np.sqrt(sum(array.size for array in honest[0].delta.values()))
        assert (np.abs(combined[name] - told.mean(axis=0)) <= width).all()
