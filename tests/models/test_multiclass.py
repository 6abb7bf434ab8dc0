"""One of several classes, ordered or not."""

import numpy as np
import polars as pl
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from trunkline.config.tasks import TaskConfig
from trunkline.errors import ConfigError, DataError
from trunkline.models.tasks import make_task
from trunkline.models.tasks.multiclass import BOUND, Multiclass

NAN = float("nan")


def task(classes: tuple[str, ...] | None = ("a", "b", "c"), ordinal: bool = False) -> Multiclass:
    made = make_task("fault", TaskConfig(kind="multiclass", target="fault", classes=classes, ordinal=ordinal))
    assert isinstance(made, Multiclass)
    return made


def f32(*values: float) -> np.ndarray:
    return np.array(values, np.float32)


def slow_macro_f1(true: np.ndarray, guess: np.ndarray) -> float:
    """Mean F1 over the classes that occur or were guessed."""
    scores = []
    for one in set(true.tolist()) | set(guess.tolist()):
        hits = np.sum((true == one) & (guess == one))
        scores.append(2 * hits / (np.sum(true == one) + np.sum(guess == one)))
    return float(np.mean(scores))


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), min_size=1, max_size=25), st.booleans())
def test_metrics_equal_a_slow_oracle(rows: list[tuple[int, int]], ordinal: bool) -> None:
    guess, true = np.array([g for g, _ in rows]), np.array([t for _, t in rows])
    measured = task(("a", "b", "c", "d"), ordinal).measure(np.eye(4)[guess] * 0.4 + 0.1, f32(*true))
    assert measured["accuracy"] == pytest.approx(np.mean(guess == true))
    if len(set(true.tolist())) < 2:
        assert measured["macro_f1"] is None
        assert measured["balanced_accuracy"] is None
    else:
        assert measured["macro_f1"] == pytest.approx(slow_macro_f1(true, guess))
        recalls = [np.mean(guess[true == value] == value) for value in set(true.tolist())]
        assert measured["balanced_accuracy"] == pytest.approx(np.mean(recalls), rel=1e-6)
    if ordinal:
        assert measured["mae_classes"] == pytest.approx(np.mean(np.abs(guess - true)))
    else:
        assert "mae_classes" not in measured


@pytest.mark.parametrize("ordinal", [False, True])
def test_probabilities_are_a_distribution_over_all_classes(ordinal: bool) -> None:
    one = task(("a", "b", "c", "d"), ordinal)
    output = 5 * torch.randn(200, one.outputs, generator=torch.Generator().manual_seed(0))
    probability = one.predict(output)
    assert probability.shape == (200, 4)
    assert (probability >= 0).all()
    np.testing.assert_allclose(probability.sum(axis=1), 1.0, rtol=1e-5)


def test_ordered_classes_are_probabilities_between_thresholds() -> None:
    one = task(ordinal=True)
    assert one.outputs == 2
    beyond = torch.tensor([[2.0, -1.0]])
    p = beyond.sigmoid().numpy()[0]
    np.testing.assert_allclose(one.predict(beyond)[0], [1 - p[0], p[0] - p[1], p[1]], rtol=1e-5)
    # thresholds that cross give an impossible class nothing, not less
    np.testing.assert_allclose(one.predict(beyond.flip(1))[0], [1 - p[1], 0.0, p[1]], rtol=1e-5)


def test_an_ordered_head_has_one_score_so_its_questions_keep_their_order() -> None:
    one = task(("a", "b", "c", "d", "e"), ordinal=True)
    head = one.head(6)
    out = head(torch.randn(50, 6, generator=torch.Generator().manual_seed(0)))
    assert out.shape == (50, 4)
    assert (out.diff(dim=1) < 0).all()
    torch.testing.assert_close(out.diff(dim=1), out.diff(dim=1)[:1].expand(50, -1), atol=1e-5, rtol=1e-5)


