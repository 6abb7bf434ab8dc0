"""Cleaning: what is dropped, what becomes missing, what is filled, and that all of it is said."""

from pathlib import Path

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.client.data.sites import fleet, write_site, write_toml
from tests.client.data.test_read import refused
from trunkline.client.data import SiteData, open_data
from trunkline.client.data.preprocess import clean
from trunkline.client.data.windows import segments
from trunkline.config.site import CleanConfig, Missing


def filled_by_hand(values: list[float], group: list[int], order: list[float], policy: Missing) -> list[float]:
    """`fill` one value at a time."""
    result = list(values)
    for row, value in enumerate(values):
        if not np.isnan(value) or policy == "keep":
            continue
        if policy == "zero":
            result[row] = 0.0
            continue
        known = [one for one in range(len(values)) if group[one] == group[row] and not np.isnan(values[one])]
        before, after = [one for one in known if one < row], [one for one in known if one > row]
        if policy == "forward" or not (before and after):
            result[row] = values[before[-1]] if before else values[after[0]] if after else np.nan
        else:
            left, right = before[-1], after[0]
            width = order[right] - order[left]
            part = (order[row] - order[left]) / width if width else 0.0
            result[row] = (1 - part) * values[left] + part * values[right]
    return result


@settings(max_examples=150, deadline=None)
@given(
    cells=st.lists(
        st.tuples(st.one_of(st.none(), st.integers(-9, 9)), st.booleans(), st.integers(0, 3)), min_size=1, max_size=30
    ),
    policy=st.sampled_from(["forward", "linear", "zero", "keep"]),
)
def test_filling_equals_the_slow_obvious_way(cells: list[tuple[int | None, bool, int]], policy: Missing) -> None:
    values = np.array([np.nan if value is None else value for value, _, _ in cells], dtype=np.float32)
    group = np.cumsum([starts for _, starts, _ in cells])
    order = np.cumsum([step for _, _, step in cells]).astype(np.float64)
    expected = filled_by_hand(values.tolist(), group.tolist(), order.tolist(), policy)
    left = clean.fill(values, *segments(group), order, policy)
    assert np.allclose(values, expected, equal_nan=True, atol=1e-5)
    assert left == int(np.isnan(values).sum())


def test_exact_duplicates_are_dropped_and_contradictions_kept(tmp_path: Path) -> None:
    frame = fleet(6)
    copies = frame.filter((pl.col("unit") == "u002") & (pl.col("cycle") <= 3))
    contradiction = frame.filter((pl.col("unit") == "u004") & (pl.col("cycle") == 5)).with_columns(
        c0=pl.col("c0") + 1.0
    )
    folder = write_site(tmp_path, pl.concat([frame, copies, copies, contradiction]))
    site = open_data(folder, folder / "state")
    assert sum(len(part.values) for part in (site.train, site.validation, site.test)) == 61
    notes = {note.level: note.what for note in site.notes if note.where == "rows"}
    assert "6 exact duplicate rows dropped" in notes["info"]
    assert "line 62" in notes["info"]
    assert "1 row with the group and `cycle`" in notes["warning"]
    assert "line 68" in notes["warning"]


def test_a_contradiction_between_copies_is_still_seen(tmp_path: Path) -> None:
    """a, b, a: the second a is a copy, b a contradiction, whatever lies between them."""
    frame = fleet(6)
    one = frame.filter((pl.col("unit") == "u004") & (pl.col("cycle") == 5))
    folder = write_site(tmp_path, pl.concat([frame, one.with_columns(c1=99.0), one]))
    site = open_data(folder, folder / "state")
    said = " ".join(note.what for note in site.notes if note.where == "rows")
    assert "1 exact duplicate row dropped" in said
    assert "1 row with the group" in said


