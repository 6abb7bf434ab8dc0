"""Ultrasonic flowmeters: four real meters with their own instruments, and in part their own faults.

Gyamfi and Marshall, Coventry University and NEL; UCI Machine Learning Repository 2018, id 433. One row is one diagnosis
of one meter. A and B share no column with anybody; C and D have the same ones. It is small: a fleet in which federation
has little to give, and must not take.
"""

from pathlib import Path

import numpy as np
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

METERS = {"A": (36, 2), "B": (51, 3), "C": (43, 4), "D": (43, 4)}  # diagnostic numbers, conditions
CONDITIONS = ("healthy", "fault-2", "fault-3", "fault-4")  # the files number the conditions; only 1 has a name there
FOLDS = 5
SOURCE = "Get `Ultrasonic flowmeter diagnostics` (id 433) from the UCI Machine Learning Repository and give its folder with --data."


def write(out: Path, wish: Wish) -> list[Path]:
    """Site folders meter-a .. meter-d.

    Args:
        wish: `seed` chooses the fold that tests (seed % 5) and the shuffle behind the folds (seed // 5), so that seeds
            0 to 4 test every row once.

    Raises:
        ConfigError: `plants` or `groups` was asked for.
        DataError: a file is absent or has another number of columns.
    """
    as_it_comes(wish, "flowmeters", len(METERS))
    folder = find_folder(wish, "flowmeters", "MeterA.txt", SOURCE)
    return write_plants(out, [_plant(folder, meter, wish.seed) for meter in METERS])


def _plant(folder: Path, meter: str, seed: int) -> Plant:
    rows = _read(folder / f"Meter{meter}.txt", *METERS[meter])
    name = f"meter-{meter.lower()}"

    def files() -> Files:
        return {"rows.parquet": parquet(rows), "site.toml": _site_toml(name, rows, meter, seed)}

    return Plant(name, files)


def _read(path: Path, numbers: int, conditions: int) -> pl.DataFrame:
    """`sample`, d01, d02, ... and `condition` of one meter."""
    try:
        table = np.loadtxt(path, ndmin=2)  # (rows, numbers + 1)
    except FileNotFoundError:
        raise DataError(f"{path}: no such file. {SOURCE}") from None
    except ValueError as error:
        raise DataError(f"{path}: not a table of numbers ({error}). {SOURCE}") from None
    if table.shape[1] != numbers + 1:
        raise DataError(f"{path}: {table.shape[1]} columns, expected {numbers} and the condition. {SOURCE}")
    code = table[:, -1].astype(np.int64)
    if wrong := sorted(set(code.tolist()) - set(range(1, conditions + 1))):
        raise DataError(f"{path}: condition {wrong[0]} in the last column; expected 1 to {conditions}. {SOURCE}")
    columns = {f"d{index + 1:02d}": table[:, index] for index in range(numbers)}
    sample = [f"{row:03d}" for row in range(len(table))]
    return pl.DataFrame({"sample": sample, **columns, "condition": [CONDITIONS[condition - 1] for condition in code]})


def _site_toml(name: str, rows: pl.DataFrame, meter: str, seed: int) -> bytes:
    numbers, conditions = METERS[meter]
    table = {
        "name": name,
        "data": {
            "files": "rows.parquet",
            "group": "sample",
            "channels": [f"d{index + 1:02d}" for index in range(numbers)],
            "split": {"validation": 0.2, "folds": FOLDS, "fold": seed % FOLDS, "seed": seed // FOLDS},
        },
        "tasks": {
            "condition": {
                "kind": "multiclass",
                "target": "condition",
                "classes": CONDITIONS[:conditions],
                "metric": "accuracy",
            }
        },
    }
    about = (
        f"{len(rows)} diagnoses of ultrasonic flowmeter {meter} (UCI 433): {numbers} numbers, {conditions} conditions.\n"
        "The file numbers the conditions; 1 is the healthy one. Every row stands for itself, so the folds deal rows."
    )
    return toml(table, about)