def test_loss_is_weighted_cross_entropy() -> None:
    one = task()
    one.fit(f32(*[0] * 30, *[1] * 10, *[2] * 5))
    output, labels = torch.randn(9, 3, generator=torch.Generator().manual_seed(0)), torch.tensor([0.0, 1, 2] * 3)
    weight = torch.tensor(one.emphasis)
    expected = F.cross_entropy(output, labels.long(), weight=weight, reduction="none").mean()
    torch.testing.assert_close(one.loss(output, labels), expected)


def test_without_class_weights_loss_is_plain_cross_entropy_smoothed_as_asked() -> None:
    output, labels = torch.randn(9, 3, generator=torch.Generator().manual_seed(0)), torch.tensor([0.0, 1, 2] * 3)
    for smoothing in (0.0, 0.3):
        one = make_task(
            "fault",
            TaskConfig(
                kind="multiclass", target="f", classes=("a", "b", "c"), class_weights="none", label_smoothing=smoothing
            ),
        )
        one.fit(f32(*[0] * 30, *[1] * 10, *[2] * 5))
        expected = F.cross_entropy(output, labels.long(), label_smoothing=smoothing)
        torch.testing.assert_close(one.loss(output, labels), expected)


@pytest.mark.parametrize("gamma", [0.5, 2.0])
def test_focal_loss_is_that_of_its_paper(gamma: float) -> None:
    one = make_task("fault", TaskConfig(kind="multiclass", target="f", classes=("a", "b", "c"), focal=gamma))
    one.fit(f32(*[0] * 30, *[1] * 10, *[2] * 5))
    output, labels = 3 * torch.randn(9, 3, generator=torch.Generator().manual_seed(0)), torch.tensor([0.0, 1, 2] * 3)
    p = output.softmax(dim=1).gather(1, labels.long()[:, None])[:, 0]
    weight = torch.tensor(one.emphasis)[labels.long()]
    torch.testing.assert_close(one.loss(output, labels), -(weight * (1 - p) ** gamma * p.log()).mean())


@pytest.mark.parametrize("gamma", [0.5, 1.0, 2.0])
def test_a_row_that_is_certain_leaves_a_focal_gradient_finite(gamma: float) -> None:
    one = make_task("fault", TaskConfig(kind="multiclass", target="f", classes=("a", "b", "c"), focal=gamma))
    one.fit(f32(0, 1, 2))
    output = torch.tensor([[1e4, 0.0, 0.0], [0.0, 1e4, 0.0]], requires_grad=True)
    one.loss(output, torch.tensor([0.0, 2.0])).backward()
    assert output.grad is not None
    assert output.grad.isfinite().all()


def test_a_class_that_training_never_saw_is_named_and_every_metric_stays_defined() -> None:
    one = task()
    one.fit(f32(0, 0, 1, 1))
    assert one.warnings("validation", f32(0, 1, NAN)) == []
    (said,) = one.warnings("test", f32(2, 0, 2))
    assert "test has labels that no training sample has: 'c' (2)" in said
    assert "`seed` of [data.split]" in said
    measured = one.measure(one.predict(torch.randn(3, 3, generator=torch.Generator().manual_seed(0))), f32(2, 0, 2))
    assert all(value is not None for value in measured.values())


def test_ordered_loss_is_a_mean_of_yes_or_no_questions() -> None:
    one = task(ordinal=True)
    one.fit(f32(0, 1, 2))
    output, labels = torch.randn(3, 2, generator=torch.Generator().manual_seed(0)), torch.tensor([0.0, 1.0, 2.0])
    beyond = torch.tensor([[0.0, 0.0], [1.0, 0.0], [1.0, 1.0]])
    torch.testing.assert_close(one.loss(output, labels), F.binary_cross_entropy_with_logits(output, beyond))


@settings(deadline=None)
@given(st.lists(st.integers(0, 5000), min_size=2, max_size=6).filter(lambda counts: sum(c > 0 for c in counts) > 1))
def test_rare_classes_count_more_within_bounds_and_the_mean_weight_is_one(counts: list[int]) -> None:
    one = task(tuple(f"c{place}" for place in range(len(counts))))
    one.fit(np.repeat(np.arange(len(counts)), counts).astype(np.float32))
    weight = np.array(one.emphasis)
    assert weight.max() / weight.min() <= BOUND * (1 + 1e-9)
    assert (weight * counts).sum() / sum(counts) == pytest.approx(1.0)
    order = np.argsort(counts)
    assert (np.diff(weight[order]) <= 1e-9).all()


