"""Sites that lend a stem must read the same columns in the same scale: constants kept, values as they are."""

import json
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from tests.client.data.sites import fleet, write_site
from trunkline.client.data import open_data
from trunkline.client.data.preprocess.scale import Scaler
from trunkline.errors import DataError


def still() -> pl.DataFrame:
    """Ten units; c0 never moves, c1 never speaks, c2 does."""
    return fleet(10, channels=3).with_columns(c0=pl.lit(7.0), c1=pl.lit(None, dtype=pl.Float64))


CHANNELS = ["c0", "c1", "c2"]


def test_a_constant_channel_is_kept_as_zero_where_the_site_says_so_and_is_said_once(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="`c0` is constant: 7"):
        open_data(write_site(tmp_path / "strict", still(), channels=CHANNELS), tmp_path / "a")
    site = open_data(
        write_site(tmp_path / "kept", still(), channels=CHANNELS, clean={"constant": "keep"}), tmp_path / "b"
    )
    assert site.channels == ("c0", "c1", "c2")
    for part in (site.train, site.validation, site.test):
        assert (part.values[:, 0] == 0.0).all()
        assert np.isnan(part.values[:, 1]).all()
    said = [note.what for note in site.notes if note.level == "warning" and note.where == "channels"]
    assert said == ["2 channels never move in training: c0, c1."]


def test_a_channel_that_moves_is_scaled_alike_whether_constants_are_kept_or_not(tmp_path: Path) -> None:
    kept = open_data(
        write_site(tmp_path / "kept", still(), channels=CHANNELS, clean={"constant": "keep"}), tmp_path / "a"
    )
    alone = open_data(write_site(tmp_path / "alone", still(), channels=["c2"]), tmp_path / "b")
    assert np.array_equal(kept.train.values[:, 2], alone.train.values[:, 0])


def test_without_scaling_a_value_means_the_same_at_every_site(tmp_path: Path) -> None:
    one, other = fleet(10, seed=1), fleet(10, seed=2).with_columns(c0=pl.col("c0") * 100.0 + 5.0)
    for name, frame in (("one", one), ("other", other)):
        site = open_data(write_site(tmp_path / name, frame, scale="none"), tmp_path / f"{name}-state")
        rows = {unit: part for part in (site.train, site.validation, site.test) for unit in np.unique(part.groups)}
        for code, part in rows.items():
            raw = frame.filter(pl.col("unit") == part.group_names[code]).select("c0", "c1").to_numpy()
            assert np.array_equal(part.values[part.ends[part.groups == code]], raw.astype(np.float32))


def test_the_scaler_of_unscaled_inputs_leaves_new_rows_as_they_are_too(tmp_path: Path) -> None:
    site = open_data(write_site(tmp_path / "site", fleet(10), scale="none"), tmp_path / "state")
    again = Scaler.from_dict(json.loads(json.dumps(site.scaler.to_dict())))
    rows = np.random.default_rng(0).normal(50.0, 30.0, (20, 2))
    assert np.array_equal(again.transform(rows, np.zeros((20, 0))), rows.astype(np.float32))
