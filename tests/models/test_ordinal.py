"""Grades of one condition."""

import numpy as np
import polars as pl
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trunkline.config.tasks import TaskConfig
from trunkline.errors import ConfigError, DataError
from trunkline.models.tasks import make_task
from trunkline.models.tasks.ordinal import Ordinal, quadratic_kappa

NAN = float("nan")
GRADES = ("new", "worn", "old", "dead")


def task(classes: tuple[str, ...] | None = GRADES, **settings: object) -> Ordinal:
    table = {"kind": "ordinal", "target": "wear", "classes": classes, **settings}
    made = make_task("wear", TaskConfig.model_validate(table))
    assert isinstance(made, Ordinal)
    return made


def sure(grades: np.ndarray) -> np.ndarray:
    return np.eye(4)[grades] * 0.8 + 0.05


def slow_kappa(guess: np.ndarray, true: np.ndarray, grades: int) -> float | None:
    """From the table of counts and the table that the same margins would give by chance."""
    table = np.zeros((grades, grades))
    for one, other in zip(guess, true, strict=True):
        table[one, other] += 1
    chance = np.outer(table.sum(axis=1), table.sum(axis=0)) / table.sum()
    weight = np.subtract.outer(np.arange(grades), np.arange(grades)) ** 2
    return float(1 - (weight * table).sum() / (weight * chance).sum()) if (weight * chance).any() else None


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), min_size=1, max_size=25))
def test_metrics_equal_a_slow_oracle(rows: list[tuple[int, int]]) -> None:
    guess, true = np.array([g for g, _ in rows]), np.array([t for _, t in rows])
    measured = task().measure(sure(guess), true.astype(np.float32))
    assert measured["mae_grades"] == pytest.approx(np.mean(np.abs(guess - true)))
    assert measured["accuracy"] == pytest.approx(np.mean(guess == true))
    expected = slow_kappa(guess, true, 4)
    assert measured["qwk"] == (None if expected is None else pytest.approx(expected))
    if len(set(true.tolist())) < 2:
        assert measured["macro_f1"] is None
    else:
        scores = [
            2 * np.sum((true == one) & (guess == one)) / (np.sum(true == one) + np.sum(guess == one))
            for one in set(true.tolist()) | set(guess.tolist())
        ]
        assert measured["macro_f1"] == pytest.approx(np.mean(scores))


def test_kappa_counts_a_far_miss_more_than_a_near_one() -> None:
    true = np.array([0, 0, 1, 1, 2, 2, 3, 3])
    near, far = true.copy(), true.copy()
    near[0], far[0] = 1, 3
    kappas = [quadratic_kappa(guess, true) for guess in (true, near, far, np.full(8, 2))]
    assert kappas[0] == 1.0
    assert kappas[0] > kappas[1] > kappas[2] > kappas[3] == 0.0  # type: ignore[operator]


@settings(deadline=None)
@given(st.lists(st.floats(0.01, 1.0), min_size=4, max_size=4))
def test_the_answer_has_the_least_expected_error_in_grades(weights: list[float]) -> None:
    likely = np.array(weights) / sum(weights)
    expected = [(likely * np.abs(np.arange(4) - answer)).sum() for answer in range(4)]
    assert expected[task().decide(likely[None])[0]] == pytest.approx(min(expected))


def test_the_head_is_that_of_an_ordered_multiclass_task() -> None:
    """One score and K - 1 questions; only the judgement differs."""
    other = make_task("wear", TaskConfig(kind="multiclass", target="wear", classes=GRADES, ordinal=True))
    one, labels = task(), torch.tensor([0.0, 1, 2, 3, 3])
    for each in (one, other):
        each.fit(labels.numpy())
    output = torch.randn(5, 3, generator=torch.Generator().manual_seed(0))
    assert one.outputs == other.outputs == 3
    assert torch.equal(one.loss(output, labels), other.loss(output, labels))
    np.testing.assert_array_equal(one.predict(output), other.predict(output))
    assert (one.head(6)(torch.randn(50, 6)).diff(dim=1) < 0).all()


@pytest.mark.parametrize(
    ("column", "grades", "expected"),
    [
        (pl.Series("wear", [100, 3, None, 20]), ("3", "20", "100"), [2, 0, NAN, 1]),
        (pl.Series("wear", [10.0, 9.5, NAN, 100.0]), ("9.5", "10.0", "100.0"), [1, 0, NAN, 2]),
        (pl.Series("wear", ["100", "-1", " 9 "]), ("-1", "9", "100"), [2, 0, 1]),
    ],
)
def test_numbers_order_themselves(column: pl.Series, grades: tuple[str, ...], expected: list[float]) -> None:
    one = task(None)
    found = one.read(column, "a.csv")
    assert one.classes == grades
    np.testing.assert_array_equal(found, np.array(expected, np.float32))


def test_words_need_their_order_said() -> None:
    column = pl.Series("wear", ["worn", "new", "dead"])
    with pytest.raises(
        DataError, match=r"a\.csv: column `wear`.*words, .*List them under `classes` of \[tasks\.wear\]"
    ):
        task(None).read(column, "a.csv")
    np.testing.assert_array_equal(task().read(column, "a.csv"), np.array([1, 0, 3], np.float32))


def test_a_measurement_has_no_grades() -> None:
    with pytest.raises(DataError, match=r"40 different numbers with fractions.*kind = 'regression'"):
        task(None).read(pl.Series("wear", np.linspace(0.0, 1.0, 40)), "a.csv")


def test_another_metric_can_lead() -> None:
    guess, true = np.array([0, 1, 2, 3, 0]), np.array([0, 1, 2, 2, 1], np.float32)
    for metric, value in (("accuracy", 0.6), ("mae_grades", 0.4)):
        one = task(metric=metric)
        assert (one.card.metric, one.card.better) == (metric, "higher" if metric == "accuracy" else "lower")
        assert one.score(sure(guess), true) == pytest.approx(value)


@pytest.mark.parametrize("key", ["focal", "label_smoothing"])
def test_what_only_unordered_classes_know_is_refused(key: str) -> None:
    with pytest.raises(ValueError, match=key):
        task(**{key: 0.5})
    with pytest.raises(ConfigError, match=rf"\[tasks\.wear\]: `{key}` is for classes without an order"):
        make_task(
            "wear", TaskConfig.model_validate({"kind": "multiclass", "target": "wear", "ordinal": True, key: 0.5})
        )
