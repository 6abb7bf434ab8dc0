from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests import laws
from trunkline.errors import ConfigError, ContractError
from trunkline.protocol.arrays import Arrays
from trunkline.protocol.messages import Update
from trunkline.protocol.plan import LocalPlan, TrunkSpec
from trunkline.strategies import STRATEGIES, build_strategy
from trunkline.strategies.exact_sum import ExactNumber, ExactSum
from trunkline.strategies.streaming import Streamed, weighted_mean

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
    rounds = [drawn_updates(1000 * seed + round) for round in range(5)]
    laws.assert_order_does_not_matter(strategy, strategy.start(TRUNK), rounds)


@pytest.mark.parametrize("name", sorted(STRATEGIES))
def test_equal_updates_are_handled_alike(name: str) -> None:
    strategy = build_strategy(name, {}, LocalPlan())
    laws.assert_no_change_is_a_fixed_point(strategy, strategy.start(TRUNK))
    laws.assert_agreement_moves_every_weighting_alike(strategy, strategy.start(TRUNK))


@pytest.mark.parametrize("name", sorted(STRATEGIES))
@pytest.mark.parametrize("seed", range(3))
def test_combining_follows_the_scale(name: str, seed: int) -> None:
    laws.assert_combining_follows_the_scale(build_strategy(name, {}, LocalPlan()), drawn_updates(seed))


def lies(seed: int) -> list[Update]:
    rng = np.random.default_rng(seed)
    honest = honest_updates(seed)
    mean = {name: np.mean([one.delta[name] for one in honest], axis=0) for name in TRUNK}
    told = [
        {name: np.full_like(array, 9999.0) for name, array in TRUNK.items()},
        {name: (rng.normal(size=array.shape) * 1e3).astype(np.float32) for name, array in TRUNK.items()},
        {name: (-100 * mean[name]).astype(np.float32) for name in TRUNK},
        {name: np.zeros_like(array) for name, array in TRUNK.items()},
    ]
    # a first and a last name: ties and sorting must not favour it; the largest weight that is admitted
    return [laws.update(site, lie, 100_000.0) for lie in told for site in ("a-liar", "z-liar")]


def honest_updates(seed: int) -> list[Update]:
    rng = np.random.default_rng(100 + seed)
    common = {name: rng.normal(size=array.shape) for name, array in TRUNK.items()}
    return [
        laws.update(
            f"site-{site}",
            {
                name: (common[name] + 0.3 * rng.normal(size=array.shape)).astype(np.float32)
                for name, array in TRUNK.items()
            },
            float(rng.integers(1, 100)),
        )
        for site in range(6)
    ]


@pytest.mark.parametrize("name", [name for name, kind in sorted(STRATEGIES.items()) if kind.robust])
@pytest.mark.parametrize("seed", range(5))
def test_one_liar_is_bounded_where_that_is_claimed(name: str, seed: int) -> None:
    for lie in lies(seed):
        laws.assert_one_liar_is_bounded(build_strategy(name, {}, LocalPlan()), honest_updates(seed), lie)


@pytest.mark.parametrize("name", ["fedavg", "conflict_averse"])
def test_the_liar_law_finds_what_is_not_robust(name: str) -> None:
    """Guards the guard: the same lies move a mean beyond the bound."""
    with pytest.raises(AssertionError):
        laws.assert_one_liar_is_bounded(build_strategy(name, {}, LocalPlan()), honest_updates(0), lies(0)[0])


def test_a_plain_float_sum_would_break_the_order_law() -> None:
    """Guards the guard: the drawn updates are such that summing floats in another order does change bytes."""
    updates = drawn_updates(0)
    forward = sum(one.delta["trunk.b"] * np.float32(one.weight) for one in updates)
    backward = sum(one.delta["trunk.b"] * np.float32(one.weight) for one in reversed(updates))
    assert forward.tobytes() != backward.tobytes()


@given(st.lists(st.floats(-(2.0**36), 2.0**36, allow_nan=False, width=32), min_size=1, max_size=50))
@settings(max_examples=200, deadline=None)
def test_the_exact_sum_is_exact(numbers: list[float]) -> None:
    total = ExactSum(())
    for number in numbers:
        total.add(np.asarray(np.float64(number)))
    exact = sum((Fraction(number) for number in numbers), Fraction(0))
    assert abs(Fraction(float(total.value())) - exact) <= Fraction(len(numbers), 2**53) + abs(exact) / 2**51


