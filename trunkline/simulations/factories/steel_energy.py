"""A steel works' energy, every quarter of an hour of one year: what it will draw, and under which tariff load.

Sathishkumar V E, Changsun Shin, Yongyun Cho: Efficient energy consumption prediction model for a data analytic-enabled
industry building in a smart city (Building Research & Information 2021); UCI Machine Learning Repository, id 851. One
plant, whose quarters of the year are dealt out as if they were four.

Everything is said about a moment that has not come yet. Reactive power, power factor and CO2 of the same quarter hour
give the consumption away (CO2 is the consumption times a constant), so what a sample sees ends before what it is asked.
"""

import gzip
from datetime import timedelta
from pathlib import Path

import numpy as np
import polars as pl

from trunkline.errors import ConfigError, DataError
from trunkline.simulations.factories.folder import Files, Plant, Wish, find_folder, parquet, toml, write_plants

FILE = "steel_industry_data.csv.gz"
MONTHS = 12
DAY = 96  # rows
HORIZONS = (1, DAY)  # the next quarter hour, and the same one tomorrow
READINGS = {  # column of the file -> input; CO2 is left out: it is Usage_kWh again, rounded
    "Usage_kWh": "usage_kWh",
    "Lagging_Current_Reactive_Power_kVarh": "lagging_kVarh",
    "Leading_Current_Reactive_Power_kVarh": "leading_kVarh",
    "Lagging_Current_Power_Factor": "lagging_factor",
    "Leading_Current_Power_Factor": "leading_factor",
}
CALENDAR = ("day_sin", "day_cos", "week_sin", "week_cos")
LOADS = ("Light_Load", "Medium_Load", "Maximum_Load")
SOURCE = (
    "Get `Steel Industry Energy Consumption` (id 851) from the UCI Machine Learning Repository, pack its table as "
    f"{FILE} and give its folder, or the one above it, with --data."
)


def write(out: Path, wish: Wish) -> list[Path]:
    """Site folders q1 .. q4 of three months each; --plants 12 gives a month each, and so on for every divisor of 12.

    Raises:
        ConfigError: the months cannot be dealt so, or `groups` was asked for.
        DataError: the file is absent or is not the year's table.
    """
    plants = 4 if wish.plants is None else wish.plants
    if plants < 1 or MONTHS % plants:
        raise ConfigError(f"--plants {plants}: twelve months are dealt; ask for 1, 2, 3, 4, 6 or 12.")
    if wish.groups is not None:
        raise ConfigError(f"--groups {wish.groups}: a plant here is one stretch of time, without groups. Leave it out.")
    rows = read_year(find_folder(wish, "steel_energy", FILE, SOURCE) / FILE)
    length = MONTHS // plants
    # midnight that ends a month belongs to that month: a quarter hour back says which one a reading is of
    month = (rows["time"] - timedelta(minutes=15)).dt.month().to_numpy()
    return write_plants(
        out, [_plant(rows.filter((month - 1) // length == index), index, length) for index in range(plants)]
    )


def read_year(path: Path) -> pl.DataFrame:
    """`time` (the end of each quarter hour, ascending), inputs, and `next_load`: the tariff load of the NEXT row.

    The file writes midnight, which ends a day, as 00:00 of that same day. Sorted by what is written, one reading a day
    would lie 24 hours too early; it is dated to the day it begins.

    Raises:
        DataError: not the year's table, or its readings are not 15 minutes apart.
    """
    names = ["date", *READINGS, "NSM", "Load_Type"]
    try:
        with gzip.open(path) as file:
            table = pl.read_csv(file.read(), columns=names)
        time = table["date"].str.to_datetime("%d/%m/%Y %H:%M", time_unit="us")
    except (OSError, EOFError, pl.exceptions.PolarsError) as error:
        raise DataError(f"{path}: not the year's table ({str(error).splitlines()[0]}). {SOURCE}") from None
    time = time.zip_with(table["NSM"] != 0, time + timedelta(days=1))
    apart = time.diff().drop_nulls()
    if odd := (apart != timedelta(minutes=15)).arg_true().to_list():
        raise DataError(
            f"{path}: row {odd[0] + 3} is {apart[odd[0]]} after the one above it; expected 15 minutes. Was it sorted? {SOURCE}"
        )
    minutes = time.dt.epoch("s").to_numpy() / 60.0
    turn = {"day": 2 * np.pi * minutes / (24 * 60), "week": 2 * np.pi * minutes / (7 * 24 * 60)}
    clock = [turn["day"], turn["day"], turn["week"], turn["week"]]
    calendar = [f(angle) for f, angle in zip((np.sin, np.cos, np.sin, np.cos), clock, strict=True)]
    return pl.DataFrame(
        {
            "time": time,
            **{new: table[old] for old, new in READINGS.items()},
            **dict(zip(CALENDAR, calendar, strict=True)),
            "next_load": table["Load_Type"].shift(-1),
        }
    )


def _plant(rows: pl.DataFrame, index: int, length: int) -> Plant:
    name = f"q{index + 1}" if length == 3 else f"month-{index * length + 1:02d}"
    # its last row would name the load of a moment that is another plant's
    rows = rows.with_columns(next_load=pl.when(pl.int_range(pl.len()) < pl.len() - 1).then("next_load"))

    def files() -> Files:
        return {"year.parquet": parquet(rows), "site.toml": _site_toml(name, rows)}

    return Plant(name, files)


def _site_toml(name: str, rows: pl.DataFrame) -> bytes:
    table = {
        "name": name,
        "data": {
            "files": "year.parquet",
            "order": "time",
            "channels": [*READINGS.values(), *CALENDAR],
            "window": DAY,
            "split": {"by": "time", "validation": 0.2, "test": 0.2},
        },
        "tasks": {
            "usage": {
                "kind": "forecast",
                "target": "usage_kWh",
                "unit": "kWh",
                "horizons": HORIZONS,
                "season": DAY,
            },
            "load": {
                "kind": "multiclass",
                "target": "next_load",
                "classes": LOADS,
                "metric": "accuracy",
                "weight": 0.3,
            },
        },
    }
    about = (
        f"{rows.height:,} quarter hours of a steel works' energy (UCI 851), {rows['time'][0]} to {rows['time'][-1]}.\n"
        "usage: the next quarter hour and the same one tomorrow. load: the tariff load of the next quarter hour.\n"
        "Inputs end before either: same-time reactive power and power factors would give the consumption away."
    )
    return toml(table, about)
