"""Scaling and regimes: training rows only, each regime by itself, exact through JSON."""

import json
import time
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from tests.client.data.sites import fleet, write_site, write_toml
from trunkline.client.data import Scaler, open_data
from trunkline.client.data.preprocess.regimes import Regimes
from trunkline.client.data.preprocess.scale import moments, scale
from trunkline.errors import SensorMismatch


@pytest.mark.parametrize("by", ["group", "time"])
def test_the_scaler_ignores_validation_and_test_rows(tmp_path: Path, by: str) -> None:
    frame = fleet(12).with_columns(mode=(pl.col("cycle") % 2) * 5.0)
    settings = {"split": {"by": by}, "regime": ["mode"], "age": True, "clean": {"outliers": "clip"}}
    one = open_data(write_site(tmp_path, frame, **settings), tmp_path / "state")
    train = {
        (one.train.group_names[code], order) for code, order in zip(one.train.groups, one.train.order, strict=True)
    }
    mine = pl.Series([(unit, float(cycle)) in train for unit, cycle in frame.select("unit", "cycle").iter_rows()])
    wild = frame.with_columns(
        pl.when(mine).then(pl.col(name)).otherwise(pl.col(name) * -1e6 + 1e9).alias(name)
        for name in ("c0", "c1", "mode", "rul")
    )
    two = open_data(write_site(tmp_path, wild, **settings), tmp_path / "state")
    assert json.dumps(one.scaler.to_dict()) == json.dumps(two.scaler.to_dict())
    assert one.train.values.tobytes() == two.train.values.tobytes()
    assert one.tasks["rul"].state() == two.tasks["rul"].state()
    assert one.test.values.tobytes() != two.test.values.tobytes()


def test_training_values_are_standardised_in_each_regime(tmp_path: Path) -> None:
    frame = fleet(12, rows=60).with_columns(mode=pl.col("cycle") % 3)
    frame = frame.with_columns(c0=pl.col("c0") * (pl.col("mode") + 1) + 100.0 * pl.col("mode"))
    site = open_data(write_site(tmp_path, frame, regime=["mode"]), tmp_path / "state")
    assert site.scaler.regimes.combinations == ((0,), (1,), (2,))
    for mode in range(3):
        values = site.train.values[(site.train.order % 3 == mode), 0]
        assert abs(values.mean()) < 1e-5
        assert values.std() == pytest.approx(1.0, abs=1e-4)


def test_transform_does_what_opening_did_and_survives_json(tmp_path: Path) -> None:
    frame = fleet(8, rows=60).with_columns(mode=(pl.col("cycle") % 2) * 5.0)
    site = open_data(write_site(tmp_path, frame, regime=["mode"]), tmp_path / "state")
    again = Scaler.from_dict(json.loads(json.dumps(site.scaler.to_dict())))
    assert again.to_dict() == site.scaler.to_dict()
    names = [site.test.group_names[code] for code in np.unique(site.test.groups)]
    rows = frame.filter(pl.col("unit").is_in(names)).sort("unit", "cycle")
    scaled = again.transform(rows.select("c0", "c1").to_numpy(), rows.select("mode").to_numpy())
    assert scaled.tobytes() == site.test.values.tobytes()
    with pytest.raises(SensorMismatch, match=r"3 columns came; this site has 2: c0, c1"):
        again.transform(np.zeros((5, 3)), np.zeros((5, 1)))


@settings(max_examples=80, deadline=None)
@given(
    cells=st.lists(st.tuples(st.one_of(st.none(), st.floats(-1e6, 1e6)), st.integers(0, 3)), min_size=1, max_size=60),
)
def test_moments_equal_numpy_regime_by_regime(cells: list[tuple[float | None, int]]) -> None:
    values = np.array([np.nan if value is None else value for value, _ in cells])
    regime = np.array([one for _, one in cells])
    count, mean, std = moments(values, regime, 4)
    known = values[~np.isnan(values)]
    for one in range(4):
        here = values[(regime == one) & ~np.isnan(values)]
        assert count[one] == len(here)
        here = here if len(here) else known if len(known) else np.zeros(1)
        assert mean[one] == pytest.approx(here.mean(), rel=1e-9, abs=1e-6)
        assert std[one] == pytest.approx(here.std(), rel=1e-6, abs=1e-4)