def test_the_exact_sum_carries_over_thousands_of_terms() -> None:
    total, other = ExactSum(()), ExactSum(())
    terms = [0.3 * (-1) ** place * 1.5 ** (place % 40) for place in range(5000)]
    for one, two in zip(terms, reversed(terms), strict=True):
        total.add(np.asarray(one))
        other.add(np.asarray(two))
    assert total.value() == other.value()
    exact = sum((Fraction(term) for term in terms), Fraction(0))
    assert abs(Fraction(float(total.value())) - exact) <= Fraction(5000, 2**53) + abs(exact) / 2**51


@pytest.mark.parametrize("bad", [np.nan, np.inf, 2.0**53])
def test_the_exact_sum_refuses_what_it_cannot_hold(bad: float) -> None:
    with pytest.raises(ContractError):
        ExactSum((2,)).add(np.array([0.0, bad]))


def test_the_exact_sum_refuses_terms_that_only_together_are_more_than_it_holds() -> None:
    """Without a word it would begin again at the other end of what 64 bits hold."""
    total = ExactSum((2,))
    for _ in range(4):
        total.add(np.array([1.0, -(2.0**48.9)]))
    with pytest.raises(ContractError):
        total.add(np.array([1.0, -(2.0**48.9)]))
    assert total.value().tolist() == [4.0, -4 * 2.0**48.9]  # what was refused left nothing behind


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
    import weakref

    alive: list[weakref.ref[object]] = []

    def stream():
        for site in range(20):
            one = laws.update(f"s{site}", {"trunk.w": np.ones(1000, np.float32)})
            alive.append(weakref.ref(one))
            yield one
            del one
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


def test_fedyogi_comes_down_more_slowly_than_fedadam() -> None:
    """After one large update and many small ones Adam has forgotten the large one, Yogi has not: hand-computed squares."""
    large, small = {"w": np.full(1, 1.0, np.float32)}, {"w": np.full(1, 0.01, np.float32)}
    squares = {}
    for name in ("fedadam", "fedyogi"):
        strategy = build_strategy(name, {"tau": 0.001}, LocalPlan())
        state = laws.step(strategy, strategy.start(Arrays({"w": np.zeros(1, np.float32)})), [laws.update("a", large)])
        for _ in range(50):
            state = laws.step(strategy, state, [laws.update("a", small)])
        squares[name] = float(state.moments["square"]["w"][0])
    first = {"fedadam": 0.99e-6 + 0.01, "fedyogi": 1e-6 + 0.01}
    faded = first["fedadam"] * 0.99**50 + (1 - 0.99**50) * 1e-4
    assert squares["fedadam"] == pytest.approx(faded, rel=1e-4)
    assert squares["fedyogi"] == pytest.approx(first["fedyogi"] - 50 * 0.01 * 1e-4, rel=1e-4)


def test_fedavgm_adds_up_what_comes_again_and_cancels_what_turns() -> None:
    strategy = build_strategy("fedavgm", {"momentum": 0.5}, LocalPlan())
    push = {"w": np.array([1.0, 1.0], np.float32)}
    turn = {"w": np.array([1.0, -1.0], np.float32)}
    state = strategy.start(Arrays({"w": np.zeros(2, np.float32)}))
    for delta in (push, turn, push):
        state = laws.step(strategy, state, [laws.update("a", delta)])
    np.testing.assert_allclose(state.trunk["w"], [1 + 1.5 + 1.75, 1 - 0.5 + 0.75])


