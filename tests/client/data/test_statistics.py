"""What a site may say of the scale of its inputs and labels: counts, means and variances of enough values."""

from pathlib import Path

import numpy as np
import polars as pl
import pytest

from tests.client.data.sites import RUL, fleet, write_site
from trunkline.client.data import open_data
from trunkline.client.data.statistics import FEWEST, label_scale, lent_statistics, names_of, set_label_scale
from trunkline.models.labels import known

TASKS = {"rul": RUL, "failing": {"kind": "binary", "target": "failing"}}


def test_statistics_are_those_of_the_training_rows(tmp_path: Path) -> None:
    site = open_data(write_site(tmp_path, fleet(12), TASKS, window=None), tmp_path / "state")
    arrays = lent_statistics(site)
    assert set(arrays) == {
        "scaler.count", "scaler.mean", "scaler.variance", "scaler.centres", "scaler.widths", "scaler.label.rul"
    }  # fmt: skip
    labels = site.train.labels["rul"][known(site.train.labels["rul"])]
    np.testing.assert_allclose(arrays["scaler.label.rul"], [len(labels), labels.mean(), labels.std() ** 2], rtol=1e-5)
    rows = len(site.train.values)
    assert arrays["scaler.count"].tolist() == [[rows, rows]]
    frame = pl.read_csv(tmp_path / "data.csv")
    groups = [site.train.group_names[code] for code in np.unique(site.train.groups)]
    trained = frame.filter(pl.col("unit").is_in(groups))
    np.testing.assert_allclose(arrays["scaler.mean"][0], [trained["c0"].mean(), trained["c1"].mean()], rtol=1e-6)
    np.testing.assert_allclose(arrays["scaler.variance"][0], [trained["c0"].var(ddof=0), trained["c1"].var(ddof=0)])


def test_figures_of_few_values_do_not_leave(tmp_path: Path) -> None:
    """The mean of one value is that value."""
    frame = fleet(12).with_columns(c1=pl.when(pl.int_range(pl.len()) % 30 == 0).then(pl.col("c1")))
    frame = frame.with_columns(rul=pl.when(pl.int_range(pl.len()) % 25 == 0).then(pl.col("rul")))
    site = open_data(write_site(tmp_path, frame, TASKS, window=None), tmp_path / "state")
    assert 0 < known(site.train.labels["rul"]).sum() < FEWEST
    arrays = lent_statistics(site)
    assert "scaler.label.rul" not in arrays
    for name in ("count", "mean", "variance"):
        assert arrays[f"scaler.{name}"][0, 1] == 0.0
        assert arrays[f"scaler.{name}"][0, 0] > 0.0


def test_a_site_that_takes_its_values_as_they_are_gives_no_statistics_of_its_inputs(tmp_path: Path) -> None:
    site = open_data(write_site(tmp_path, fleet(12), TASKS, scale="none"), tmp_path / "state")
    assert set(lent_statistics(site)) == {"scaler.label.rul"}


def test_the_names_behind_the_columns(tmp_path: Path) -> None:
    site = open_data(write_site(tmp_path, fleet(12), TASKS, age=True), tmp_path / "state")
    inputs = names_of(site)
    assert (inputs.channels, inputs.settings, inputs.window) == (("c0", "c1", "age"), (), 4)


def test_a_label_is_scaled_as_others_scale_it(tmp_path: Path) -> None:
    site = open_data(write_site(tmp_path, fleet(12), TASKS), tmp_path / "state")
    assert label_scale(site.tasks["failing"]) is None
    set_label_scale(site.tasks["rul"], 3.0, 2.0)
    assert label_scale(site.tasks["rul"]) == pytest.approx((3.0, 2.0))
