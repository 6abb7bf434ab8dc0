"""Anomalies: what a sample teaches, how far it lies from normal ones, where the alarm goes off, what an event is."""

import copy
import json
import math

import numpy as np
import polars as pl
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trunkline.config.tasks import TaskConfig
from trunkline.errors import DataError
from trunkline.models.labels import Places
from trunkline.models.tasks import make_task
from trunkline.models.tasks.anomaly import Anomaly, Scatter, best_cut, count_events, observed
from trunkline.models.tasks.task import Samples

NAN = float("nan")
DAY = 86_400.0


def task(channels: int = 2, window: int | None = 4, *, clock: bool = False, **keys: object) -> Anomaly:
    made = make_task("leak", TaskConfig(kind="anomaly", target="leak", **keys))  # type: ignore[arg-type]
    assert isinstance(made, Anomaly)
    made.bind_inputs(Samples(tuple(f"c{place}" for place in range(channels)), window, clock))
    return made


def labels_of(flags: list[float], segment: list[int] | None = None, step: float = 1.0) -> np.ndarray:
    """Labels of samples of one row each, in order."""
    places = np.array(segment or [0] * len(flags))
    time = np.concatenate([np.arange((places == one).sum()) for one in dict.fromkeys(places.tolist())]) * step
    return np.stack([flags, np.array(flags) == 1.0, places, time], axis=1).astype(np.float32)


def settled(seed: int = 0, rows: int = 400, **keys: object) -> tuple[Anomaly, np.ndarray]:
    """A task that knows how normal outputs scatter, and those outputs (rows, outputs)."""
    one = task(latent=3, **keys)  # type: ignore[arg-type]
    normal = np.random.default_rng(seed).normal(size=(rows, one.outputs)) * np.linspace(0.5, 2.0, one.outputs)
    one.fit_outputs(torch.from_numpy(normal).float(), labels_of([0.0] * rows))
    return one, normal.astype(np.float32)


cells = st.lists(st.sampled_from([0.0, 0.0, 1.0, NAN]), min_size=1, max_size=12)


@settings(deadline=None)
@given(st.lists(cells, min_size=1, max_size=4), st.integers(1, 6), st.booleans())
def test_a_samples_label_tells_its_flag_its_windows_flags_its_group_and_its_time(
    groups: list[list[float]], window: int, clock: bool
) -> None:
    one = task(window=window, clock=clock)
    sizes = [len(group) for group in groups]
    start = np.concatenate([[0], np.cumsum(sizes)])
    first, last = np.repeat(start[:-1], sizes), np.repeat(start[1:] - 1, sizes)
    order = 1.7e9 + 30.0 * np.arange(sum(sizes))  # beyond what float32 tells apart
    flags = np.array([flag for group in groups for flag in group], np.float32)
    found = one.labels_for_samples(flags, Places(np.arange(len(flags)), first, last, order))
    expected = [
        [group[row], float(1.0 in group[max(0, row - window + 1) : row + 1]), place, row * (30.0 if clock else 1.0)]
        for place, group in enumerate(groups)
        for row in range(len(group))
    ]
    np.testing.assert_array_equal(found, np.array(expected, np.float32))


def test_a_flagged_row_anywhere_in_the_window_teaches_nothing_and_an_empty_cell_is_normal() -> None:
    one = task(window=3)
    places = Places(np.arange(5), np.zeros(5, np.int64), np.full(5, 4))
    labels = one.labels_for_samples(np.array([0, 1, 0, 0, NAN], np.float32), places)
    output = torch.randn(5, one.outputs, generator=torch.Generator().manual_seed(0), requires_grad=True)
    one.loss(output, torch.from_numpy(labels)).backward()
    assert output.grad is not None
    assert (output.grad.abs().sum(dim=1) > 0).tolist() == [True, False, False, False, True]


def test_the_rebuilt_sample_is_compared_with_what_the_sensors_said() -> None:
    one = task(channels=2, window=40, latent=2)
    assert one.segments == 16
    x = torch.randn(3, 2, 40, generator=torch.Generator().manual_seed(1))
    means = torch.nn.functional.adaptive_avg_pool1d(x, 16).flatten(1)
    exact = torch.cat([means, torch.ones(3, 2)], dim=1)
    met = one.combine_with_inputs(exact, x)
    torch.testing.assert_close(met[:, :-2], torch.zeros(3, 32))
    assert (met[:, -2:] == 1.0).all()  # the latent numbers pass
    x[0, 1] = NAN  # a silent sensor is no anomaly
    met = one.combine_with_inputs(exact + 5.0, x)
    assert met.isfinite().all()
    assert (met[0, 16:32] == 0.0).all()
    assert (met[1, :32].abs() > 1.0).all()