@pytest.mark.parametrize("constant", [0.1, 518.67, 1e9 / 3.0, -1e-12, 0.0])
def test_a_channel_constant_within_a_regime_is_zero_there(constant: float) -> None:
    regime = np.repeat([0, 1], 50_000)
    values = np.where(regime == 0, constant, np.random.default_rng(0).normal(size=100_000))
    _, mean, std = moments(values, regime, 2)
    scaled = scale(values + np.where(regime == 0, 5.0, 0.0), mean, std, regime)
    assert np.all(scaled[:50_000] == 0.0)
    assert scaled[50_000:].std() == pytest.approx(1.0, abs=1e-3)


def test_a_spike_stays_a_number_in_float32() -> None:
    scaled = scale(np.array([1e30, -1e30, np.nan]), np.zeros(1), np.full(1, 1e-20), np.zeros(3, dtype=np.int64))
    assert np.isfinite(scaled[:2]).all()
    assert np.isnan(scaled[2])


def noisy(levels: list[float], rows: int, width: float, seed: int = 0) -> NDArray[np.float64]:
    random = np.random.default_rng(seed)
    return random.choice(levels, rows) + random.uniform(-width, width, rows)


@settings(max_examples=60, deadline=None)
@given(
    steps=st.lists(st.floats(1.0, 3.0), min_size=1, max_size=6),
    seed=st.integers(0, 99),
    scale_by=st.sampled_from([1e-3, 1.0, 1e5]),
)
def test_well_separated_levels_are_found_whatever_their_unit(steps: list[float], seed: int, scale_by: float) -> None:
    levels = np.cumsum(steps)
    column = noisy(list(levels), 4000, 0.005, seed) * scale_by
    regimes = Regimes.find(("mode",), column[:, None])
    assert len(regimes) == len(levels)
    nearest = np.abs(column[:, None] / scale_by - levels).argmin(axis=1)
    assert np.array_equal(regimes.of(column[:, None]), nearest)


@pytest.mark.parametrize("grid", [0.0001, 0.5, 3.3])
def test_the_resolution_of_a_noisy_sensor_makes_no_levels(grid: float) -> None:
    """Thirteen evenly spaced values, each gap 8 % of the range: C-MAPSS FD001's Mach number."""
    column = np.random.default_rng(0).integers(-6, 7, 5000) * grid
    assert len(Regimes.find(("mach",), column[:, None])) == 1


def test_recipe_numbers_are_levels_though_evenly_spaced() -> None:
    column = np.random.default_rng(0).integers(1, 7, 2000).astype(np.float64)
    assert len(Regimes.find(("recipe",), column[:, None])) == 6


def test_a_level_with_few_rows_joins_the_nearest() -> None:
    column = np.concatenate([np.full(1000, 0.0), np.full(1000, 10.0), np.full(9, 8.0), np.full(9, 30.0)])
    regimes = Regimes.find(("mode",), column[:, None])
    assert len(regimes) == 2
    assert regimes.of(np.array([[0.0], [8.0], [10.0], [30.0], [-99.0]])).tolist() == [0, 1, 1, 1, 0]


def test_an_unseen_combination_counts_as_the_nearest_known() -> None:
    rows = np.array([[0.0, 0.0]] * 50 + [[10.0, 0.0]] * 50 + [[10.0, 100.0]] * 50)
    regimes = Regimes.find(("speed", "load"), rows)
    assert regimes.combinations == ((0, 0), (1, 0), (1, 1))
    # (0, 1) was never seen: low speed at half to full load is nearer to idle or to full load, by shares of the range
    assert regimes.of(np.array([[1.0, 60.0], [4.0, 95.0]])).tolist() == [0, 2]
    assert Regimes.from_dict(json.loads(json.dumps(regimes.to_dict()))) == regimes


def test_missing_settings_take_the_last_of_their_group(tmp_path: Path) -> None:
    frame = fleet(8, rows=40).with_columns(mode=(pl.col("cycle") > 20) * 5.0)
    gaps = frame.with_columns(mode=pl.when(pl.col("cycle").is_in([10, 30])).then(None).otherwise(pl.col("mode")))
    whole = open_data(write_site(tmp_path / "a", frame, regime=["mode"]), tmp_path / "a")
    holes = open_data(write_site(tmp_path / "b", gaps, regime=["mode"]), tmp_path / "b")
    assert holes.train.values.tobytes() == whole.train.values.tobytes()
    assert any("16 rows without this setting" in note.what for note in holes.notes)


