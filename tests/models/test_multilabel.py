"""Any number of labels at once."""

from pathlib import Path

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
from trunkline.models.tasks.multilabel import BOUND, START, Multilabel
from trunkline.models.tasks.thresholds import SUPPORT, choose_thresholds

NAN = float("nan")


def task(labels: int = 3, **settings: object) -> Multilabel:
    targets = tuple(f"a{place}" for place in range(labels))
    made = make_task("alarms", TaskConfig.model_validate({"kind": "multilabel", "targets": targets, **settings}))
    assert isinstance(made, Multilabel)
    return made


def micro(truth: np.ndarray, called: np.ndarray) -> float:
    return float(2 * (truth & called).sum() / max(truth.sum() + called.sum(), 1))


def slow_average_precision(true: np.ndarray, guess: np.ndarray) -> float:
    """Precision at each distinct score, weighted by the recall gained there."""
    total, before = 0.0, 0.0
    for cut in sorted(set(guess.tolist()), reverse=True):
        called = guess >= cut
        recall = float(true[called].sum() / true.sum())
        total += (recall - before) * float(true[called].mean())
        before = recall
    return total


cell = st.tuples(st.sampled_from([0.0, 0.1, 0.3, 0.5, 0.9]), st.sampled_from([0.0, 1.0, NAN]))
table = st.lists(st.lists(cell, min_size=4, max_size=4), min_size=1, max_size=12)


@settings(deadline=None)
@given(table, st.sampled_from([0.05, 0.3, 0.6]))
def test_metrics_equal_a_slow_oracle(rows: list[list[tuple[float, float]]], threshold: float) -> None:
    """Cell by cell; the last label was never positive in training, so only micro_f1 knows of it."""
    guess, true = (np.array([[one[place] for one in row] for row in rows], np.float32) for place in (0, 1))
    one = task(4)
    one.positive = np.array([3, 3, 3, 0])
    one.thresholds = np.array([threshold, 0.3, threshold, threshold], np.float32)
    measured = one.measure(guess, true)
    hits, called, positive, scores, precisions = 0, 0, 0, [], []
    for label in range(4):
        known = [
            (g > one.thresholds[label], t == 1.0)
            for g, t in zip(guess[:, label], true[:, label], strict=True)
            if t == t
        ]
        here = (sum(c and t for c, t in known), sum(c for c, _ in known), sum(t for _, t in known))
        hits, called, positive = hits + here[0], called + here[1], positive + here[2]
        if label < 3 and here[1] + here[2]:
            scores.append(2 * here[0] / (here[1] + here[2]))
        if label < 3 and here[2]:
            there = ~np.isnan(true[:, label])
            precisions.append(slow_average_precision(true[there, label], guess[there, label]))
    assert measured["micro_f1"] == (pytest.approx(2 * hits / (called + positive)) if positive else None)
    if precisions:
        assert measured["macro_f1"] == pytest.approx(np.mean(scores))
        assert measured["mean_average_precision"] == pytest.approx(np.mean(precisions))
    else:
        assert measured["macro_f1"] is measured["mean_average_precision"] is None


@settings(deadline=None)
@given(table)
def test_without_support_all_labels_share_the_cut_with_the_best_micro_f1(rows: list[list[tuple[float, float]]]) -> None:
    guess, true = (np.array([[one[place] for one in row] for row in rows], np.float32) for place in (0, 1))
    few = np.nansum(true, axis=0).max() < SUPPORT
    one = task(4)
    one.calibrate(guess, true)
    if not few:
        return
    assert len(set(one.thresholds.tolist())) == 1
    known, truth = ~np.isnan(true), true == 1.0
    if truth.any() and guess[known].max() > 0:
        best = max(micro(truth, (guess > cut) & known) for cut in (0.01, 0.2, 0.4, 0.7))
        assert one.score(guess, true) == pytest.approx(best)
    else:
        assert one.thresholds[0] == np.float32(START)