def test_rows_are_rebuilt_as_they_are_and_many_channels_in_few_pieces() -> None:
    one = task(channels=3, window=None, latent=2)
    assert one.outputs == 3 + 2
    x = torch.randn(4, 3)
    torch.testing.assert_close(
        one.combine_with_inputs(torch.cat([x - 1.0, torch.zeros(4, 2)], dim=1), x)[:, :3], torch.ones(4, 3)
    )
    assert task(channels=1000, window=64).segments == 1
    assert task(channels=100, window=64).segments == 5


def test_before_it_is_settled_a_score_is_the_mean_square_left_over() -> None:
    one = task(latent=3)
    output = torch.arange(22.0).reshape(2, 11)
    assert one.predict(output).tolist() == pytest.approx(output[:, :8].square().mean(dim=1).tolist())


def test_one_in_a_hundred_training_samples_lies_beyond_each_usual_distance() -> None:
    one, normal = settled()
    above = one.predict(torch.from_numpy(normal)) > 1.0
    assert 0.009 <= above.mean() <= 0.021


@settings(deadline=None)
@given(st.sampled_from([3, 7, 8, 9, 10]), st.integers(0, 2**32 - 1))
def test_the_farther_from_normal_the_higher_the_score(place: int, seed: int) -> None:
    """In what could not be rebuilt of the latest rows (last of the four of each channel), and in the latent numbers."""
    one, normal = settled(seed % 5)
    assert one.scatter is not None
    sample = np.repeat(normal[seed % len(normal)][None], 6, axis=0)
    sample[:, place] += np.array([5.0, 10.0, 20.0, 40.0, 80.0, 160.0], np.float32)
    score = one.predict(torch.from_numpy(sample))
    assert (np.diff(score) > 0).all()
    assert score[-1] > 5.0


def test_an_alarm_ends_with_its_cause_and_not_a_window_later() -> None:
    one, normal = settled()
    long_ago, now = normal.copy(), normal.copy()
    long_ago[:, [0, 4]] += 50.0  # the oldest of four pieces
    now[:, [3, 7]] += 50.0
    before = one.predict(torch.from_numpy(normal))
    assert one.predict(torch.from_numpy(long_ago)).tolist() == before.tolist()
    assert (one.predict(torch.from_numpy(now)) > 5.0).all()


def test_the_distance_is_mahalanobis_of_the_shrunk_covariance() -> None:
    draw = np.random.default_rng(3)
    mix = draw.normal(size=(4, 4))
    values = (draw.normal(size=(300, 4)) @ mix + 2.0)[:, None]
    found = Scatter.of(values)
    flat = values[:, 0]
    covariance = np.cov(flat.T, bias=True)
    level = np.trace(covariance) / 4
    shrunk = (1 - Scatter.FLOOR) * covariance + Scatter.FLOOR * level * np.eye(
        4
    )  # 300 rows ask for less than the floor
    slow = np.array([math.sqrt(row @ np.linalg.inv(shrunk) @ row) for row in flat - flat.mean(axis=0)])
    np.testing.assert_allclose(found.distance(values), slow / np.quantile(slow, 0.99), rtol=1e-6)


@pytest.mark.parametrize("size", [3, Scatter.MOST + 1])
def test_numbers_that_never_move_leave_finite_distances(size: int) -> None:
    still = Scatter.of(np.ones((5, 2, size)))
    assert np.isfinite(still.distance(np.full((2, 2, size), 3.0))).all()


def test_settling_and_calibrating_a_copy_leave_the_task_alone_and_its_state_says_all() -> None:
    one, normal = settled()
    own = copy.copy(task(latent=3))
    before = own.state()
    clone = copy.copy(own)
    clone.fit_outputs(torch.from_numpy(normal), labels_of([0.0] * len(normal)))
    assert own.state() == before
    other = task(latent=3)
    other.load_state(json.loads(json.dumps(one.state())))
    some = torch.randn(20, one.outputs)
    assert other.predict(some).tolist() == one.predict(some).tolist()
    assert other.threshold == one.threshold


