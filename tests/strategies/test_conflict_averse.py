import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize

from tests import laws
from trunkline.protocol.messages import Update
from trunkline.protocol.plan import LocalPlan
from trunkline.strategies import build_strategy
from trunkline.strategies.conflict_averse import resolve_conflicts
from trunkline.strategies.streaming import weighted_mean

STRATEGY = build_strategy("conflict_averse", {}, LocalPlan())


def of(rows: np.ndarray, weights: np.ndarray | None = None) -> list[Update]:
    weights = np.ones(len(rows)) if weights is None else weights
    return [
        laws.update(f"s{place:02d}", {"a": row[:2].astype(np.float32), "b": row[2:].astype(np.float32)}, float(weight))
        for place, (row, weight) in enumerate(zip(rows, weights, strict=True))
    ]


@given(
    seed=st.integers(0, 10**6), sites=st.integers(2, 8), rank=st.integers(1, 6), power=st.sampled_from([-3, 0, 2]),
    uneven=st.booleans(),
)  # fmt: skip
@settings(max_examples=80, deadline=None)
def test_no_site_is_worked_against(seed: int, sites: int, rank: int, power: int, uneven: bool) -> None:
    rng = np.random.default_rng(seed)
    rows = (rng.normal(size=(sites, rank)) @ rng.normal(size=(rank, 6)) * 10.0**power).astype(np.float32)
    if uneven:
        rows[0] *= 100.0
    updates = of(rows, rng.integers(1, 1000, sites))
    moved = STRATEGY.combine(iter(updates)).delta
    step = np.concatenate([moved["a"], moved["b"]]).astype(np.float64)
    products = rows.astype(np.float64) @ step
    sizes = np.linalg.norm(rows, axis=1) * max(np.linalg.norm(step), np.linalg.norm(rows, axis=1).max() / sites)
    assert (products >= -1e-5 * sizes).all()


@given(seed=st.integers(0, 10**6), sites=st.integers(2, 6))
@settings(max_examples=40, deadline=None)
def test_where_nothing_conflicts_it_is_the_weighted_mean_to_the_bit(seed: int, sites: int) -> None:
    rng = np.random.default_rng(seed)
    updates = of(np.abs(rng.normal(size=(sites, 6))), rng.integers(1, 1000, sites))
    assert STRATEGY.combine(iter(updates)).delta.digest() == weighted_mean(updates).delta.digest()


@pytest.mark.parametrize("seed", range(8))
def test_each_row_is_projected_as_a_general_solver_would(seed: int) -> None:
    """Oracle: the shortest J^T u with u >= e_i, by a bounded quasi-Newton search that knows nothing of gramians."""
    rows = np.random.default_rng(seed).normal(size=(4, 3))
    wanted = np.zeros(3)
    for place in range(4):
        start = np.eye(4)[place]
        found = minimize(
            lambda u: (np.sum((u @ rows) ** 2), 2 * rows @ (u @ rows)), start + 0.1, jac=True, method="L-BFGS-B",
            bounds=[(low, None) for low in start], options={"ftol": 1e-15, "gtol": 1e-10, "maxiter": 10_000},
        )  # fmt: skip
        wanted += found.x @ rows / 4
    got = resolve_conflicts(rows @ rows.T, np.full(4, 0.25)) @ rows
    np.testing.assert_allclose(got, wanted, atol=1e-5)


def test_a_minority_that_the_mean_would_hurt_is_not() -> None:
    """Nine sites pull one way, one pulls mostly back: the mean works against it, the merge does not."""
    rows = np.tile([1.0, 0.1, 0, 0, 0, 0], (10, 1))
    rows[9] = [-1.0, 1.0, 0, 0, 0, 0]
    updates = of(rows)
    mean, merged = (
        np.concatenate([delta["a"], delta["b"]])
        for delta in (weighted_mean(updates).delta, STRATEGY.combine(iter(updates)).delta)
    )
    assert mean @ rows[9] < -0.5
    assert merged @ rows[9] >= -1e-6
    assert merged @ rows[0] > 0.05


def test_an_array_only_some_have_is_averaged_as_ever() -> None:
    one = laws.update("a", {"t": np.array([1.0, 1.0], np.float32), "h": np.array([4.0], np.float32)})
    two = laws.update("b", {"t": np.array([-1.0, 1.0], np.float32)}, 3.0)
    combined = STRATEGY.combine(iter([one, two]))
    assert combined.delta["h"] == np.float32(4.0)
    assert combined.delta["t"] @ two.delta["t"] >= -1e-6
    assert combined.delta["t"] @ one.delta["t"] >= -1e-6
