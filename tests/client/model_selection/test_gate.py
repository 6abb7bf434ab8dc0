"""The gate's rule, on drawn worlds whose truth is known: what it costs, and whom it sends back to training alone."""

from collections.abc import Mapping

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from trunkline.client.model_selection.gate import BLOCKS, UNITS, Tried, choose, units
from trunkline.config.tasks import TaskConfig
from trunkline.models.tasks import make_task

RUL = make_task("rul", TaskConfig(kind="regression", target="rul"))
FAULT = make_task("fault", TaskConfig(kind="binary", target="fault"))
ROWS = 4  # a group
Errors = Mapping[str, NDArray[np.float64]]


def decided(errors: Errors, half: tuple[str, ...] = ()) -> str:
    """What the gate uses of models that miss a group's rows by these (groups,) amounts; labels are all 0."""
    groups = np.repeat(np.arange(len(next(iter(errors.values()))), dtype=np.int32), ROWS)
    labels = np.zeros(len(groups), np.float32)
    tried = {}
    for name, error in errors.items():
        prediction = np.repeat(error, ROWS).astype(np.float32)
        tried[name] = Tried(RUL, prediction, RUL.score(prediction, labels), half=name in half)
    return choose(tried, labels, groups)


def plant(draw: np.random.Generator, groups: int, gain: float) -> Errors:
    """Errors by group around 14, of which both models share the group's difficulty; the federated one is better by
    `gain` in truth, in standard deviations of the groups' differences (6, as measured between turbofans)."""
    hard = 14.0 + draw.normal(0.0, 2.0, groups)
    noise = draw.normal(0.0, 6.0 / np.sqrt(2.0), (2, groups))
    return {"local": np.abs(hard + noise[0]), "federated": np.abs(hard + noise[1] - 6.0 * gain)}


@pytest.mark.parametrize("groups", [2, 3, 8, 40])
def test_over_a_mixture_of_worlds_the_gate_costs_a_few_percent_of_the_noise_and_less_than_any_fixed_choice(
    groups: int,
) -> None:
    draw = np.random.default_rng(groups)
    # most plants gain, some lose, some are unrelated and lose a lot: in standard deviations of the groups' differences
    worlds = draw.choice(
        [1.0, 0.5, 0.2, 0.0, -0.2, -0.5, -2.0, -4.0], 500, p=[0.2, 0.2, 0.15, 0.1, 0.1, 0.1, 0.1, 0.05]
    )
    regret: dict[str, list[float]] = {"gate": [], "local": [], "federated": []}
    for gain in worlds:
        chosen = decided(plant(draw, groups, gain))
        for who in regret:
            used = chosen if who == "gate" else who
            regret[who].append(max(gain, 0.0) - (gain if used == "federated" else 0.0))
    mean = {who: float(np.mean(each)) for who, each in regret.items()}
    assert mean["gate"] < {2: 0.16, 3: 0.12, 8: 0.06, 40: 0.02}[groups]
    assert mean["gate"] < 0.5 * min(mean["local"], mean["federated"])


def test_sixteen_small_plants_that_gain_are_not_thrown_back_by_two_noisy_validation_engines() -> None:
    draw = np.random.default_rng(0)
    back = sum(decided(plant(draw, 2, gain=0.8)) == "local" for _ in range(100 * 16))
    better = sum(RUL_better(plant(draw, 2, gain=0.8)) for _ in range(100 * 16))
    assert back / 100 < 0.15  # plants thrown back in a fleet of sixteen
    assert back < 0.15 * better  # "the lower figure wins" throws back many times as many


def RUL_better(errors: Errors) -> bool:  # noqa: N802
    return bool(np.square(errors["local"]).mean() < np.square(errors["federated"]).mean())


def cost_of_choices(groups: int, *, half: bool) -> tuple[float, float]:
    """What the gate's choice costs over the best of three models, and over training alone: RMSE in percent of it.

    Both models share an error of 13 a group; 5 more is each model's own, and an ensemble halves its square. One of the
    two is up to 60 % worse in truth.
    """
    draw = np.random.default_rng(groups)
    shared, own = 13.0, 5.0
    whole = float(np.hypot(shared, own))
    over_best, over_local = [], []
    for ratio in draw.choice([0.7, 0.8, 0.9, 0.95, 1.0, 1.05, 1.1, 1.3, 1.6], 300):
        alone = np.sqrt((whole / ratio) ** 2 - shared**2) if ratio < 1.0 else own
        joined = np.sqrt((whole * ratio) ** 2 - shared**2) if ratio > 1.0 else own
        spread = {"local": alone, "federated": joined, "ensemble": np.hypot(alone, joined) / 2.0}
        truth = {name: np.hypot(shared, one) for name, one in spread.items()}
        hard, first, second = draw.normal(0.0, 1.0, (3, groups)) * np.array([[shared], [alone], [joined]])
        errors = {"local": hard + first, "federated": hard + second, "ensemble": hard + (first + second) / 2.0}
        chosen = truth[decided(errors, half=("ensemble",) if half else ())]
        over_best.append(chosen / min(truth.values()) - 1.0)
        over_local.append(max(0.0, chosen / truth["local"] - 1.0))
    return 100.0 * float(np.mean(over_best)), 100.0 * float(np.mean(over_local))


