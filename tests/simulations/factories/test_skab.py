"""SKAB: the head of each experiment teaches, its tail tests, and no row does both."""

from pathlib import Path

import numpy as np
import polars as pl
import pytest

from tests.windows import batch_of
from trunkline.client.check import check_site
from trunkline.client.data import open_data
from trunkline.config.site import read_site
from trunkline.errors import ConfigError, DataError
from trunkline.simulations.factories import write_sites
from trunkline.simulations.factories.skab import FILE, LEARNING, PLANTS, SENSORS

LENGTHS = {"anomaly-free": [700], "valve1": [1000, 900, 801], "valve2": [640, 700], "other": [600, 650]}


def write_raw(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng(0)
    frames = []
    for group, lengths in LENGTHS.items():
        for experiment, length in enumerate(lengths):
            start = pl.datetime(2020, 3, 1 + experiment, 10)
            frames.append(
                pl.select(
                    group=pl.lit(group),
                    exp=pl.lit(str(experiment)),
                    datetime=(start + pl.duration(seconds=pl.int_range(length))).dt.strftime("%Y-%m-%d %H:%M:%S"),
                    anomaly=None if group == "anomaly-free" else (pl.int_range(length) >= 550).cast(pl.Float64),
                ).with_columns(pl.Series(name, random.normal(0, 1, length)) for name in SENSORS)
            )
    pl.concat(frames, how="diagonal_relaxed").write_parquet(folder / FILE)
    return folder


@pytest.fixture
def testbed(tmp_path: Path) -> Path:
    return write_raw(tmp_path / "waico" / "skab")


def test_the_first_400_rows_of_each_experiment_teach_and_the_rest_tests(testbed: Path, tmp_path: Path) -> None:
    raw = pl.read_parquet(testbed / FILE)
    sites = write_sites("skab", tmp_path / "out", data=testbed.parent)
    assert [site.name for site in sites] == list(PLANTS)
    for site in sites:
        head, tail = (pl.read_parquet(site / f"{part}.parquet") for part in ("head", "tail"))
        assert head.height == LEARNING * len(LENGTHS[site.name])
        for experiment, length in enumerate(LENGTHS[site.name]):
            own = raw.filter((pl.col("group") == site.name) & (pl.col("exp") == str(experiment)))
            name = f"{site.name}-{experiment:02d}"
            first, rest = (
                part.filter(pl.col("experiment") == f"{name}-{end}") for part, end in ((head, "head"), (tail, "tail"))
            )
            assert [first.height, rest.height] == [LEARNING, length - LEARNING]
            assert [*first["current_A"], *rest["current_A"]] == own["Current"].to_list()
            assert [*first["anomaly"], *rest["anomaly"]] == own["anomaly"].to_list()


def test_windows_stay_within_their_part_of_their_experiment(testbed: Path, tmp_path: Path) -> None:
    for site in write_sites("skab", tmp_path / "out", data=testbed):
        data = open_data(site, tmp_path / "state" / site.name)
        table = pl.concat([pl.read_parquet(site / f"{part}.parquet") for part in ("head", "tail")])
        times = dict(table.group_by("experiment").agg(pl.col("time").dt.epoch("s")).iter_rows())
        assert len(data.train) == 300 * len(LENGTHS[site.name])
        assert len(data.validation) == 100 * len(LENGTHS[site.name])
        for part, first in ((data.train, 0), (data.validation, 300), (data.test, 0)):
            for code in np.unique(part.groups):
                own = sorted(times[part.group_names[code]])
                seen = part.order[part.groups == code]
                assert seen.tolist() == own[first : first + len(seen)]
                # the first window is its first row again and again: nothing of the part before reaches into it
                window = batch_of(part, np.flatnonzero(part.groups == code)[:1])[0]
                assert (window == window[:, :1]).all()
        assert {name[-4:] for name in np.array(data.test.group_names)[np.unique(data.test.groups)]} == {"tail"}


def test_the_run_without_anomalies_is_no_plant_and_labels_are_no_input(testbed: Path, tmp_path: Path) -> None:
    for site in write_sites("skab", tmp_path / "out", data=testbed):
        for part in ("head", "tail"):
            table = pl.read_parquet(site / f"{part}.parquet")
            assert "changepoint" not in table.columns
            assert not table["experiment"].str.starts_with("anomaly-free").any()
        assert set(read_site(site).data.channels) == set(SENSORS.values())


def test_what_cannot_be_dealt_and_absent_files_are_refused(testbed: Path, tmp_path: Path) -> None:
    for wish in ({"plants": 4}, {"groups": 2}):
        with pytest.raises(ConfigError, match=f"--{next(iter(wish))} "):
            write_sites("skab", tmp_path / "out", data=testbed, **wish)  # type: ignore[arg-type]
    with pytest.raises(DataError, match="waico/SKAB"):
        write_sites("skab", tmp_path / "out", data=tmp_path)
    pl.read_parquet(testbed / FILE).drop("Voltage").write_parquet(testbed / FILE)
    with pytest.raises(DataError, match="Voltage"):
        write_sites("skab", tmp_path / "out", data=testbed)


@pytest.mark.realdata
def test_the_real_experiments_are_34_and_open_without_a_warning(real_data: Path, tmp_path: Path) -> None:
    sites = write_sites("skab", tmp_path / "out", data=real_data)
    counts = {}
    for site in sites:
        report = check_site(site)
        assert report.ok, report.problems
        assert report.survey is not None
        counts[site.name] = (report.survey.rows, report.survey.groups["test"])
    assert counts == {"valve1": (18160, 16), "valve2": (4312, 4), "other": (14929, 14)}