def test_only_normal_samples_say_what_is_normal() -> None:
    one, normal = settled()
    wild = np.concatenate([normal, normal * 50.0])
    other = task(latent=3)
    other.fit_outputs(torch.from_numpy(wild), labels_of([0.0] * len(normal) + [1.0] * len(normal)))
    assert other.predict(torch.from_numpy(normal)).tolist() == one.predict(torch.from_numpy(normal)).tolist()


def test_without_flags_the_threshold_lets_the_wished_share_of_normal_samples_alarm() -> None:
    one = task(alarm_share=0.05)
    scores = np.random.default_rng(0).exponential(size=1000).astype(np.float32)
    one.calibrate(scores, labels_of([NAN] * 1000))
    assert one.threshold is not None
    assert (scores > one.threshold).sum() == 50
    assert not one.trouble


@settings(deadline=None)
@given(st.data())
def test_with_flags_the_threshold_has_the_best_f1_of_all(data: st.DataObject) -> None:
    flags = np.array(data.draw(st.lists(st.booleans(), min_size=2, max_size=40)))
    flags[0] = True
    scores = np.array(
        data.draw(st.lists(st.integers(0, 9), min_size=len(flags), max_size=len(flags))), np.float32
    ) + np.where(flags, 3, 0).astype(np.float32)
    f1 = {
        cut: 2 * (flags & (scores > cut)).sum() / (flags.sum() + (scores > cut).sum())
        for cut in np.arange(-0.5, 13.5, 1.0)
    }
    cut = best_cut(scores, flags, near=None)
    assert 2 * (flags & (scores > cut)).sum() / (flags.sum() + (scores > cut).sum()) == max(f1.values())
    assert cut not in scores  # between two scores, so that rounding decides nothing


def test_flags_that_look_like_any_other_sample_do_not_make_everything_alarm() -> None:
    draw = np.random.default_rng(1)
    flags = np.arange(200) % 2 == 0
    one = task()
    one.calibrate(draw.normal(size=200).astype(np.float32) - flags, labels_of(flags.astype(float).tolist()))
    assert one.threshold is not None
    alarms = (draw.normal(size=1000) > one.threshold).mean()
    assert alarms < 0.05


def test_a_threshold_that_no_validation_sample_reaches_is_said() -> None:
    one = task()
    one.calibrate(np.full(30, 0.7, np.float32), labels_of([NAN] * 30))
    assert "none of 30 validation samples scores above" in one.trouble
    assert "`alarm_share` of [tasks.leak]" in one.trouble
    one.calibrate(np.append(np.full(30, 0.7), 3.0).astype(np.float32), labels_of([NAN] * 31))
    assert not one.trouble
    empty, _ = settled()
    before = empty.threshold
    empty.calibrate(np.empty(0, np.float32), np.empty((0, 4), np.float32))
    assert empty.threshold == before is not None


def slow_events(called: list[bool], truth: list[bool], segment: list[int]) -> tuple[int, int, int]:
    def runs(on: list[bool]) -> list[set[int]]:
        found: list[set[int]] = []
        for place, one in enumerate(on):
            if one and place and on[place - 1] and segment[place] == segment[place - 1]:
                found[-1].add(place)
            elif one:
                found.append({place})
        return found

    true, alarms = runs(truth), runs(called)
    hit = [any(stretch & alarm for alarm in alarms) for stretch in true]
    return sum(hit), len(hit) - sum(hit), sum(not any(alarm & stretch for stretch in true) for alarm in alarms)


@settings(deadline=None)
@given(st.lists(st.tuples(st.booleans(), st.booleans(), st.booleans()), min_size=1, max_size=40))
def test_events_equal_a_slow_oracle(rows: list[tuple[bool, bool, bool]]) -> None:
    called, truth, fresh = (list(column) for column in zip(*rows, strict=True))
    segment = np.cumsum(fresh)
    labels = labels_of([float(one) for one in truth], segment.tolist())
    found = count_events(np.array(called), np.array(truth), labels[:, 2], labels[:, 3])
    assert found == slow_events(called, truth, segment.tolist())


def test_a_segment_drawn_twice_by_a_bootstrap_counts_twice() -> None:
    called, truth = np.array([False, True, True, False]), np.array([False, False, True, True])
    labels = labels_of([0, 0, 1, 1], step=60.0)
    twice = np.concatenate([labels, labels])
    once = count_events(called, truth, labels[:, 2], labels[:, 3])
    both = count_events(np.tile(called, 2), np.tile(truth, 2), twice[:, 2], twice[:, 3])
    assert both == tuple(2 * number for number in once) == (2, 0, 0)
    assert observed(twice[:, 2], twice[:, 3]) == 2 * observed(labels[:, 2], labels[:, 3]) == 8 * 60.0


