"""Forecasts: which rows a label may come from, what a naive forecast is, and that nothing to come is ever seen."""

import math
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.windows import batch_of
from trunkline.client.data import SiteData, open_data
from trunkline.config.site import read_site
from trunkline.config.tasks import TaskConfig
from trunkline.errors import ConfigError, DataError
from trunkline.models.labels import Places
from trunkline.models.tasks import make_task
from trunkline.models.tasks.forecast import Forecast
from trunkline.models.tasks.task import Samples

NAN = float("nan")


def task(**keys: object) -> Forecast:
    made = make_task("load", TaskConfig(kind="forecast", target="load", **keys))  # type: ignore[arg-type]
    assert isinstance(made, Forecast)
    return made


def every_row(one: Forecast, groups: list[list[float]]) -> np.ndarray:
    """Labels of a sample at every row of these groups, (rows, 2H)."""
    sizes = [len(group) for group in groups]
    start = np.concatenate([[0], np.cumsum(sizes)])
    first, last = np.repeat(start[:-1], sizes), np.repeat(start[1:] - 1, sizes)
    values = np.array([value for group in groups for value in group], np.float32)
    return one.labels_for_samples(values, Places(np.arange(len(values)), first, last))


horizons = st.lists(st.integers(1, 9), min_size=1, max_size=3, unique=True).map(tuple)


@settings(deadline=None)
@given(st.lists(st.integers(1, 14), min_size=1, max_size=4), horizons, st.integers(1, 6))
def test_labels_and_naive_forecasts_come_from_the_samples_own_group(
    sizes: list[int], ahead: tuple[int, ...], season: int
) -> None:
    groups = [[100.0 * place + row for row in range(size)] for place, size in enumerate(sizes)]
    found = every_row(task(horizons=ahead, season=season), groups)
    row = 0
    for group in groups:
        for now in range(len(group)):
            for place, step in enumerate(ahead):
                back = now + step
                while back > now:  # the latest value of that phase which is already known
                    back -= season
                future = group[now + step] if now + step < len(group) else NAN
                naive = group[back] if back >= 0 else NAN
                np.testing.assert_equal(found[row, [place, len(ahead) + place]].tolist(), [future, naive])
            row += 1


def test_a_part_ends_like_a_group() -> None:
    one = task(horizons=(2,), season=1)
    values = np.arange(10, dtype=np.float32)
    whole = np.zeros(10, np.int64), np.full(10, 9)
    halves = np.repeat([0, 5], 5), np.repeat([4, 9], 5)
    assert one.labels_for_samples(values, Places(np.array([3]), *whole))[0, 0] == 5
    assert math.isnan(one.labels_for_samples(values, Places(np.array([3]), *halves))[0, 0])


numbers = st.floats(-100, 100, width=32)


@settings(deadline=None)
@given(st.data(), st.integers(2, 8))
def test_metrics_equal_a_slow_oracle(data: st.DataObject, rows: int) -> None:
    one = task(horizons=(1, 3), season=2, quantiles=(0.1, 0.5, 0.8))
    cell = st.one_of(st.just(NAN), numbers)
    labels = np.array(
        data.draw(st.lists(st.lists(cell, min_size=4, max_size=4), min_size=rows, max_size=rows)), np.float32
    )
    labels[0, 0] = 1.0  # one to judge by
    prediction = np.array(
        data.draw(st.lists(st.lists(numbers, min_size=6, max_size=6), min_size=rows, max_size=rows)), np.float32
    ).reshape(rows, 2, 3)
    one.naive = 2.5
    found = one.measure(prediction, labels)
    miss, inside, pinball, naive, beside = [], [], [], [], []
    for row in range(rows):
        for place in range(2):
            true, usual = float(labels[row, place]), float(labels[row, 2 + place])
            low, middle, high = map(float, prediction[row, place])
            if math.isnan(true):
                continue
            miss.append(abs(middle - true))
            inside.append(low <= true <= high)
            for level, value in zip((0.1, 0.5, 0.8), (low, middle, high), strict=True):
                pinball.append(level * (true - value) if true > value else (1 - level) * (value - true))
            if not math.isnan(usual):
                naive.append(abs(usual - true))
                beside.append(abs(middle - true))
    near = {"rel": 1e-6, "abs": 1e-7}
    assert found["mae"] == pytest.approx(np.mean(miss), **near)
    assert found["mase"] == one.score(prediction, labels) == pytest.approx(np.mean(miss) / 2.5, **near)
    assert found["rmse"] == pytest.approx(math.sqrt(np.mean(np.square(miss))), **near)
    assert found["pinball"] == pytest.approx(np.mean(pinball), **near)
    assert found["coverage"] == pytest.approx(np.mean(inside), **near)
    if sum(naive) > 0:
        assert found["skill"] == pytest.approx(1 - np.mean(beside) / np.mean(naive), **near)
    else:
        assert found["skill"] is None