@pytest.mark.parametrize("groups", [2, 8, 40, 100])
def test_an_ensemble_is_believed_sooner_than_a_switch_and_that_costs_less_in_every_way(groups: int) -> None:
    best, local = cost_of_choices(groups, half=True)
    as_any_other = cost_of_choices(groups, half=False)
    assert best < 0.9 * as_any_other[0]
    assert local < 0.9 * as_any_other[1]


@pytest.mark.parametrize(("groups", "least"), [(2, 0.9), (4, 0.99), (20, 1.0)])
def test_an_unrelated_plant_keeps_the_model_it_trained_alone(groups: int, least: float) -> None:
    draw = np.random.default_rng(1)
    kept = [decided(plant(draw, groups, gain=-3.0)) == "local" for _ in range(200)]
    assert np.mean(kept) >= least


def test_two_engines_that_agree_by_chance_are_not_believed() -> None:
    """What a real plant with two validation engines showed: 6.1 cycles better on both of them, and 8.3 worse on the test."""
    seen = {"federated": np.array([24.0, 22.0]), "local": np.array([17.9, 15.9])}
    assert decided(seen) == "federated"
    assert decided({name: np.tile(error, 8) for name, error in seen.items()}) == "local"  # sixteen engines are


def test_between_equal_models_joining_is_the_default_however_many_groups_there_are() -> None:
    draw = np.random.default_rng(2)
    for groups in (2, 10, 100):
        away = np.mean([decided(plant(draw, groups, gain=0.0)) == "local" for _ in range(300)])
        assert away < 0.17, groups


def test_more_candidates_that_are_no_better_tempt_nobody_far() -> None:
    """Every candidate more is another chance to look better by luck; near relatives of the federated model move little."""
    draw = np.random.default_rng(3)
    true = []
    for _ in range(300):
        errors = dict(plant(draw, 6, gain=0.5))
        for name in ("finetuned", "fused", "ensemble"):
            errors[name] = np.abs(errors["federated"] + draw.normal(0.0, 1.2, 6))  # as good as federated in truth
        chosen = decided(errors)
        true.append(0.5 if chosen != "local" else 0.0)
    assert np.mean(true) > 0.48


def test_of_several_that_are_better_beyond_noise_the_best_is_used() -> None:
    draw = np.random.default_rng(4)
    alone = 10.0 + draw.normal(0, 1.0, 30)
    errors = {"federated": alone + 5.0, "ensemble": alone + 1.0, "local": alone + draw.normal(0.0, 0.3, 30)}
    assert decided(errors) == "local"
    assert decided({**errors, "ensemble": alone - 1.0}) == "ensemble"


def test_nothing_to_choose_by_keeps_the_federated_model() -> None:
    nothing = np.full(6, np.nan, np.float32)
    groups = np.zeros(6, np.int32)
    tried = {name: Tried(RUL, np.zeros(6, np.float32), None) for name in ("local", "federated")}
    assert choose(tried, nothing, groups) == "federated"
    one_row = np.array([1.0, *nothing[:5]], np.float32)
    apart = {"local": 1.0, "federated": 9.0}
    tried = {name: Tried(RUL, np.full(6, value, np.float32), abs(value - 1.0)) for name, value in apart.items()}
    assert choose(tried, one_row, groups) == "federated"  # a single row says nothing about noise


def test_a_model_that_diverged_is_no_candidate() -> None:
    labels, groups = np.zeros(6, np.float32), np.arange(6, dtype=np.int32)
    tried = {
        "local": Tried(RUL, np.ones(6, np.float32), 1.0),
        "federated": Tried(RUL, np.full(6, np.nan, np.float32), None),
        "ensemble": Tried(RUL, np.full(6, np.nan, np.float32), None),
    }
    assert choose(tried, labels, groups) == "local"


def test_a_metric_that_some_groups_alone_cannot_have_is_judged_over_the_rest() -> None:
    """F1 is undefined without a positive row; here one group holds all of them, and then nothing can be left out."""
    labels = np.repeat([0.0, 0.0, 0.0, 1.0], 5).astype(np.float32)
    groups = np.repeat(np.arange(4, dtype=np.int32), 5)
    right, wrong = labels.copy(), np.ones(20, np.float32)
    tried = {"local": Tried(FAULT, right, 1.0), "federated": Tried(FAULT, wrong, FAULT.score(wrong, labels))}
    assert choose(tried, labels, groups) == "local"  # three groups can be left out in turn
    tried = {name: Tried(FAULT, one.prediction, one.score) for name, one in tried.items()}
    assert choose(tried, labels, np.repeat(np.array([0, 1], np.int32), 10)) == "federated"  # one of two: no noise known


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 120), st.integers(1, 7), st.integers(0, 3))
def test_parts_hold_every_row_that_counts_once_and_split_no_group(groups: int, rows: int, seed: int) -> None:
    member = np.repeat(np.arange(groups, dtype=np.int32), rows)
    counts = np.random.default_rng(seed).random(len(member)) > 0.3
    parts = units(counts, member)
    held = np.concatenate(parts) if parts else np.empty(0, int)
    assert sorted(held.tolist()) == np.flatnonzero(counts).tolist()
    present = np.unique(member[counts])
    if len(present) > 1:
        assert len(parts) == min(len(present), UNITS)
        assert sum(len(np.unique(member[part])) for part in parts) == len(present)
    else:  # one machine over time: stretches without gaps between them
        assert len(parts) <= BLOCKS
        assert all(np.all(np.diff(np.searchsorted(np.flatnonzero(counts), part)) == 1) for part in parts)