def test_metrics_by_hand() -> None:
    """Two days of hours; two true stretches, one found; three alarms that touch none, five hours in all."""
    truth = np.zeros(48)
    truth[10:14] = truth[30:34] = 1
    called = np.zeros(48)
    called[12:16] = 1  # touches the first: the two hours after it are false as points, not as an event
    called[[2, 3, 20, 40, 41]] = 1
    one = task(clock=True)
    one.threshold = 0.5
    found = one.measure(called.astype(np.float32), labels_of(truth.tolist(), step=3600.0))
    assert found == {
        "f1": pytest.approx(2 * 2 / (9 + 8)),
        "event_f1": pytest.approx(2 / (2 + 1 + 3)),
        "false_alarms_per_day": pytest.approx(1.5),
        "false_alarm_rate": pytest.approx(100 * 7 / 40),
        "missed_alarm_rate": pytest.approx(100 * 6 / 8),
        "auroc": pytest.approx((2 * 33 + 2 * 7 / 2 + 6 * 33 / 2) / (8 * 40)),
    }
    rows = task(clock=False)
    rows.threshold = 0.5
    assert rows.measure(called.astype(np.float32), labels_of(truth.tolist()))[
        "false_alarms_per_1000_rows"
    ] == pytest.approx(3 * 1000 / 48)


def test_samples_that_nobody_judged_are_not_counted() -> None:
    one = task()
    labels = labels_of([0, 1, NAN, 0, 1, NAN])
    scores = np.array([0.1, 0.9, 5.0, 0.2, 0.8, 5.0], np.float32)
    keep = np.array([0, 1, 3, 4])
    one.threshold = 0.5
    assert one.scored_mask(labels).tolist() == [True, True, False, True, True, False]
    assert one.measure(scores, labels) == one.measure(scores[keep], labels[keep])
    assert one.score(scores, labels) == 1.0


def test_without_an_anomaly_there_is_no_f1_but_a_rate_of_false_alarms() -> None:
    one = task()
    one.threshold = 0.5
    found = one.measure(np.array([0.1, 0.9], np.float32), labels_of([0, 0]))
    assert found["f1"] is found["event_f1"] is found["auroc"] is found["missed_alarm_rate"] is None
    assert found["false_alarm_rate"] == 50.0


def test_scores_beyond_one_rank_as_they_should() -> None:
    one = task()
    one.threshold = 50.0
    scores = np.array([1.0, 40.0, 300.0, 7000.0], np.float32)
    assert one.measure(scores, labels_of([0, 0, 1, 1]))["auroc"] == 1.0


def test_nothing_normal_to_learn_from_is_named() -> None:
    with pytest.raises(
        DataError, match=r"'leak': every training sample holds a row flagged in column `leak`.*`window`"
    ):
        task().fit(labels_of([1, 1, 1]))
    task().fit(labels_of([1, NAN, 1]))
    task().fit(labels_of([0, 0, 0]))  # one class is what it learns from


def test_without_a_column_every_row_is_unlabelled() -> None:
    made = make_task("leak", TaskConfig(kind="anomaly"))
    frame = pl.DataFrame({"x": [1.0, 2.0]})
    assert np.isnan(made.read_from(frame, "a.csv")).all()
    places = Places(np.arange(2), np.zeros(2, int), np.ones(2, int))
    assert made.describe(task().labels_for_samples(np.full(2, NAN, np.float32), places)) == (
        "no labels; all count as normal"
    )


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ([0, 2], r"a\.csv: column `leak`, data row 2: 2 is no label of task 'leak'; expected 0 or 1"),
        (["ok", "leaking"], r"is no label of task 'leak'; expected 0 or 1, true or false.*Write 1 where something"),
    ],
)
def test_what_is_no_flag_is_named(values: list[object], words: str) -> None:
    with pytest.raises(DataError, match=words):
        task().read(pl.Series("leak", values), "a.csv")


def test_flags_are_read_like_yes_and_no() -> None:
    np.testing.assert_array_equal(task().read(pl.Series("leak", ["no", "", "yes"]), "a.csv"), [0, NAN, 1])
