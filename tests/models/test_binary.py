"""Yes or no."""

import numpy as np
import polars as pl
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from trunkline.config.tasks import TaskConfig
from trunkline.errors import DataError
from trunkline.models.tasks import make_task
from trunkline.models.tasks.binary import BOUND, Binary

NAN = float("nan")


def task() -> Binary:
    made = make_task("leak", TaskConfig(kind="binary", target="leak"))
    assert isinstance(made, Binary)
    return made


def f32(*values: float) -> np.ndarray:
    return np.array(values, np.float32)


def slow_f1(true: np.ndarray, called: np.ndarray) -> float:
    hits = sum(1 for y, c in zip(true, called, strict=True) if y and c)
    return 2 * hits / (int(true.sum()) + int(called.sum()))


def slow_auroc(true: np.ndarray, guess: np.ndarray) -> float:
    """The share of (positive, negative) pairs that are in order; a tie is half in order."""
    pairs = [(p > n) + 0.5 * (p == n) for p in guess[true > 0] for n in guess[true == 0]]
    return float(np.mean(pairs))


def slow_average_precision(true: np.ndarray, guess: np.ndarray) -> float:
    """Precision at each distinct score, weighted by the recall gained there."""
    total, before = 0.0, 0.0
    for cut in sorted(set(guess.tolist()), reverse=True):
        called = guess >= cut
        recall = float(true[called].sum() / true.sum())
        total += (recall - before) * float(true[called].mean())
        before = recall
    return total


rows = st.lists(
    st.tuples(st.sampled_from([0.0, 0.1, 0.25, 0.5, 0.6, 0.9, 1.0]), st.booleans()), min_size=1, max_size=25
)


@settings(deadline=None)
@given(rows, st.sampled_from([0.2, 0.5, 0.8]))
def test_metrics_equal_a_slow_oracle(drawn: list[tuple[float, bool]], threshold: float) -> None:
    guess, true = f32(*(p for p, _ in drawn)), f32(*(y for _, y in drawn))
    one = task()
    one.threshold = threshold
    measured = one.measure(guess, true)
    called = guess > threshold
    assert measured["accuracy"] == pytest.approx(np.mean(called == (true > 0.5)))
    assert measured["brier"] == pytest.approx(np.mean((guess.astype(float) - true) ** 2))
    if not true.any():
        assert measured["f1"] is None
    else:
        assert measured["f1"] == pytest.approx(slow_f1(true, called))
    if len(set(true.tolist())) < 2:
        assert measured["auroc"] is None
        assert measured["average_precision"] is None
    else:
        assert measured["auroc"] == pytest.approx(slow_auroc(true, guess))
        assert measured["average_precision"] == pytest.approx(slow_average_precision(true, guess))


@settings(deadline=None)
@given(rows)
def test_calibration_finds_the_best_f1_of_all_cuts(drawn: list[tuple[float, bool]]) -> None:
    guess, true = f32(*(p for p, _ in drawn)), f32(*(y for _, y in drawn))
    assume(true.any())
    one = task()
    every_cut = [slow_f1(true, guess > cut) for cut in np.linspace(0, 1, 21)[:-1]]
    one.calibrate(np.append(guess, f32(0.99)), np.append(true, f32(NAN)))
    assert 0.0 <= one.threshold <= 1.0
    # nobody can be called on a probability of exactly 0
    assert one.score(guess, true) == pytest.approx(max(every_cut))


def test_calibration_keeps_the_threshold_where_nothing_can_be_learnt() -> None:
    one = task()
    for guess, true in (
        (f32(0.2, 0.7), f32(0, 0)),
        (f32(0.2), f32(NAN)),
        (f32(), f32()),
        (f32(0, 0), f32(1, 0)),
        (f32(NAN, NAN), f32(1, 0)),
    ):
        one.calibrate(guess, true)
        assert one.threshold == 0.5
    one.calibrate(f32(0.1, 0.2, 0.8, 0.9), f32(0, 0, 1, 1))
    assert one.threshold == pytest.approx(0.5)


@pytest.mark.parametrize(
    ("column", "expected"),
    [
        (pl.Series("leak", [0, 1, None]), [0, 1, NAN]),
        (pl.Series("leak", [0.0, 1.0, NAN]), [0, 1, NAN]),
        (pl.Series("leak", [True, False, None]), [1, 0, NAN]),
        (pl.Series("leak", ["1", "0", "", None]), [1, 0, NAN, NAN]),
        (pl.Series("leak", ["True", "FALSE", " true"]), [1, 0, 1]),
        (pl.Series("leak", ["yes", "No"]), [1, 0]),
        (pl.Series("leak", ["yes", "yes"]), [1, 1]),
        (pl.Series("leak", ["tight", "leaking", ""]), [1, 0, NAN]),
        (pl.Series("leak", ["b", "a", None], dtype=pl.Categorical), [1, 0, NAN]),
    ],
)
def test_the_ways_to_write_yes_and_no(column: pl.Series, expected: list[float]) -> None:
    found = task().read(column, "a.csv")
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found, f32(*expected))


