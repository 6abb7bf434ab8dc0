"""Probabilities that mean what they say: fitted on validation, never at the price of an order."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchmetrics.functional.classification import binary_calibration_error

from trunkline.config.tasks import TaskConfig
from trunkline.models.tasks import make_task
from trunkline.models.tasks.binary import Binary
from trunkline.models.tasks.calibration import ENOUGH, SHARPEST, calibration_error, logit, platt, sigmoid, temperature
from trunkline.models.tasks.multiclass import Multiclass

NAN = float("nan")


def yes_or_no(**settings: object) -> Binary:
    made = make_task("leak", TaskConfig.model_validate({"kind": "binary", "target": "leak", **settings}))
    assert isinstance(made, Binary)
    return made


def one_of(classes: int, **settings: object) -> Multiclass:
    names = tuple(f"c{place}" for place in range(classes))
    made = make_task(
        "fault", TaskConfig.model_validate({"kind": "multiclass", "target": "fault", "classes": names, **settings})
    )
    assert isinstance(made, Multiclass)
    return made


def drawn(rows: int, seed: int, slope: float = 1.0, shift: float = 0.0) -> tuple[np.ndarray, np.ndarray]:
    """Log-odds z of a model, and labels whose log-odds really are slope * z + shift."""
    draw = np.random.default_rng(seed)
    z = draw.normal(0.0, 2.0, rows)
    return z, draw.random(rows) < sigmoid(slope * z + shift)


def log_loss(probability: np.ndarray, truth: np.ndarray) -> float:
    return float(-np.log(np.where(truth, probability, 1 - probability).clip(1e-12)).mean())


@settings(deadline=None)
@given(st.lists(st.tuples(st.floats(0, 1), st.booleans()), min_size=1, max_size=60))
def test_calibration_error_equals_a_bin_by_bin_oracle(rows: list[tuple[float, bool]]) -> None:
    confidence, truth = np.array([p for p, _ in rows]), np.array([t for _, t in rows])
    total = 0.0
    for low in np.arange(15) / 15:
        inside = (confidence > low) & (confidence <= low + 1 / 15) | (low == 0) & (confidence == 0)
        if inside.any():
            total += inside.sum() / len(rows) * abs(confidence[inside].mean() - truth[inside].mean())
    edge = np.abs(confidence * 15 - np.round(confidence * 15)) < 1e-9
    if not edge[confidence > 0].any():  # on the very edge of a bin rounding decides
        assert calibration_error(confidence, truth) == pytest.approx(total)


def test_calibration_error_is_that_of_the_library() -> None:
    z, truth = drawn(500, 0, slope=0.4)
    library = binary_calibration_error(torch.from_numpy(sigmoid(z)), torch.from_numpy(truth).long(), n_bins=15)
    assert calibration_error(sigmoid(z), truth) == pytest.approx(float(library), abs=1e-6)
    assert np.isnan(calibration_error(np.array([0.5, NAN]), np.array([True, False])))


@pytest.mark.parametrize(("slope", "shift"), [(1.0, 0.0), (0.3, 1.0), (2.5, -1.5)])
def test_the_line_of_a_large_plant_is_found(slope: float, shift: float) -> None:
    found = platt(*drawn(20_000, 1, slope, shift))
    assert found == pytest.approx((slope, shift), abs=0.1)


@settings(deadline=None, max_examples=50)
@given(st.integers(ENOUGH, 60), st.integers(ENOUGH, 60), st.floats(-3, 3), st.floats(-5, 5), st.integers(0, 99))
def test_calibrated_probabilities_keep_every_order_and_every_call(
    positive: int, negative: int, slope: float, shift: float, seed: int
) -> None:
    """Whatever the validation rows look like, also where the model has it backwards or parts them completely."""
    draw = np.random.default_rng(seed)
    truth = np.repeat([1.0, 0.0], [positive, negative]).astype(np.float32)
    guess = sigmoid(slope * (truth - 0.5) * 2 + shift + draw.normal(0, 0.5, len(truth))).astype(np.float32)
    one = yes_or_no()
    one.calibrate(guess, truth)
    assert 1 / SHARPEST <= one.line[0] <= SHARPEST
    assert np.isfinite(one.line[1])
    after = one.calibrated(guess)
    assert after.dtype == np.float32
    assert ((after >= 0) & (after <= 1)).all()
    assert (np.diff(after[np.argsort(guess)]) >= 0).all()
    score, moved = one.score(guess, truth), one.calibrated(np.array([one.threshold]))[0]
    called = one.calibrated(guess.astype(np.float64)) > moved
    assert score == pytest.approx(2 * (called & (truth > 0)).sum() / (called.sum() + positive))


def test_probabilities_of_a_weighted_loss_become_frequencies() -> None:
    """A rare failure learnt with tenfold weight is called ten times too likely; new rows say so before, not after."""
    z, truth = drawn(4000, 2, shift=-3.0)
    fresh, then = drawn(20_000, 3, shift=-3.0)
    told, said = sigmoid(z - 3.0 + np.log(10)), sigmoid(fresh - 3.0 + np.log(10))
    # the labels were drawn from z - 3; the model of the weighted loss adds log 10
    one = yes_or_no()
    one.calibrate(told.astype(np.float32), truth.astype(np.float32))
    before, after = said.astype(np.float32), one.calibrated(said.astype(np.float32))
    measured = one.measure(before, then.astype(np.float32))
    assert calibration_error(before, then) > 0.05
    assert measured["ece"] == pytest.approx(calibration_error(after, then))
    assert calibration_error(after, then) < 0.02
    assert measured["brier"] == pytest.approx(np.mean((after - then) ** 2.0), rel=1e-4)
    assert after.mean() == pytest.approx(then.mean(), abs=0.01)


@pytest.mark.parametrize(("positive", "negative"), [(ENOUGH - 1, 500), (500, ENOUGH - 1), (0, 500)])
def test_with_few_labels_of_a_class_probabilities_stay(positive: int, negative: int) -> None:
    truth = np.repeat([1.0, 0.0], [positive, negative]).astype(np.float32)
    guess = np.linspace(0.1, 0.9, len(truth)).astype(np.float32)
    one = yes_or_no()
    one.calibrate(guess, truth)
    assert one.line == (1.0, 0.0)
    assert one.calibrated(guess) is guess


def test_a_threshold_that_no_validation_row_reaches_is_said() -> None:
    one, guess = yes_or_no(), np.array([0.1, 0.2, 0.3], np.float32)
    one.calibrate(guess, np.zeros(3, np.float32))
    assert "none of 3 validation samples reaches its threshold of 0.5" in one.trouble
    assert "`metric`" in one.trouble
    one.calibrate(guess, np.array([0, 0, 1], np.float32))
    assert one.trouble == ""


@pytest.mark.parametrize("truth", [0.4, 1.0, 3.0])
def test_the_temperature_of_a_large_plant_is_found(truth: float) -> None:
    draw = np.random.default_rng(5)
    z = draw.normal(0, 2, (8000, 4))
    real = np.exp(z / truth) / np.exp(z / truth).sum(axis=1, keepdims=True)
    label = (draw.random((8000, 1)) > real.cumsum(axis=1)).sum(axis=1)
    said = np.exp(z) / np.exp(z).sum(axis=1, keepdims=True)
    assert temperature(said, label) == pytest.approx(truth, rel=0.1)
    one = one_of(4)
    one.calibrate(said, label.astype(np.float32))
    if truth != 1.0:
        measured = one.measure(said, label.astype(np.float32))
        assert measured["ece"] is not None
        assert measured["ece"] < 0.02 < calibration_error(said.max(axis=1), said.argmax(axis=1) == label)


@settings(deadline=None, max_examples=50)
@given(st.integers(2, 5), st.integers(0, 99), st.floats(0.1, 6.0))
def test_a_temperature_changes_no_answer(classes: int, seed: int, sharp: float) -> None:
    draw = np.random.default_rng(seed)
    z = draw.normal(0, sharp, (40, classes))
    said = (np.exp(z) / np.exp(z).sum(axis=1, keepdims=True)).astype(np.float32)
    label = draw.integers(0, classes, 40).astype(np.float32)
    one = one_of(classes)
    before = {name: value for name, value in one.measure(said, label).items() if name != "ece"}
    one.calibrate(said, label)
    after = one.calibrated(said)
    np.testing.assert_array_equal(after.argmax(axis=1), said.argmax(axis=1))
    np.testing.assert_allclose(after.sum(axis=1), 1.0, rtol=1e-5)
    assert 1 / SHARPEST - 1e-9 <= one.temperature <= SHARPEST + 1e-9
    if len(set(label.tolist())) > 1:  # better on the rows it was fitted on, within the pull towards 1
        rows = np.arange(40)
        nll = [-np.log(p[rows, label.astype(int)].astype(float).clip(1e-7)).mean() for p in (said, after)]
        assert nll[1] <= nll[0] + 1e-3
    assert before == {name: value for name, value in one.measure(said, label).items() if name != "ece"}


def test_a_line_helps_on_rows_it_has_not_seen() -> None:
    z, truth = drawn(400, 7, slope=0.3, shift=1.0)
    fresh, then = drawn(5000, 8, slope=0.3, shift=1.0)
    slope, shift = platt(z, truth)
    assert log_loss(sigmoid(slope * fresh + shift), then) < log_loss(sigmoid(fresh), then) - 0.1


def test_log_odds_and_back_is_the_same_probability() -> None:
    p = np.array([0.0, 1e-6, 0.2, 0.5, 0.999999, 1.0])
    np.testing.assert_allclose(sigmoid(logit(p)), p, atol=2e-7)
