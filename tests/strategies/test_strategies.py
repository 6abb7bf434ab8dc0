from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests import laws
from trunkline.errors import ConfigError, ContractError
from trunkline.exchange import Arrays, LocalPlan
from trunkline.strategies import STRATEGIES, build_strategy
from trunkline.strategies.strategy import ExactSum, weighted_mean

TRUNK = Arrays({"trunk.b": np.linspace(-1, 1, 6, dtype=np.float32).reshape(2, 3), "trunk.a": np.ones(4, np.float32)})


def drawn_updates(seed: int, sites: int = 7):
    rng = np.random.default_rng(seed)
    updates = []
    for site in range(sites):
        delta = {
            name: (rng.normal(size=array.shape) * 10.0 ** rng.integers(-6, 3)).astype(np.float32)
            for name, array in TRUNK.items()
        }
        updates.append(laws.update(f"s{site}", delta, float(rng.integers(1, 100_000)), train_loss=float(rng.random())))
    return updates


@pytest.mark.parametrize("name", sorted(STRATEGIES))
@pytest.mark.parametrize("seed", range(5))
def test_the_order_of_sites_changes_no_byte(name: str, seed: int) -> None:
    strategy = build_strategy(name, {}, LocalPlan())
    laws.assert_order_does_not_matter(strategy, strategy.start(TRUNK), drawn_updates(seed))


@pytest.mark.parametrize("name", sorted(STRATEGIES))
def test_equal_updates_are_handled_alike(name: str) -> None:
    strategy = build_strategy(name, {}, LocalPlan())
    laws.assert_no_change_is_a_fixed_point(strategy, strategy.start(TRUNK))
    laws.assert_agreement_moves_every_weighting_alike(strategy, strategy.start(TRUNK))


def test_a_plain_float_sum_would_break_the_order_law() -> None:
    """Guards the guard: the drawn updates are such that summing floats in another order does change bytes."""
    updates = drawn_updates(0)
    forward = sum(one.delta["trunk.b"] * np.float32(one.weight) for one in updates)
    backward = sum(one.delta["trunk.b"] * np.float32(one.weight) for one in reversed(updates))
    assert forward.tobytes() != backward.tobytes()


@given(st.lists(st.floats(-(2.0**40), 2.0**40, allow_nan=False, width=32), min_size=1, max_size=50))
@settings(max_examples=200, deadline=None)
def test_the_exact_sum_is_exact(numbers: list[float]) -> None:
    total = ExactSum(())
    for number in numbers:
        total.add(np.asarray(np.float64(number)))
    exact = sum((Fraction(number) for number in numbers), Fraction(0))
    assert abs(Fraction(float(total.value())) - exact) <= Fraction(len(numbers), 2**72) + abs(exact) / 2**51


def test_the_exact_sum_carries_over_thousands_of_terms() -> None:
    total, other = ExactSum(()), ExactSum(())
    terms = [0.3 * (-1) ** place * 1.5 ** (place % 40) for place in range(5000)]
    for one, two in zip(terms, reversed(terms), strict=True):
        total.add(np.asarray(one))
        other.add(np.asarray(two))
    assert total.value() == other.value()
    exact = sum((Fraction(term) for term in terms), Fraction(0))
    assert abs(Fraction(float(total.value())) - exact) <= Fraction(5000, 2**72) + abs(exact) / 2**51


@pytest.mark.parametrize("bad", [np.nan, np.inf, 2.0**43])
def test_the_exact_sum_refuses_what_it_cannot_hold(bad: float) -> None:
    with pytest.raises(ContractError):
        ExactSum((2,)).add(np.array([0.0, bad]))


def test_each_array_is_averaged_over_the_sites_that_have_it() -> None:
    one = laws.update("a", {"trunk.w": np.array([1.0], np.float32), "head.rul.w": np.array([5.0], np.float32)}, 1.0)
    two = laws.update("b", {"trunk.w": np.array([4.0], np.float32)}, 2.0)
    mean = weighted_mean([one, two])
    assert mean.delta["trunk.w"] == np.float32(3.0)
    assert mean.delta["head.rul.w"] == np.float32(5.0)
    assert mean.weights == {"head.rul.w": 1.0, "trunk.w": 3.0}
    assert mean.weight == 3.0


def test_a_mean_keeps_no_update() -> None:
    """Memory does not grow with sites: an update can be collected as soon as the next is asked for."""
    import gc
    import weakref

    alive: list[weakref.ref[object]] = []

    def stream():
        for site in range(20):
            one = laws.update(f"s{site}", {"trunk.w": np.ones(1000, np.float32)})
            alive.append(weakref.ref(one))
            yield one
            del one
            gc.collect()
            assert sum(ref() is not None for ref in alive) <= 1

    weighted_mean(stream())


def test_fedadam_takes_the_first_step_of_the_paper() -> None:
    strategy = build_strategy("fedadam", {"server_learning_rate": 0.1, "tau": 0.001}, LocalPlan())
    delta = np.full(4, 0.5, np.float32)
    after = laws.step(
        strategy, strategy.start(Arrays({"w": np.zeros(4, np.float32)})), [laws.update("a", {"w": delta})]
    )
    first, second = 0.1 * 0.5, 0.99 * 0.001**2 + 0.01 * 0.25
    np.testing.assert_allclose(after.trunk["w"], 0.1 * first / (np.sqrt(second) + 0.001), rtol=1e-5)


def test_plans_say_what_each_algorithm_does_at_the_site() -> None:
    assert build_strategy("fedprox", {"mu": 0.3}, LocalPlan()).plan.proximal == 0.3
    assert [phase.parts for phase in build_strategy("fedrep", {}, LocalPlan()).plan.phases] == [
        ("stem", "heads"),
        ("trunk",),
    ]
    assert build_strategy("local", {}, LocalPlan()).lends(("trunk",)) == ()
    assert build_strategy("fedavg", {}, LocalPlan()).lends(("trunk",)) == ("trunk", "stem", "heads")


def test_a_misspelt_strategy_or_option_names_the_nearest() -> None:
    with pytest.raises(ConfigError, match="did you mean 'fedrep'"):
        build_strategy("fedrap", {}, LocalPlan())
    with pytest.raises(ConfigError, match="did you mean 'mu'"):
        build_strategy("fedprox", {"muu": 1}, LocalPlan())
    with pytest.raises(ConfigError, match="greater than or equal to 0"):
        build_strategy("fedprox", {"mu": -1}, LocalPlan())