def plants(labels: int, rows: int, seed: int, share: float = 0.1) -> tuple[np.ndarray, np.ndarray]:
    """True probabilities of each cell and what then happened; every label about `share` of the time."""
    draw = np.random.default_rng(seed)
    odds = draw.normal(np.log(share / (1 - share)), 1.5, (rows, labels))
    probability = 1 / (1 + np.exp(-odds))
    return probability.astype(np.float32), (draw.random((rows, labels)) < probability).astype(np.float32)


def test_a_label_whose_scores_are_too_low_gets_a_cut_of_its_own() -> None:
    """One label speaks too softly: on fresh rows its own cut brings back what the common one loses."""
    one = task(6)
    guess, true = plants(6, 600, 1, 0.3)
    fresh, then = plants(6, 4000, 2, 0.3)
    for scores in (guess, fresh):
        scores[:, 2] = scores[:, 2] / 8
    one.calibrate(guess, true)
    assert one.thresholds[2] < 0.4 * np.median(one.thresholds)
    common = choose_thresholds(
        guess[:, [0, 1, 3, 4, 5]], true[:, [0, 1, 3, 4, 5]] > 0.5, true[:, 1:] >= 0, near=START, macro=False
    )
    assert common is not None
    own, shared = one.score(fresh, then), micro(then > 0.5, fresh > common[0])
    assert own is not None
    assert own > shared + 0.02


def macro(truth: np.ndarray, called: np.ndarray) -> float:
    return float(np.mean([micro(truth[:, one], called[:, one]) for one in range(truth.shape[1])]))


@pytest.mark.parametrize("metric", ["micro_f1", "macro_f1"])
def test_rare_labels_do_not_fit_cuts_to_their_few_rows(metric: str) -> None:
    """Probabilities that are right need one cut: over worlds, what is chosen loses nothing to it, and free cuts much."""
    judge, lost, free_lost = micro if metric == "micro_f1" else macro, [], []
    for seed in range(6):
        guess, true = plants(40, 120, seed, 0.02)
        fresh, then = plants(40, 2000, 100 + seed, 0.02)
        truth = true > 0.5
        one = task(40, metric=metric)
        one.calibrate(guess, true)
        cuts = np.linspace(0.01, 0.9, 60)
        common = max(cuts, key=lambda cut, guess=guess, truth=truth: micro(truth, guess > cut))
        free = [
            max(cuts, key=lambda cut, k=k, guess=guess, truth=truth: micro(truth[:, k], guess[:, k] > cut))
            for k in range(40)
        ]
        best = judge(then > 0.5, fresh > common)
        lost.append(best - judge(then > 0.5, fresh > one.thresholds))
        free_lost.append(best - judge(then > 0.5, fresh > np.array(free)))
    assert np.mean(lost) < 0.005
    assert np.mean(free_lost) > 0.02


def test_calibration_keeps_the_start_where_nothing_can_be_learnt_and_says_so() -> None:
    one, dull = task(), np.full((5, 3), 0.1, np.float32)
    one.calibrate(dull, np.zeros((5, 3), np.float32))
    assert (one.thresholds == np.float32(START)).all()
    assert "none of 5 validation samples reaches its threshold of 0.3" in one.trouble
    assert "[data.split]" in one.trouble
    one.calibrate(dull, np.full((5, 3), NAN, np.float32))
    assert one.trouble == ""
    one.calibrate(np.array([[0.1, 0.2, 0.8]] * 5, np.float32), np.array([[0, 0, 1]] * 5, np.float32))
    assert 0.2 <= one.thresholds[0] < 0.8
    assert one.trouble == ""


def test_weighted_loss_is_cross_entropy_over_the_cells_that_are_known() -> None:
    one, draw = task(), torch.Generator().manual_seed(0)
    one.fit(np.array([[1, 0, NAN]] * 30 + [[0, 1, 1]] * 10, np.float32))
    output = torch.randn(8, 3, generator=draw)
    labels = torch.randint(0, 2, (8, 3), generator=draw).float()
    weight = torch.tensor(one.emphasis).float()
    expected = F.binary_cross_entropy_with_logits(output, labels, pos_weight=weight, reduction="none")
    labels[2, 1] = labels[5] = NAN
    torch.testing.assert_close(one.loss(output, labels), expected[~labels.isnan()].mean())


