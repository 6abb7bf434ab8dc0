"""Median, trimmed mean, multi-Krum: against slow oracles, with keys that only some sites have, and out of their depth."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests import laws
from trunkline.errors import QuorumError
from trunkline.protocol.messages import Update
from trunkline.protocol.plan import LocalPlan
from trunkline.strategies import build_strategy


def drawn(seed: int, sites: int, size: int = 5) -> list[Update]:
    rng = np.random.default_rng(seed)
    return [
        laws.update(f"s{site:02d}", {"w": rng.normal(size=size).astype(np.float32)}, float(rng.integers(1, 1000)))
        for site in range(sites)
    ]


@given(seed=st.integers(0, 10**6), sites=st.integers(1, 12), share=st.sampled_from([0.05, 0.2, 0.25, 0.4, 0.49]))
@settings(max_examples=60, deadline=None)
def test_median_and_trimmed_mean_are_what_sorting_by_hand_gives(seed: int, sites: int, share: float) -> None:
    updates = drawn(seed, sites)
    columns = np.stack([one.delta["w"] for one in updates]).T
    cut = min(int(np.ceil(share * sites)), (sites - 1) // 2)
    trimmed = [np.mean(sorted(column.tolist())[cut : sites - cut]) for column in columns]
    middle = [
        (sorted(column.tolist())[(sites - 1) // 2] + sorted(column.tolist())[sites // 2]) / 2 for column in columns
    ]
    got = build_strategy("trimmed_mean", {"share": share}, LocalPlan()).combine(iter(updates)).delta["w"]
    np.testing.assert_allclose(got, trimmed, rtol=1e-6, atol=1e-7)
    got = build_strategy("median", {}, LocalPlan()).combine(iter(updates)).delta["w"]
    np.testing.assert_allclose(got, middle, rtol=1e-6, atol=1e-7)


def krum_by_hand(points: np.ndarray, f: int, m: int) -> np.ndarray:
    near = len(points) - f - 2
    scores = []
    for one in points:
        distances = sorted(float(np.sum((one - other) ** 2)) for other in points)
        scores.append(sum(distances[1 : near + 1]))  # the first is the distance to itself
    return points[sorted(range(len(points)), key=scores.__getitem__)[:m]].mean(axis=0)


@given(seed=st.integers(0, 10**6), f=st.integers(0, 3), more=st.integers(3, 6), m=st.integers(1, 3))
@settings(max_examples=60, deadline=None)
def test_multikrum_is_what_the_paper_says(seed: int, f: int, more: int, m: int) -> None:
    updates = drawn(seed, 2 * f + more)
    points = np.stack([one.delta["w"] for one in updates]).astype(np.float64)
    got = build_strategy("multikrum", {"f": f, "m": m}, LocalPlan()).combine(iter(updates)).delta["w"]
    np.testing.assert_allclose(got, krum_by_hand(points, f, min(m, len(points) - f - 2)), rtol=1e-6, atol=1e-7)


def test_multikrum_with_too_few_sites_for_its_promise_stops_and_says_what_to_do() -> None:
    strategy = build_strategy("multikrum", {"f": 2}, LocalPlan())
    with pytest.raises(QuorumError, match=r"f = 2 liars needs at least 7 sites; 6 were admitted.*lower `f`"):
        strategy.combine(iter(drawn(0, 6)))
    assert strategy.combine(iter(drawn(0, 7))).delta["w"].shape == (5,)


@pytest.mark.parametrize("name", ["median", "trimmed_mean", "multikrum"])
def test_a_key_is_voted_on_by_the_sites_that_have_it(name: str) -> None:
    head = np.array([2.0], np.float32)
    updates = [
        laws.update(f"s{site}", {"trunk.w": np.ones(3, np.float32)} | ({"head.rul.w": head} if site < 2 else {}))
        for site in range(5)
    ]
    combined = build_strategy(name, {}, LocalPlan()).combine(iter(updates))
    np.testing.assert_array_equal(combined.delta["trunk.w"], np.ones(3, np.float32))
    np.testing.assert_array_equal(combined.delta["head.rul.w"], head)
    assert combined.weights["head.rul.w"] == 2.0


def test_multikrum_leaves_alone_what_no_chosen_site_has() -> None:
    """The one site with a head of its own is also the odd one out: its head stays where it was."""
    updates = [laws.update(f"s{site}", {"trunk.w": np.full(3, 0.01 * site, np.float32)}) for site in range(6)]
    updates.append(laws.update("odd", {"trunk.w": np.full(3, 9.0, np.float32), "head.x.w": np.ones(1, np.float32)}))
    assert list(build_strategy("multikrum", {}, LocalPlan()).combine(iter(updates)).delta) == ["trunk.w"]


@pytest.mark.parametrize("name", ["median", "trimmed_mean", "multikrum"])
def test_a_claimed_weight_or_metric_counts_once(name: str) -> None:
    strategy = build_strategy(name, {}, LocalPlan())
    rng = np.random.default_rng(0)
    deltas = [{"w": rng.normal(size=3).astype(np.float32)} for _ in range(7)]
    modest = [laws.update(f"s{site}", delta, 1.0, train_loss=1.0) for site, delta in enumerate(deltas)]
    boastful = [laws.update(f"s{site}", delta, 10.0**site, train_loss=1.0) for site, delta in enumerate(deltas)]
    assert strategy.combine(iter(modest)).delta.digest() == strategy.combine(iter(boastful)).delta.digest()
    assert strategy.combine(iter(boastful)).metrics == {"train_loss": 1.0}