@pytest.mark.parametrize(
    ("values", "words"),
    [
        (
            [0, 1, 2],
            r"a\.csv: column `leak`, data row 3: 2 is no label of task 'leak'; expected 0 or 1\. Write 0 and 1",
        ),
        ([0.0, 0.5], r"data row 2: 0\.5"),
        (["yes", "no", "maybe"], r"data row 3: 'maybe' is no label"),
        (["red", "green", "blue"], r"data row 3: 'blue'.*two words of its own, not 3"),
    ],
)
def test_a_third_value_is_refused_with_its_row(values: list[object], words: str) -> None:
    with pytest.raises(DataError, match=words):
        task().read(pl.Series("leak", values), "a.csv")


def test_the_words_of_the_first_reading_hold_for_every_other() -> None:
    one = task()
    one.read(pl.Series("leak", ["ok", "bad"]), "train.csv")
    np.testing.assert_array_equal(one.read(pl.Series("leak", ["ok", "ok"]), "test.csv"), f32(1, 1))
    other = task()
    other.load_state(one.state())
    with pytest.raises(DataError, match=r"new\.csv.*data row 2: 'broken'.*'bad' or 'ok'"):
        other.read(pl.Series("leak", ["ok", "broken"]), "new.csv")


def test_loss_is_weighted_cross_entropy() -> None:
    one = task()
    one.fit(f32(*[0] * 30, *[1] * 10))
    output, labels = torch.randn(8, 1, generator=torch.Generator().manual_seed(0)), torch.tensor([0.0, 1] * 4)
    expected = F.binary_cross_entropy_with_logits(output[:, 0], labels, pos_weight=torch.tensor(one.emphasis))
    torch.testing.assert_close(one.loss(output, labels), expected)
    torch.testing.assert_close(torch.from_numpy(one.predict(output)), output[:, 0].sigmoid())


def test_without_class_weights_a_rare_label_counts_as_often_as_it_comes() -> None:
    one = make_task("leak", TaskConfig(kind="binary", target="leak", class_weights="none"))
    one.fit(f32(*[0] * 30, *[1] * 2))
    output, labels = torch.randn(8, 1, generator=torch.Generator().manual_seed(0)), torch.tensor([0.0, 1] * 4)
    torch.testing.assert_close(one.loss(output, labels), F.binary_cross_entropy_with_logits(output[:, 0], labels))


@pytest.mark.parametrize("gamma", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_focal_loss_and_smoothing_are_those_of_their_papers(gamma: float, smoothing: float) -> None:
    settings = {"focal": gamma, "label_smoothing": smoothing}
    one = make_task("leak", TaskConfig(kind="binary", target="leak", **settings))
    one.fit(f32(*[0] * 30, *[1] * 10))
    output, labels = 3 * torch.randn(8, 1, generator=torch.Generator().manual_seed(0)), torch.tensor([0.0, 1] * 4)
    p, y = output[:, 0].sigmoid(), labels * (1 - smoothing) + smoothing / 2
    expected = -(one.emphasis * y * (1 - p) ** gamma * p.log() + (1 - y) * p**gamma * (1 - p).log())
    torch.testing.assert_close(one.loss(output, labels), expected.mean())


@settings(deadline=None)
@given(st.integers(1, 100_000), st.integers(1, 100_000))
def test_the_rarer_class_counts_more_within_bounds(negative: int, positive: int) -> None:
    one = task()
    one.counts = (negative, positive)
    assert 1 / BOUND <= one.emphasis <= BOUND
    assert (one.emphasis >= 1.0) == (positive <= negative) or min(negative, positive) > 10_000
    one.counts = (positive, negative)
    reverse = one.emphasis
    one.counts = (negative, positive)
    assert one.emphasis * reverse == pytest.approx(1.0)


def test_few_samples_weigh_by_frequency_and_many_do_not() -> None:
    """The effective number grows like the count at first and stops at 1 / (1 - beta)."""
    one = task()
    one.counts = (4, 2)
    assert one.emphasis == pytest.approx(2.0, rel=0.01)
    one.counts = (400_000, 200_000)
    assert one.emphasis == pytest.approx(1.0, rel=0.01)