def test_asymmetric_loss_is_that_of_the_paper() -> None:
    """Positives plain; negatives shifted by the margin and to the fourth power, nothing below the margin."""
    one = task(2, loss="asymmetric")
    output = torch.tensor([[3.0, -1.0], [0.5, -4.0]])
    labels = torch.tensor([[1.0, 0.0], [0.0, 0.0]])
    p = output.sigmoid()
    shifted = (p - 0.05).clamp(min=0)
    expected = -(labels * p.log() + (1 - labels) * shifted**4 * (1 - shifted).log())
    torch.testing.assert_close(one.loss(output, labels), expected.mean())
    assert float(expected[1, 1]) == 0.0
    torch.testing.assert_close(
        task(2, loss="asymmetric", focal=1.0)._cell_losses(output, labels)[1, 0], -(shifted * (1 - shifted).log())[1, 0]
    )


@settings(deadline=None)
@given(st.lists(st.integers(0, 40), min_size=3, max_size=3), st.sampled_from(["effective", "none"]))
def test_a_new_head_answers_every_label_at_its_training_frequency(positive: list[int], weights: str) -> None:
    one = task(class_weights=weights)
    one.positive, one.negative = np.array(positive), 40 - np.array(positive)
    head = one.head(5)
    one.init_head(head)
    answer = one.predict(head(torch.zeros(1, 5)))[0].astype(np.float64)
    share = (np.array(positive) + 0.5) / 41
    far = np.log(answer / (1 - answer)) - np.log(share / (1 - share))
    assert np.abs(far).max() < 0.05  # the bias is found on a grid of 0.05


@pytest.mark.parametrize(
    "settings",
    [{}, {"focal": 2.0}, {"label_smoothing": 0.2}, {"loss": "asymmetric"}, {"loss": "asymmetric", "focal": 1.0}],
)
def test_no_other_answer_to_all_samples_alike_is_better_than_a_new_head(settings: dict[str, object]) -> None:
    one, labels = task(1, **settings), np.array([[1.0]] * 9 + [[0.0]] * 31, np.float32)
    one.fit(labels)
    head = one.head(5)
    one.init_head(head)
    start = float(head.bias.detach())

    def cost(answer: float) -> float:
        return float(one.loss(torch.full((40, 1), answer), torch.from_numpy(labels)))

    for step in (-2.0, -0.5, -0.2, 0.2, 0.5, 2.0):
        assert cost(start) < cost(start + step)


@settings(deadline=None)
@given(st.integers(0, 100_000), st.integers(0, 100_000))
def test_the_rarer_answer_counts_more_within_bounds(negative: int, positive: int) -> None:
    one = task(1)
    one.positive, one.negative = np.array([positive]), np.array([negative])
    assert 1 / BOUND <= one.emphasis[0] <= BOUND
    assert (
        (one.emphasis[0] >= 1.0) == (positive <= negative)
        or min(negative, positive) > 10_000
        or max(negative, positive) <= 1
    )