@pytest.mark.parametrize(
    ("column", "classes", "expected"),
    [
        (pl.Series("fault", ["hpc", None, "fan", " hpc", ""]), ("fan", "hpc"), [1, NAN, 0, 1, NAN]),
        (pl.Series("fault", [10, 9, None, 100]), ("9", "10", "100"), [1, 0, NAN, 2]),
        (pl.Series("fault", [10.0, NAN, 9.0, None]), ("9", "10"), [1, NAN, 0, NAN]),
        (pl.Series("fault", ["10", "9", "-1"]), ("-1", "9", "10"), [2, 1, 0]),
        (pl.Series("fault", [True, False]), ("false", "true"), [1, 0]),
        (pl.Series("fault", ["x", "y", None], dtype=pl.Categorical), ("x", "y"), [0, 1, NAN]),
        (pl.Series("fault", [0.5, 1.0]), ("0.5", "1.0"), [0, 1]),
    ],
)
def test_classes_are_found_in_the_data_and_sorted(
    column: pl.Series, classes: tuple[str, ...], expected: list[float]
) -> None:
    one = task(None)
    found = one.read(column, "a.csv")
    assert one.classes == classes
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found, f32(*expected))


def test_listed_classes_keep_their_order_also_where_some_never_occur() -> None:
    one = task(("new", "worn", "dead"), ordinal=True)
    np.testing.assert_array_equal(one.read(pl.Series("fault", ["worn", "new"]), "a.csv"), f32(1, 0))
    assert one.outputs == 2


@pytest.mark.parametrize("listed", [True, False])
def test_a_class_nobody_listed_is_refused_by_name_file_and_row(listed: bool) -> None:
    one = task(("fan", "hpc") if listed else None)
    one.read(pl.Series("fault", ["fan", "hpc"]), "train.csv")
    with pytest.raises(
        DataError, match=r"test\.csv: column `fault`, data row 2: 'fna'.*fan, hpc; did you mean 'fan'.*`classes`"
    ):
        one.read(pl.Series("fault", ["fan", "fna"]), "test.csv")


def test_a_measurement_is_not_taken_for_classes() -> None:
    with pytest.raises(DataError, match=r"300 different values.*kind = 'regression'"):
        task(None).read(pl.Series("fault", np.linspace(0, 1, 300)), "a.csv")


@pytest.mark.parametrize(
    "column", [pl.Series("fault", np.linspace(0, 1, 40)), pl.Series("fault", [f"{one}.5" for one in range(40)])]
)
def test_forty_broken_numbers_are_no_classes(column: pl.Series) -> None:
    with pytest.raises(
        DataError, match=r"a\.csv: column `fault`.*40 different numbers with fractions, such as .*kind = 'regression'"
    ):
        task(None).read(column, "a.csv")
    task(None).read(pl.Series("fault", np.arange(40)), "a.csv")
    task(None).read(pl.Series("fault", [f"F{one}.5" for one in range(40)]), "a.csv")


def test_an_empty_column_says_so() -> None:
    with pytest.raises(DataError, match=r"a\.csv: column `fault`.*is empty.*`classes`"):
        task(None).read(pl.Series("fault", [None, ""]), "a.csv")


@pytest.mark.parametrize("classes", [("a",), ("a", "a"), ()])
def test_classes_that_tell_nothing_apart_are_refused(classes: tuple[str, ...]) -> None:
    with pytest.raises(ConfigError, match=r"\[tasks\.fault\]: `classes` should name two or more different"):
        task(classes)


def test_a_head_before_any_label_was_read_is_refused() -> None:
    with pytest.raises(DataError, match="not known yet"):
        task(None).head(8)
