"""A steel works' energy: midnight where it belongs, and nothing of the moment that is asked about."""

import gzip
from datetime import datetime, timedelta
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from trunkline.client.check import check_site
from trunkline.client.data import open_data
from trunkline.config.site import read_site
from trunkline.errors import ConfigError, DataError
from trunkline.simulations.factories import write_sites
from trunkline.simulations.factories.steel_energy import FILE, LOADS, READINGS, read_year

YEAR = 365 * 96


def table() -> pl.DataFrame:
    """A year as the publisher prints it: midnight bears the date of the day that it ends. Usage counts the readings."""
    ends = [datetime(2018, 1, 1) + timedelta(minutes=15 * (place + 1)) for place in range(YEAR)]
    printed = [end - timedelta(days=1) if end.hour == end.minute == 0 else end for end in ends]
    number = np.arange(YEAR)
    columns = {name: number * (place + 1.0) for place, name in enumerate(READINGS)}
    return pl.DataFrame(
        {
            "date": [one.strftime("%d/%m/%Y %H:%M") for one in printed],
            **columns,
            "CO2(tCO2)": number * 0.0005,
            "NSM": [one.hour * 3600 + one.minute * 60 for one in printed],
            "Load_Type": [LOADS[place // 8 % 3] for place in range(YEAR)],
        }
    )


def write_raw(folder: Path, rows: pl.DataFrame | None = None) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / FILE).write_bytes(gzip.compress((table() if rows is None else rows).write_csv().encode(), 1))
    return folder


@pytest.fixture(scope="module")
def works(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_raw(tmp_path_factory.mktemp("uci") / "steel_energy")


def test_midnight_ends_the_day_it_is_written_under(works: Path) -> None:
    rows = read_year(works / FILE)
    assert (rows["time"].diff().drop_nulls() == timedelta(minutes=15)).all()
    assert rows["usage_kWh"].to_list() == list(range(YEAR))  # in the order in which it was used
    midnight = rows.filter(pl.col("time") == datetime(2018, 3, 2))
    assert midnight["usage_kWh"].item() == 60 * 96 - 1  # the last reading of the sixtieth day, not the first


def test_a_table_sorted_by_what_is_written_is_refused(tmp_path: Path) -> None:
    rows = table().with_columns(at=pl.col("date").str.to_datetime("%d/%m/%Y %H:%M")).sort("at").drop("at")
    with pytest.raises(DataError, match=r"row 3 is .* after the one above it; expected 15 minutes. Was it sorted"):
        read_year(write_raw(tmp_path, rows) / FILE)


def test_what_is_asked_lies_after_everything_that_is_seen(works: Path, tmp_path: Path) -> None:
    for site in write_sites("steel_energy", tmp_path / "out", data=works.parent):
        config = read_site(site).data
        assert not [name for name in config.channels if "co2" in name.lower()]
        data = open_data(site, tmp_path / "state" / site.name)
        for part in (data.train, data.validation, data.test):
            now = pl.read_parquet(site / "year.parquet").filter(
                pl.col("time").dt.epoch("s").is_in(part.order.astype(np.int64).tolist())
            )
            ahead = part.labels["usage"][:, :2]
            there = ~np.isnan(ahead)
            expected = now["usage_kWh"].to_numpy()[:, None] + np.array([1, 96])  # usage counts the readings
            assert np.array_equal(ahead[there], expected[there])
            load = part.labels["load"]
            later = np.array([LOADS.index(LOADS[int(one + 1) // 8 % 3]) for one in now["usage_kWh"]])
            assert np.array_equal(load[~np.isnan(load)], later[~np.isnan(load)])


def test_no_label_of_training_is_a_value_of_a_later_part(works: Path, tmp_path: Path) -> None:
    (site, *_) = write_sites("steel_energy", tmp_path / "out", data=works)
    data = open_data(site, tmp_path / "state")
    for part in (data.train, data.validation, data.test):
        ahead = part.labels["usage"][:, :2]
        assert np.isnan(ahead[-1]).all()
        assert np.isnan(ahead[-96:, 1]).all()
        assert not np.isnan(ahead[:-96]).any()
    assert data.train.order.max() < data.validation.order.min() < data.validation.order.max() < data.test.order.min()


@pytest.mark.parametrize(
    ("plants", "names"), [(4, ["q1", "q2", "q3", "q4"]), (2, ["month-01", "month-07"]), (12, None)]
)
def test_months_are_dealt_in_order_and_each_reading_once(
    works: Path, tmp_path: Path, plants: int, names: list[str] | None
) -> None:
    sites = write_sites("steel_energy", tmp_path / "out", data=works, plants=plants)
    assert [site.name for site in sites] == (names or [f"month-{month:02d}" for month in range(1, 13)])
    tables = [pl.read_parquet(site / "year.parquet") for site in sites]
    assert [usage for one in tables for usage in one["usage_kWh"]] == list(range(YEAR))
    for one in tables:
        assert (one["time"][0].day, one["time"][0].hour, one["time"][0].minute) == (1, 0, 15)
        assert one["next_load"].null_count() == 1  # the last: its load would be another plant's


@pytest.mark.parametrize("wish", [{"plants": 5}, {"plants": 0}, {"groups": 3}])
def test_what_cannot_be_dealt_is_refused(works: Path, tmp_path: Path, wish: dict[str, int]) -> None:
    with pytest.raises(ConfigError, match=f"--{next(iter(wish))} "):
        write_sites("steel_energy", tmp_path / "out", data=works, **wish)


def test_absent_and_damaged_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="id 851"):
        write_sites("steel_energy", tmp_path / "out", data=tmp_path)
    write_raw(tmp_path, table().drop("NSM"))
    with pytest.raises(DataError, match=r"(?s)not the year's table .*NSM"):
        write_sites("steel_energy", tmp_path / "out", data=tmp_path)
    (tmp_path / FILE).write_bytes(b"no gzip")
    with pytest.raises(DataError, match="not the year's table"):
        write_sites("steel_energy", tmp_path / "out", data=tmp_path)


@pytest.mark.realdata
def test_the_real_midnight_is_nearer_to_its_neighbours_in_time_than_to_those_by_date(
    real_data: Path, tmp_path: Path
) -> None:
    rows = read_year(real_data / "steel_energy" / FILE)
    assert rows.height == YEAR
    usage, midnight = (
        rows["usage_kWh"].to_numpy(),
        np.flatnonzero(rows["time"].dt.hour() + rows["time"].dt.minute() == 0)[:-1],
    )
    step = np.abs(usage[midnight] - usage[midnight - 1]).mean()
    as_written = np.abs(usage[midnight] - usage[midnight - 95]).mean()  # 00:15 of the date it bears
    assert step < 0.5 * as_written
    for site in write_sites("steel_energy", tmp_path / "out", data=real_data):
        report = check_site(site)
        assert report.ok
        assert not [note for note in report.notes if note.level == "warning"]