@pytest.mark.parametrize(
    ("column", "expected"),
    [
        (pl.Series("a0", [0, 1, None]), [0, 1, NAN]),
        (pl.Series("a0", [0.0, 1.0, NAN]), [0, 1, NAN]),
        (pl.Series("a0", [True, False, None]), [1, 0, NAN]),
        (pl.Series("a0", [" Yes", "no", ""]), [1, 0, NAN]),
        (pl.Series("a0", ["1", "0", "true"]), [1, 0, 1]),
        (pl.Series("a0", [None, None, None]), [NAN, NAN, NAN]),
    ],
)
def test_the_ways_to_write_a_flag(column: pl.Series, expected: list[float]) -> None:
    frame = pl.DataFrame([column, pl.Series("a1", [1, 1, 0]), pl.Series("other", ["x", "y", "z"])])
    found = task(2).read_from(frame, "a.csv")
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found, np.array([expected, [1, 1, 0]], np.float32).T)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        (
            [0, 1, 2],
            r"a\.csv: column `a1`, data row 3: 2 is no label of task 'alarms'; expected 0 or 1\. Write 0 and 1",
        ),
        ([0.5, 0.7, 1], r"column `a1`, data row 1: 0\.5 .* kind 'regression' or 'ordinal'"),
        (["on", "off", "on"], r"data row 1: 'on'"),
    ],
)
def test_what_is_no_flag_is_refused_with_its_column_and_row(values: list[object], words: str) -> None:
    frame = pl.DataFrame({"a0": [1, 0, 1], "a1": values})
    with pytest.raises(DataError, match=words):
        task(2).read_from(frame, "a.csv")


@pytest.mark.parametrize("value", [0.0, 1.0])
def test_labels_that_never_change_are_refused(value: float) -> None:
    with pytest.raises(DataError, match=rf"all 12 training labels of `targets` \(`a0`, `a1`, `a2`\) are {value:g}"):
        task().fit(np.full((4, 3), value, np.float32))


def test_labels_that_training_never_saw_are_named() -> None:
    one = task()
    one.fit(np.array([[1, 0, 0], [0, 1, NAN]], np.float32))
    assert one.warnings("train", np.zeros((2, 3), np.float32)) == [
        "1 of 3 labels are never 1 in training: a2. macro_f1 and mean_average_precision leave them out."
    ]
    assert one.warnings("test", np.array([[1, 1, 0]], np.float32)) == []
    (said,) = one.warnings("test", np.array([[1, 0, 1]], np.float32))
    assert "test has labels that are never 1 in training: a2" in said


def test_labels_are_described_by_the_commonest() -> None:
    text = task().describe(np.array([[1, 0, 0], [1, 1, 0], [NAN, NAN, NAN], [0, 0, NAN]], np.float32))
    assert text == "1 of 3 labels a sample: a0 66.7%, a1 33.3%, 25% unlabelled"


@pytest.mark.parametrize("targets", [{"targets": []}, {"targets": ["a", "a"]}, {"target": "a"}])
def test_targets_must_be_columns_of_their_own(targets: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="targets"):
        TaskConfig.model_validate({"kind": "multilabel", **targets})


def test_a_loss_of_another_kind_is_refused() -> None:
    with pytest.raises(ValueError, match="regression"):
        task(loss="huber")
    with pytest.raises(ConfigError, match=r"`metric = 'f1'`.*Known: micro_f1, macro_f1"):
        task(metric="f1")


@pytest.mark.realdata
def test_frequencies_alone_score_as_published_on_the_packaging_machines(real_data: Path) -> None:
    """The trivial baseline that a model has to beat, over rows x labels of each machine: the metric measures the same."""
    book = np.load(real_data / "packaging_alarms" / "alarms.npz")
    train, test = (
        np.unpackbits(book[f"y_multilabel_{part}"], axis=1)[:, :154].astype(np.float32) for part in ("train", "test")
    )
    called, positive, hits = 0, 0, 0.0
    for machine in range(20):
        known = train[book["stratify_train"] == machine]
        fit, check = known[: int(0.85 * len(known))], known[int(0.85 * len(known)) :]
        then = test[book["stratify_test"] == machine]
        one = task(154)
        one.fit(fit)
        frequency = fit.mean(axis=0)
        one.calibrate(np.tile(frequency, (len(check), 1)), check)
        guess = np.tile(frequency, (len(then), 1))
        score = one.score(guess, then)
        assert score is not None
        here = int((guess > one.thresholds).sum()) + int(then.sum())
        hits, called, positive = hits + score * here / 2, called + here - int(then.sum()), positive + int(then.sum())
    assert 2 * hits / (called + positive) == pytest.approx(0.671, abs=0.01)