def test_the_seasonal_naive_forecast_has_a_mase_of_one_and_no_skill_where_it_was_scaled() -> None:
    draw = np.random.default_rng(0)
    one = task(horizons=(8, 2), season=6)
    labels = every_row(one, [draw.normal(size=60).tolist(), draw.normal(size=25).tolist()])
    one.fit(labels)
    nearest = task(horizons=(2,), season=6)
    rows = labels[:, [1, 3]]
    nearest.fit(rows)
    rows = rows[~np.isnan(rows).any(axis=1)]
    naive = np.repeat(rows[:, 1:, None], 3, axis=2)
    assert one.naive == nearest.naive
    assert nearest.score(naive, rows) == pytest.approx(1.0, rel=1e-6)
    assert nearest.measure(naive, rows)["skill"] == pytest.approx(0.0, abs=1e-6)
    # Hyndman and Koehler's own definition: mean |y(t) - y(t - m)| over the rows that have both
    draw = np.random.default_rng(0)
    differences = [np.abs(group[6:] - group[:-6]) for group in (draw.normal(size=60), draw.normal(size=25))]
    assert one.naive == pytest.approx(np.concatenate(differences).mean(), rel=1e-5)


@pytest.mark.parametrize(("season", "window"), [(1, 4), (6, 6), (6, 20), (6, 3), (1, None)])
def test_a_head_whose_own_part_is_silent_starts_as_the_naive_forecast(season: int, window: int | None) -> None:
    one = task(horizons=(1, 4), season=season, quantiles=(0.5,))
    draw = np.random.default_rng(1)
    series = draw.normal(50.0, 9.0, 40)
    labels = every_row(one, [series.tolist()])
    one.bind_inputs(Samples(("other", "load"), window, scale=((0.0, 1.0), (30.0, 4.0))))
    one.fit(labels)
    head = one.head(5)
    with torch.no_grad():
        head.weight.zero_()
        head.bias[:2] = 0.0
    now = 30
    scaled = torch.from_numpy((series - 30.0) / 4.0).float()
    seen = scaled[now - (window or 1) + 1 : now + 1]
    x = torch.stack([torch.zeros_like(seen), seen])[None]
    met = one.combine_with_inputs(head(torch.randn(1, 5)), x if window else x[..., 0])
    expected = labels[now, 2:].copy()
    expected[one._seen() < 0] = series[now]  # a season farther back than the sample: the last value instead
    np.testing.assert_allclose(one.predict(met)[0, :, 0], expected, rtol=1e-4)


def test_a_silent_target_leaves_a_finite_forecast() -> None:
    one = task(horizons=(1,), season=1)
    one.bind_inputs(Samples(("load",), 3, scale=((0.0, 1.0),)))
    met = one.combine_with_inputs(torch.zeros(2, one.outputs) + 0.5, torch.full((2, 1, 3), NAN))
    assert met.isfinite().all()


def test_scaled_by_regime_the_target_is_no_past_value() -> None:
    one = task(horizons=(1,), season=1)
    one.bind_inputs(Samples(("load",), 3))
    assert one.outputs == 3


@settings(deadline=None)
@given(st.lists(st.floats(-1e3, 1e3, width=32), min_size=6, max_size=6))
def test_quantiles_never_cross(values: list[float]) -> None:
    found = task(horizons=(1, 2)).predict(torch.tensor([values]))
    assert found.shape == (1, 2, 3)
    assert (np.diff(found, axis=2) >= 0).all()


def test_pinball_learns_each_quantile() -> None:
    one = task(quantiles=(0.2, 0.9))
    values = torch.linspace(-1, 1, 201)
    labels = torch.stack([values, values], dim=1)
    free = torch.zeros(2, requires_grad=True)
    for _ in range(400):
        (slope,) = torch.autograd.grad(one.loss(free.expand(201, 2), labels), free)
        free = (free - 0.1 * slope).detach().requires_grad_()
    np.testing.assert_allclose(free.detach().numpy(), [-0.6, 0.8], atol=0.03)


def test_one_quantile_has_no_band_to_cover() -> None:
    assert "coverage" not in task(quantiles=(0.5,)).metrics
    assert task(quantiles=(0.05, 0.95)).metrics["coverage"].unit == "of 0.9"