def test_plans_say_what_each_algorithm_does_at_the_site() -> None:
    babu = build_strategy("fedbabu", {"finish_steps": 7}, LocalPlan()).plan
    assert ([phase.parts for phase in babu.phases], babu.finish_steps, babu.finish_parts) == (
        [("stem", "trunk")],
        7,
        ("heads",),
    )
    assert build_strategy("ditto", {"pull": 0.3}, LocalPlan()).plan.personal == 0.3
    assert build_strategy("fedbn", {}, LocalPlan()).trunk(TrunkSpec(width=16)) == TrunkSpec(width=16, norm="private")
    grouped = build_strategy("fedbn", {"norm": "private-group"}, LocalPlan())
    assert grouped.trunk(TrunkSpec()).norm == "private-group"
    assert build_strategy("fedper", {}, LocalPlan()).trunk(TrunkSpec(width=16)) == TrunkSpec(width=16)
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


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 70), st.integers(0, 40), st.integers(0, 10**6), st.sampled_from([1e-12, 1e-3, 1.0, 3e3]))
def test_stacks_and_sums_of_sums_give_the_bits_of_one_by_one(sites: int, size: int, seed: int, scale: float) -> None:
    """However many sites are added at once, where, and in which order: the mean does not change by a bit."""
    draw = np.random.default_rng(seed)
    deltas = {name: (draw.normal(size=(sites, *shape)) * scale).astype(np.float32)
              for name, shape in (("trunk.w", (size, 3)), ("trunk.b", (size,)), ("trunk.s", ()))}  # fmt: skip
    weights = draw.integers(1, 100_000, sites).astype(np.float64)
    metrics = [{"train_loss": float(draw.normal()), **({"b": 1e-9} if place % 3 else {})} for place in range(sites)]
    updates = [
        replace(
            laws.update(f"s{place}", {name: rows[place] for name, rows in deltas.items()}, weights[place]),
            metrics=metrics[place],
        )
        for place in range(sites)
    ]
    plain = weighted_mean(updates)
    cut = int(draw.integers(0, sites + 1))
    parts: list[Streamed] = []
    for some in (range(cut), range(cut, sites)):
        if len(some):
            part = Streamed()
            rows = {name: array[list(some)] for name, array in deltas.items()}
            part.add_stack(plain.run, plain.round, rows, weights[list(some)], [metrics[place] for place in some])
            parts.append(part)
    mixed = weighted_mean([*parts[1:], *updates[:cut]] if cut and len(parts) > 1 else parts)
    for found in (mixed, weighted_mean(parts)):
        assert {name: one.tobytes() for name, one in found.delta.items()} == {
            name: one.tobytes() for name, one in plain.delta.items()
        }
        assert (found.weight, dict(found.metrics), dict(found.weights)) == (
            plain.weight,
            dict(plain.metrics),
            dict(plain.weights),
        )


def test_fedrep_goes_as_far_beyond_the_mean_as_its_server_rate_says() -> None:
    trunk = Arrays({"w": np.zeros(2, np.float32), "kept": np.ones(1, np.float32)})
    updates = [laws.update("a", {"w": np.array([1.0, -2.0], np.float32)})]
    for rate in (1.0, 2.5):
        strategy = build_strategy("fedrep", {"server_rate": rate}, LocalPlan())
        state = laws.step(strategy, strategy.start(trunk), updates)
        np.testing.assert_allclose(state.trunk["w"], [rate, -2.0 * rate])
        assert (state.trunk["w"].dtype, state.trunk["kept"][0]) == (np.float32, 1.0)


@pytest.mark.parametrize("name", sorted(STRATEGIES))
def test_a_second_pass_begins_as_the_first_with_its_rounds_counted_on(name: str) -> None:
    strategy = build_strategy(name, {}, LocalPlan())
    state = laws.step(strategy, strategy.start(TRUNK), drawn_updates(3))
    again = strategy.restart(state, TRUNK)
    assert again.round == 1
    assert laws.bytes_of(replace(again, round=0)) == laws.bytes_of(strategy.start(TRUNK))


@pytest.mark.parametrize("term", [2.0**52, -(2.0**53), float("inf"), float("nan")])
def test_an_exact_number_refuses_what_its_units_cannot_hold(term: float) -> None:
    total = ExactNumber()
    with pytest.raises(ContractError, match=r"expected a number below 2\^52"):
        total.add(term)
    assert total.value() == 0.0


def test_sums_of_many_processes_are_merged_without_overflow() -> None:
    total, part = ExactSum((2,)), ExactSum((2,))
    part.add(np.array([0.75, -0.5], np.float32))
    for _ in range(3 * ExactSum.CARRY_EVERY):
        total.merge(part)
    assert total.value().tolist() == [0.75 * 3 * ExactSum.CARRY_EVERY, -0.5 * 3 * ExactSum.CARRY_EVERY]