def test_rows_alike_at_two_moments_are_no_duplicates(tmp_path: Path) -> None:
    frame = fleet(6).with_columns(
        c0=(pl.col("cycle") > 5).cast(pl.Float64),
        c1=(pl.col("cycle") > 7).cast(pl.Float64),
        rul=1.0 * (pl.col("rul") > 3),
    )
    folder = write_site(tmp_path, frame)
    site = open_data(folder, folder / "state")
    assert sum(len(part.values) for part in (site.train, site.validation, site.test)) == 60


def hole(frame: pl.DataFrame, column: str, value: float | None, unit: str, *cycles: int) -> pl.DataFrame:
    here = (pl.col("unit") == unit) & pl.col("cycle").is_in(cycles)
    return frame.with_columns(
        pl.when(here).then(pl.lit(value, dtype=pl.Float64)).otherwise(pl.col(column)).alias(column)
    )


def unit_values(site: SiteData, unit: str, channel: int = 0) -> np.ndarray:
    """Scaled values of one unit, in order."""
    for part in (site.train, site.validation, site.test):
        if unit in part.group_names and (mine := part.groups == part.group_names.index(unit)).any():
            return part.values[part.ends[mine], channel]
    raise AssertionError(unit)


def test_impossible_values_become_missing_and_are_counted(tmp_path: Path) -> None:
    frame = hole(hole(hole(fleet(8), "c0", np.inf, "u003", 4), "c0", -500.0, "u003", 5), "c1", 1e39, "u005", 2)
    folder = write_site(tmp_path, frame, clean={"valid": {"c0": [-100.0, 100.0]}, "missing": "keep"})
    site = open_data(folder, folder / "state")
    assert np.flatnonzero(np.isnan(unit_values(site, "u003"))).tolist() == [3, 4]
    assert np.flatnonzero(np.isnan(unit_values(site, "u005", 1))).tolist() == [1]
    said = {note.where: note.what for note in site.notes if note.level == "warning"}
    assert "2 impossible values" in said["c0"]
    assert "1 impossible value " in said["c1"]
    plain = open_data(write_site(tmp_path / "plain", hole(fleet(8), "c0", None, "u003", 4, 5)), tmp_path / "state")
    assert plain.scaler.mean[0, 0] == site.scaler.mean[0, 0]


@pytest.mark.parametrize(
    ("policy", "expected"),
    [("forward", [0, 0, 0, 3, 3, 5]), ("linear", [0, 1, 2, 3, 4, 5]), ("zero", None), ("keep", None)],
)
def test_each_policy_fills_a_gap_its_way(tmp_path: Path, policy: str, expected: list[int] | None) -> None:
    frame = fleet(6, rows=6).with_columns(c0=pl.col("cycle") * 1.0)
    whole = unit_values(open_data(write_site(tmp_path / "a", frame), tmp_path / "a"), "u001")
    gaps = hole(frame, "c0", None, "u001", 2, 3, 5)
    site = open_data(write_site(tmp_path / "b", gaps, clean={"channels": {"c0": policy}}), tmp_path / "b")
    got = unit_values(site, "u001")
    same = open_data(write_site(tmp_path / "c", gaps, clean={"missing": policy}), tmp_path / "c")
    assert np.array_equal(got, unit_values(same, "u001"), equal_nan=True)
    if expected:
        assert np.allclose(got, (np.array(expected) + 1 - site.scaler.mean[0, 0]) / site.scaler.std[0, 0], atol=1e-5)
    elif policy == "zero":
        assert got[[1, 2, 4]].tolist() == [0.0] * 3
    else:
        assert np.flatnonzero(np.isnan(got)).tolist() == [1, 2, 4]
    assert whole.shape == got.shape
    assert any("8.33%" in note.what and note.where == "c0" for note in site.notes)


