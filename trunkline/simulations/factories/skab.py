"""SKAB: a water circulation rig whose valves, pump and water are disturbed while eight sensors watch.

Katser, Kozitsin: Skoltech Anomaly Benchmark (2020), kaggle.com/dsv/1693952. One row a second; each experiment is one
file that begins undisturbed. As its authors do, the first 400 rows of every experiment are for learning and the rest is
the test. The data are under GPL-3.0: they are read where they lie, and no part of them is part of this project.
"""

from pathlib import Path

import polars as pl

from trunkline.errors import DataError
from trunkline.simulations.factories.folder import (
    Files,
    Plant,
    Wish,
    as_it_comes,
    find_folder,
    parquet,
    toml,
    write_plants,
)

FILE = "skab.parquet"
PLANTS = ("valve1", "valve2", "other")  # the run without any anomaly is not part of the published protocol
LEARNING = 400  # rows at the head of each experiment
SENSORS = {  # column of the file -> input
    "Accelerometer1RMS": "accelerometer1_g",
    "Accelerometer2RMS": "accelerometer2_g",
    "Current": "current_A",
    "Pressure": "pressure_bar",
    "Temperature": "temperature_C",
    "Thermocouple": "thermocouple_C",
    "Voltage": "voltage_V",
    "Volume Flow RateRMS": "flow_l_min",
}
SOURCE = "Get `SKAB` (waico/SKAB), put its experiments into one skab.parquet and give its folder with --data."


def write(out: Path, wish: Wish) -> list[Path]:
    """Site folders valve1, valve2 and other.

    Raises:
        ConfigError: another number of plants, or `groups`, was asked for.
        DataError: the file is absent or is not SKAB.
    """
    as_it_comes(wish, "skab", len(PLANTS))
    rows = read_experiments(find_folder(wish, "skab", FILE, SOURCE) / FILE)
    return write_plants(out, [_plant(name, rows.filter(pl.col("plant") == name)) for name in PLANTS])


def read_experiments(path: Path) -> pl.DataFrame:
    """`plant`, `experiment` (such as valve1-03), `row` within it, `time`, eight sensors and `anomaly`, 0 or 1.

    Raises:
        DataError: the file is damaged or has other columns.
    """
    try:
        rows = pl.read_parquet(path, columns=["group", "exp", "datetime", *SENSORS, "anomaly"])
        rows = rows.filter(pl.col("group").is_in(PLANTS)).with_columns(
            time=pl.col("datetime").str.to_datetime(time_unit="us"), anomaly=pl.col("anomaly").cast(pl.Int8)
        )
    except pl.exceptions.PolarsError as error:
        raise DataError(f"{path}: not SKAB's experiments ({str(error).splitlines()[0]}). {SOURCE}") from None
    rows = rows.with_columns(experiment=pl.format("{}-{}", "group", pl.col("exp").str.zfill(2)))
    rows = rows.sort("experiment", "time").with_columns(row=pl.int_range(pl.len()).over("experiment"))
    readings = [pl.col(old).cast(pl.Float64).alias(new) for old, new in SENSORS.items()]
    return rows.select(pl.col("group").alias("plant"), "experiment", "row", "time", *readings, "anomaly")


def _plant(name: str, rows: pl.DataFrame) -> Plant:
    learning = pl.col("row") < LEARNING
    # a group is on one side only, so the two ends of an experiment go by two names
    head = rows.filter(learning).with_columns(experiment=pl.col("experiment") + "-head").drop("plant")
    tail = rows.filter(~learning).with_columns(experiment=pl.col("experiment") + "-tail").drop("plant")

    def files() -> Files:
        about = _site_toml(name, head["experiment"].n_unique())
        return {"head.parquet": parquet(head), "tail.parquet": parquet(tail), "site.toml": about}

    return Plant(name, files)


def _site_toml(name: str, experiments: int) -> bytes:
    table = {
        "name": name,
        "data": {
            "files": "head.parquet",
            "test_files": "tail.parquet",
            "group": "experiment",
            "order": "time",
            "channels": list(SENSORS.values()),
            "window": 32,
            "split": {"by": "time", "validation": 0.25},
        },
        "tasks": {"anomaly": {"kind": "anomaly", "target": "anomaly"}},
    }
    about = (
        f"{experiments} experiments of SKAB's water circulation rig, one row a second.\n"
        f"The first {LEARNING} rows of each are for learning (the last quarter of them validates), the rest is the test."
    )
    return toml(table, about)