def test_a_season_that_repeats_to_the_digit_still_has_a_scale() -> None:
    one = task(season=2)
    one.fit(every_row(one, [[1.0, 5.0] * 8]))
    assert one.naive == pytest.approx(2.0, rel=0.1)


SITE = """
name = "mill"
[data]
files = "*.parquet"
group = "unit"
order = "hour"
channels = ["load", "heat"]
window = 4
{data}
[data.split]
by = "time"
validation = 0.2
test = 0.4
[tasks.load]
kind = "forecast"
target = "load"
{task}
[tasks.heat]
kind = "regression"
target = "worn"
"""


def mill(folder: Path, *, data: str = "", task: str = "", change: np.ndarray | None = None, rows: int = 50) -> SiteData:
    draw = np.random.default_rng(4)
    frame = {
        "unit": np.repeat(["a", "b"], rows),
        "hour": np.tile(np.arange(rows), 2),
        "load": draw.normal(size=2 * rows),
        "heat": draw.normal(size=2 * rows),
        "worn": draw.normal(size=2 * rows),
    }
    silent = draw.random(2 * rows) < 0.3
    for name in ("load", "heat"):
        frame[name] = np.where(silent, NAN, frame[name])
        if change is not None:
            frame[name] = np.where(change, 7.0 * draw.normal(size=2 * rows), frame[name])
    folder.mkdir()
    pl.DataFrame(frame).write_parquet(folder / "log.parquet")
    (folder / "site.toml").write_text(SITE.format(data=data, task=task))
    return open_data(folder, folder / "state")


@pytest.mark.parametrize("missing", ["forward", "zero", "keep"])
def test_nothing_that_is_still_to_come_changes_what_a_forecast_sees(tmp_path: Path, missing: str) -> None:
    now = 40  # in the test part
    clean = f'[data.clean]\nmissing = "{missing}"'
    before = mill(tmp_path / "one", data=clean).test
    after = mill(tmp_path / "two", data=clean, change=np.tile(np.arange(50) > now, 2)).test
    seen = np.flatnonzero(before.order <= now)
    assert len(seen) > 10
    assert batch_of(before, seen).tobytes() == batch_of(after, seen).tobytes()
    assert batch_of(before).tobytes() != batch_of(after).tobytes()  # the change is one
    assert not np.array_equal(before.labels["load"][seen], after.labels["load"][seen], equal_nan=True)


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ('[data.clean]\nmissing = "linear"', r"'linear'.*gap of `load` with values from behind it.*'load'.*'forward'"),
        ('[data.clean]\nchannels = { heat = "linear" }', r"gap of `heat`.*'load'"),
        ('test_at = "last"', r"nothing comes after it for task 'load'.*\"all\""),
    ],
)
def test_settings_that_look_ahead_or_leave_nothing_ahead_are_refused(tmp_path: Path, data: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        mill(tmp_path / "mill", data=data)
    (tmp_path / "mill" / "site.toml").write_text(
        SITE.format(data=data, task="").replace('kind = "forecast"', 'kind = "regression"').replace('["load", ', "[")
    )
    read_site(tmp_path / "mill")  # other kinds may


def test_a_horizon_longer_than_training_is_named_with_the_longest_that_fits_and_the_others_go_on(
    tmp_path: Path,
) -> None:
    site = mill(tmp_path / "mill", task="horizons = [1, 20]")  # 20 training rows a unit
    assert list(site.tasks) == ["heat"]
    (note,) = [note for note in site.notes if note.where == "task load"]
    assert "a horizon of 20 rows" in note.what
    assert "the longest group has 20 rows, so the farthest horizon that fits is 19" in note.what
    assert list(mill(tmp_path / "fits", task="horizons = [1, 19]").tasks) == ["load", "heat"]


def test_a_horizon_longer_than_a_part_that_only_scores_is_said_and_the_task_goes_on(tmp_path: Path) -> None:
    site = mill(tmp_path / "mill", task="horizons = [1, 12]")  # 10 validation rows a unit
    assert list(site.tasks) == ["load", "heat"]
    (note,) = [note for note in site.notes if note.where == "task load"]
    assert note.what.startswith("validation rows: a horizon of 12 rows")


def test_a_season_longer_than_training_is_named(tmp_path: Path) -> None:
    site = mill(tmp_path / "mill", task="season = 30")
    assert list(site.tasks) == ["heat"]
    assert any("`season` is 30 rows" in note.what and "Lower `season`" in note.what for note in site.notes)


def test_no_measured_value_at_all_is_named() -> None:
    with pytest.raises(DataError, match=r"column `load` has no label in any training row"):
        task().fit(np.full((4, 2), NAN, np.float32))