def test_a_carried_value_is_not_absurd_in_the_next_regime(tmp_path: Path) -> None:
    """c0 is 10 in one regime and 1,000 in the other; a raw 10 carried into the second would be hundreds of sigmas off."""
    frame = fleet(8, rows=40).with_columns(mode=pl.col("cycle") % 2)
    frame = frame.with_columns(c0=pl.col("c1") * 0.01 + pl.col("mode") * 990.0 + 10.0)
    folder = write_site(tmp_path, hole(frame, "c0", None, "u002", 20, 21), regime=["mode"])
    site = open_data(folder, folder / "state")
    assert len(site.scaler.regimes) == 2
    assert np.abs(unit_values(site, "u002")).max() < 6.0


def test_rows_without_time_are_not_filled_from_their_neighbours(tmp_path: Path) -> None:
    folder = write_site(tmp_path, hole(fleet(6), "c0", None, "u001", 4), order=None, window=None)
    site = open_data(folder, folder / "state")
    assert np.isnan(unit_values(site, "u001")).sum() == 1


def test_outliers_are_counted_or_clipped_by_training_rows_only(tmp_path: Path) -> None:
    frame = hole(fleet(10), "c0", 5000.0, "u003", 4)
    sites = {
        one: open_data(write_site(tmp_path / one, frame, clean={"outliers": one}), tmp_path / one)
        for one in ("flag", "clip", "keep")
    }
    assert any("1 outlier by" in note.what for note in sites["flag"].notes)
    assert not any("outlier" in note.what for note in sites["keep"].notes)
    assert unit_values(sites["clip"], "u003")[3] < 30.0 < 1e9
    raw = unit_values(sites["flag"], "u003")[3] * sites["flag"].scaler.std[0, 0] + sites["flag"].scaler.mean[0, 0]
    assert raw == pytest.approx(5000.0, rel=1e-4)


def test_outliers_are_judged_within_their_regime() -> None:
    """Two regimes far apart: overall nothing sticks out, and the rarer regime is no outlier."""
    random = np.random.default_rng(0)
    regime = (np.arange(1000) % 10 == 0).astype(np.int64)
    values = random.normal(0.0, 1.0, 1000) + 1000.0 * regime
    values[5] = 500.0
    training = np.ones(1000, dtype=bool)
    clipped, count = clean.outliers(values, training, regime, CleanConfig(outliers="clip"))
    assert count == 1
    assert clipped[5] < 20.0
    assert np.array_equal(np.delete(clipped, 5), np.delete(values, 5))


def test_a_channel_at_rest_uses_its_spread_not_a_zero_mad() -> None:
    values = np.zeros(1000)
    values[:100] = 1.0
    training = np.ones(1000, dtype=bool)
    _, count = clean.outliers(values, training, np.zeros(1000, dtype=np.int64), CleanConfig())
    assert count == 0


@pytest.mark.parametrize("value", [7.25, None])
def test_a_constant_or_silent_channel_is_refused(tmp_path: Path, value: float | None) -> None:
    frame = fleet(6).with_columns(c1=pl.lit(value, dtype=pl.Float64))
    words = ("constant: 7.25",) if value else ("no value in any training row",)
    text = refused(write_site(tmp_path, frame), "channel c1", "`c1`", "Take `c1` out of `channels`", *words)
    assert "c0" not in text


def test_a_channel_that_moves_only_outside_training_is_refused(tmp_path: Path) -> None:
    frame = fleet([40]).with_columns(c1=pl.when(pl.col("cycle") > 30).then(pl.col("c1")).otherwise(3.0))
    refused(write_site(tmp_path, frame, split={"by": "time"}), "`c1` is constant: 3")


def test_policies_for_unknown_channels_are_refused(tmp_path: Path) -> None:
    folder = write_toml(
        tmp_path, {"clean": {"channels": {"c9": "zero"}, "valid": {"c8": [0.0, 1.0], "c0": [2.0, 1.0]}}}
    )
    fleet(6).write_csv(folder / "data.csv")
    refused(
        folder,
        "`data.clean.channels` names `c9`",
        "`data.clean.valid` names `c8`",
        "`data.clean.valid.c0` = [2.0, 1.0]",
    )
