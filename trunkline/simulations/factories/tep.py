"""The Tennessee Eastman process: a simulated chemical plant with 21 faults, of which each site has seen seven.

Downs, Vogel: A plant-wide industrial process control problem (Computers & Chemical Engineering 1993); runs by Chiang,
Russell, Braatz: Fault Detection and Diagnosis in Industrial Systems (Springer 2001). One row is 3 minutes. One run of
each fault is for training, with the fault on from its start; another is the test, with the fault let in after 8 hours.

Sites share no fault, so their heads share no class: what can travel is how the 52 readings move, not what it is called.
All three hold the same undisturbed run, for there is one. Faults 3, 9 and 15 leave no trace that published methods find,
one at each site; say whether a figure counts them.
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

FILE = "tep.parquet"
PLANTS = {"faults-01-07": range(1, 8), "faults-08-14": range(8, 15), "faults-15-21": range(15, 22)}
HIDDEN = (3, 9, 15)
ONSET = 160  # first row of a test run with the fault on
READINGS = (*(f"XMEAS{reading:02d}" for reading in range(1, 42)), *(f"XMV{reading:02d}" for reading in range(1, 12)))
NORMAL = "normal"
SOURCE = (
    "Get the Tennessee Eastman runs d00.dat .. d21_te.dat of Chiang, Russell and Braatz, put them into one tep.parquet "
    "and give its folder with --data."
)


def write(out: Path, wish: Wish) -> list[Path]:
    """Site folders faults-01-07, faults-08-14 and faults-15-21.

    Raises:
        ConfigError: another number of plants, or `groups`, was asked for.
        DataError: the file is absent or is not the process's runs.
    """
    as_it_comes(wish, "tep", len(PLANTS))
    rows = read_runs(find_folder(wish, "tep", FILE, SOURCE) / FILE)
    return write_plants(out, [_plant(name, rows, tuple(faults)) for name, faults in PLANTS.items()])


def read_runs(path: Path) -> pl.DataFrame:
    """`run` (such as d01 or d01_te), `fault` of the run, `sample`, `part`, 52 readings, `state` and `faulty` of each row.

    Raises:
        DataError: the file is damaged, has other columns, or a run starts its fault elsewhere than published.
    """
    names = ["file", "fault", "t", "split", "label", *READINGS]
    try:
        rows = pl.read_parquet(path, columns=names)
        rows = rows.with_columns(pl.col("fault", "t", "label").cast(pl.Int32), pl.col(*READINGS).cast(pl.Float32))
    except pl.exceptions.PolarsError as error:
        raise DataError(f"{path}: not the process's runs ({str(error).splitlines()[0]}). {SOURCE}") from None
    rows = rows.sort("file", "t")
    on = (pl.col("fault") > 0) & ((pl.col("split") == "train") | (pl.col("t") >= ONSET))
    if len(odd := rows.filter(pl.col("label") != pl.when(on).then("fault").otherwise(0))):
        raise DataError(f"{path}: run {odd['file'][0]}, t = {odd['t'][0]} has label {odd['label'][0]}. {SOURCE}")
    word = (
        pl.when(on).then(pl.format("fault-{}", pl.col("fault").cast(pl.String).str.zfill(2))).otherwise(pl.lit(NORMAL))
    )
    return rows.select(
        pl.col("file").alias("run"), "fault", pl.col("t").alias("sample"), pl.col("split").alias("part"), *READINGS,
        word.alias("state"), on.cast(pl.Int8).alias("faulty"),
    )  # fmt: skip


def _plant(name: str, rows: pl.DataFrame, faults: tuple[int, ...]) -> Plant:
    mine = rows.filter(pl.col("fault").is_in((0, *faults))).drop("fault")
    train, test = (mine.filter(pl.col("part") == part).drop("part") for part in ("train", "test"))

    def files() -> Files:
        about = _site_toml(name, faults)
        return {"train.parquet": parquet(train), "test.parquet": parquet(test), "site.toml": about}

    return Plant(name, files)


def _site_toml(name: str, faults: tuple[int, ...]) -> bytes:
    classes = (NORMAL, *(f"fault-{fault:02d}" for fault in faults))
    table = {
        "name": name,
        "data": {
            "files": "train.parquet",
            "test_files": "test.parquet",
            "group": "run",
            "order": "sample",
            "channels": READINGS,
            "window": 24,
            # there is one training run a fault: its end validates
            "split": {"by": "time", "validation": 0.25},
        },
        "tasks": {
            "fault": {"kind": "multiclass", "target": "state", "classes": classes, "metric": "accuracy"},
            "detect": {"kind": "binary", "target": "faulty", "weight": 0.5},
        },
    }
    hidden = next(fault for fault in faults if fault in HIDDEN)
    about = (
        f"Tennessee Eastman process, faults {faults[0]} to {faults[-1]} and normal running; one row is 3 minutes.\n"
        f"Tested on the published test runs, which are normal until row {ONSET}.\n"
        f"Fault {hidden} is one of 3, 9 and 15, which nobody detects: report with and without run d{hidden:02d}_te."
    )
    return toml(table, about)
