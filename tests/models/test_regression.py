"""Numbers in the label's own unit."""

import math

import numpy as np
import polars as pl
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from trunkline.config.tasks import TaskConfig
from trunkline.errors import DataError
from trunkline.models.tasks import make_task
from trunkline.models.tasks.regression import Regression

NAN = float("nan")


def task(**keys: object) -> Regression:
    made = make_task("rul", TaskConfig(kind="regression", target="rul", **keys))  # type: ignore[arg-type]
    assert isinstance(made, Regression)
    return made


def f32(*values: float) -> np.ndarray:
    return np.array(values, np.float32)


numbers = st.floats(-300, 300, width=32)


@settings(deadline=None)
@given(
    rows=st.lists(st.tuples(numbers, numbers), min_size=2, max_size=30),
    cap=st.sampled_from([None, 50.0, 125.0]),
)
@example(rows=[(0.0, 0.0), (0.0, 0.0078125)], cap=None)  # squares of labels that are small in their unit
def test_metrics_equal_a_slow_oracle(rows: list[tuple[float, float]], cap: float | None) -> None:
    measured = task(unit="cycles", cap=cap).measure(
        f32(*(guess for guess, _ in rows)), f32(*(true for _, true in rows))
    )
    capped = [(guess, true if cap is None else min(true, cap)) for guess, true in rows]
    miss = [guess - true for guess, true in capped]
    expected = {
        "rmse": math.sqrt(sum(d * d for d in miss) / len(miss)),
        "rmse_uncapped": math.sqrt(sum((guess - true) ** 2 for guess, true in rows) / len(rows)),
        "mae": sum(map(abs, miss)) / len(miss),
        "nasa_score": sum(math.exp(-d / 13) - 1 if d < 0 else math.exp(d / 10) - 1 for d in miss),
    }
    for name, value in expected.items():
        assert measured[name] == pytest.approx(value, rel=1e-6, abs=1e-9), name
    truths = np.array([true for _, true in capped], np.float64)
    if np.ptp(truths) == 0:
        assert measured["r2"] is None
    elif np.ptp(truths) > 1e-3:
        r2 = 1 - sum(d * d for d in miss) / sum((truths - truths.mean()) ** 2)
        assert measured["r2"] == pytest.approx(r2, rel=1e-6, abs=1e-9)


def test_nasa_score_by_hand_and_only_for_cycles() -> None:
    # 13 early: e - 1; 10 late: e - 1; 26 early: e^2 - 1; exact: 0
    measured = task(unit="cycles").measure(f32(87, 110, 74, 100), f32(100, 100, 100, 100))
    assert measured["nasa_score"] == pytest.approx(2 * (math.e - 1) + math.e**2 - 1)
    assert "nasa_score" not in task(unit="hours").measure(f32(1), f32(1))


def test_a_hopeless_prediction_has_no_nasa_score_but_an_rmse() -> None:
    measured = task(unit="cycles").measure(f32(1e5, 0), f32(0, 0))
    assert measured["nasa_score"] is None
    assert measured["rmse"] == pytest.approx(1e5 / math.sqrt(2))


def test_the_cap_holds_for_training_labels_and_predictions_but_not_below() -> None:
    one = task(cap=100.0)
    one.fit(f32(50, 100, 180, NAN, 300))
    assert one.mean == pytest.approx(np.mean([50, 100, 100, 100]))
    assert one.std == pytest.approx(np.std([50, 100, 100, 100]))
    prediction = one.predict(torch.tensor([[-50.0], [0.0], [50.0]]))
    assert prediction.tolist() == pytest.approx([one.mean - 50 * one.std, one.mean, 100.0])
    zero = one.loss(torch.full((2, 1), (100 - one.mean) / one.std), torch.tensor([100.0, 250.0]))
    assert float(zero) == pytest.approx(0.0, abs=1e-10)