def test_a_setting_without_levels_is_noted(tmp_path: Path) -> None:
    frame = fleet(8).with_columns(mode=1.0)
    site = open_data(write_site(tmp_path, frame, regime=["mode"]), tmp_path / "state")
    assert any(note.where == "mode" and "no separate levels" in note.what for note in site.notes)


def test_age_is_time_since_the_groups_first_row(tmp_path: Path) -> None:
    frame = fleet([10, 30, 20, 5, 8]).with_columns(cycle=pl.col("cycle") * 2 + 100)
    site = open_data(write_site(tmp_path, frame, age=True), tmp_path / "state")
    assert site.channels == ("c0", "c1", "age")
    for part in (site.train, site.validation, site.test):
        age = (part.order - 102.0) / site.scaler.std[0, 2]
        assert np.allclose(part.values[:, 2], age, atol=1e-5)
    assert site.train.values[:, 2].std() == pytest.approx(1.0, abs=1e-5)


def test_age_goes_on_across_a_time_split(tmp_path: Path) -> None:
    site = open_data(write_site(tmp_path, fleet([50]), age=True, split={"by": "time"}), tmp_path / "state")
    assert site.test.values[0, 2] > site.train.values[-1, 2] > 0.0


def test_categories_unknown_in_training_are_zero(tmp_path: Path) -> None:
    frame = fleet(10, rows=4).with_columns(
        product=pl.when(pl.col("cycle") == 1)
        .then(None)
        .when(pl.col("cycle") == 2)
        .then(pl.col("unit"))
        .otherwise(pl.lit("m"))
    )
    site = open_data(write_site(tmp_path, frame, window=None, categorical=["product"]), tmp_path / "state")
    assert site.category_names[0][0] == "m"
    assert site.categories == (len(site.category_names[0]) + 1,) == (8,)
    assert set(site.test.codes(slice(None))[:, 0].tolist()) == {0, 1}
    codes = site.train.codes(slice(None))[:, 0]
    assert set(codes.tolist()) == set(range(8))
    assert np.all(codes[site.train.order == 1] == 0)


def cmapss_site(folder: Path, data: Path, fd: int) -> Path:
    """A C-MAPSS plant with unique unit names; labels as the file's own cycles, enough for opening."""
    sensors = [f"s{number:02d}" for number in (2, 3, 4, 7, 8, 9, 11, 12, 13, 14, 15, 17, 20, 21)]
    settings = {
        "files": "train.parquet",
        "test_files": "test.parquet",
        "test_at": "last",
        "channels": sensors,
        "window": 64,
    }
    write_toml(
        folder,
        {**settings, "regime": ["setting1", "setting2", "setting3"]},
        {"rul": {"kind": "regression", "target": "rul", "cap": 125.0}},
    )
    for part in ("train", "test"):
        frame = pl.read_parquet(data / "cmapss" / f"{part}_FD00{fd}.parquet")
        rul = pl.col("cycle").max().over("unit") - pl.col("cycle")
        frame.with_columns(rul=rul, unit=pl.format(part + "-{}", "unit")).write_parquet(folder / f"{part}.parquet")
    return folder


@pytest.mark.realdata
@pytest.mark.parametrize(("fd", "regimes", "groups"), [(1, 1, 100), (2, 6, 260), (3, 1, 100), (4, 6, 249)])
def test_cmapss_has_the_regimes_it_is_known_for(
    tmp_path: Path, real_data: Path, fd: int, regimes: int, groups: int
) -> None:
    folder = cmapss_site(tmp_path, real_data, fd)
    started = time.perf_counter()
    site = open_data(folder, folder / "state")
    seconds = time.perf_counter() - started
    assert len(site.scaler.regimes) == regimes
    assert len({*site.train.groups.tolist(), *site.validation.groups.tolist()}) == groups
    assert len(site.test) == len(np.unique(site.test.groups))
    assert np.abs(site.train.values).max() < 20.0
    assert seconds < 10.0  # 0.3 s on an idle core; a loop over rows would take minutes