@settings(deadline=None)
@given(st.lists(numbers, min_size=1, max_size=20), st.sampled_from(["huber", "mse", "pinball"]))
def test_predicting_the_label_is_no_loss_and_scores_perfectly(values: list[float], loss: str) -> None:
    one = task(loss=loss, cap=250.0)
    one.fit(f32(*values))
    exact = (np.minimum(f32(*values), 250.0) - one.mean) / one.std
    output = torch.from_numpy(exact.astype(np.float32))[:, None]
    assert float(one.loss(output, torch.from_numpy(f32(*values)))) == pytest.approx(0.0, abs=1e-4)
    assert one.score(one.predict(output), f32(*values)) == pytest.approx(0.0, abs=1e-3)


@pytest.mark.parametrize(
    ("loss", "expected"),
    [  # misses of 0.5 and -3 standard deviations, truth minus output
        ("huber", (0.5 * 0.5**2 + (3.0 - 0.5)) / 2),
        ("mse", (0.5**2 + 3.0**2) / 2),
        ("pinball", (0.9 * 0.5 + 0.1 * 3.0) / 2),
    ],
)
def test_each_loss_is_its_formula(loss: str, expected: float) -> None:
    one = task(loss=loss, quantile=0.9)
    one.mean, one.std = 10.0, 2.0
    output = torch.tensor([[0.0], [3.0], [7.0]])
    assert float(one.loss(output, torch.tensor([11.0, 10.0, NAN]))) == pytest.approx(expected)


def test_pinball_learns_the_quantile() -> None:
    one = task(loss="pinball", quantile=0.8)
    one.mean, one.std = 0.0, 1.0
    labels = torch.linspace(0, 1, 101)
    grid = torch.linspace(0, 1, 201)
    losses = [float(one.loss(value.expand(101, 1), labels)) for value in grid]
    assert float(grid[int(np.argmin(losses))]) == pytest.approx(0.8, abs=0.011)


def test_equal_labels_do_not_blow_up() -> None:
    one = task()
    one.fit(f32(0.1, 0.1, 0.1))
    loss = one.loss(torch.zeros(3, 1), torch.from_numpy(f32(0.1, 0.1, 0.1)))
    assert one.std == 1.0
    assert float(loss) < 1e-6


@pytest.mark.parametrize(
    ("column", "expected"),
    [
        (pl.Series("rul", [1, None, 3]), [1, NAN, 3]),
        (pl.Series("rul", [1.5, NAN, None]), [1.5, NAN, NAN]),
        (pl.Series("rul", [" 1.5", "", "NaN", "n/a", "-2e3", None]), [1.5, NAN, NAN, NAN, -2000, NAN]),
        (pl.Series("rul", [None, None]), [NAN, NAN]),
        (pl.Series("rul", [True, False]), [1, 0]),
    ],
)
def test_blank_cells_are_missing_labels(column: pl.Series, expected: list[float]) -> None:
    found = task().read(column, "a.csv")
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found, f32(*expected))


@pytest.mark.parametrize(
    ("column", "words"),
    [
        (pl.Series("rul", ["1", "", "12,5"]), r"press/a\.csv: column `rul`, data row 3: '12,5' is no.*a number.*empty"),
        (pl.Series("rul", [1.0, float("inf")]), r"press/a\.csv: column `rul`, data row 2: inf .*finite number"),
        (pl.Series("rul", [1.0, 1e39]), r"data row 2: 1e\+39 .*finite number"),
        (pl.Series("rul", [None, "2020-01-01"]).str.to_date(), r"data row 2: .*a number, not Date"),
    ],
)
def test_what_is_no_number_names_file_column_row_value_and_remedy(column: pl.Series, words: str) -> None:
    with pytest.raises(DataError, match=words):
        task().read(column, "press/a.csv")


def test_without_an_intercept_nothing_in_gives_nothing_out() -> None:
    one = task(intercept=False)
    one.fit(np.array([3.0, 4.0, NAN], np.float32))
    assert (one.mean, one.std) == (0.0, pytest.approx(np.sqrt(12.5)))
    head = one.head(5)
    assert float(one.predict(head(torch.zeros(1, 5)))[0]) == 0.0
    assert float(task().predict(task().head(5)(torch.zeros(1, 5)))[0]) != 0.0
