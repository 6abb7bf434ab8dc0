"""Steel plates: seven kinds of surface fault on two grades of steel.

Semeion, Rome; UCI Machine Learning Repository 2010, id 198. One row is one faulty plate. Where on the coil the fault lay
and how long the conveyor was are left out: they tell which coil a plate came from, and faults come in coils.
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
    read_csv,
    toml,
    write_plants,
)

FILE = "steel_plates_faults.csv"
GRADES = ("A300", "A400")
PLACES = ("X_Minimum", "X_Maximum", "Y_Minimum", "Y_Maximum", "Length_of_Conveyer")  # name a coil, not a fault
CHANNELS = (
    "Pixels_Areas", "X_Perimeter", "Y_Perimeter", "Sum_of_Luminosity", "Minimum_of_Luminosity", "Maximum_of_Luminosity",
    "Steel_Plate_Thickness", "Edges_Index", "Empty_Index", "Square_Index", "Outside_X_Index", "Edges_X_Index",
    "Edges_Y_Index", "Outside_Global_Index", "LogOfAreas", "Log_X_Index", "Log_Y_Index", "Orientation_Index",
    "Luminosity_Index", "SigmoidOfAreas",
)  # fmt: skip
FAULTS = {
    "Pastry_Fault": "pastry", "Z_Scratch_Fault": "z-scratch", "K_Scatch_Fault": "k-scratch", "Stains_Fault": "stains",
    "Dirtiness_Fault": "dirtiness", "Bumps_Fault": "bumps", "Other_Faults": "other",
}  # fmt: skip
FOLDS = 5
SOURCE = "Get `Steel Plates Faults` (id 198) from the UCI Machine Learning Repository as steel_plates_faults.csv and give its folder with --data."


def write(out: Path, wish: Wish) -> list[Path]:
    """Site folders steel-a300 and steel-a400.

    Args:
        wish: `seed` chooses the fold that tests (seed % 5) and the shuffle behind the folds (seed // 5).

    Raises:
        ConfigError: `plants` or `groups` was asked for.
        DataError: the file is absent, another version, or a row has not exactly one fault and one grade.
    """
    as_it_comes(wish, "steel_plates", len(GRADES))
    path = find_folder(wish, "steel_plates_faults", FILE, SOURCE) / FILE
    rows = read_plates(path)
    return write_plants(out, [_plant(rows.filter(pl.col("grade") == grade), grade, wish.seed) for grade in GRADES])


def read_plates(path: Path) -> pl.DataFrame:
    """`plate`, `grade`, the columns of CHANNELS and `fault`, in the order of the file."""
    grades = [f"TypeOfSteel_{grade}" for grade in GRADES]
    table = read_csv(path, (*PLACES, *CHANNELS, *grades, *FAULTS), SOURCE)
    for label, columns in (("grade", grades), ("fault", list(FAULTS))):
        wrong = table.select(pl.sum_horizontal(columns)).to_series().ne(1).arg_true()
        if len(wrong):
            raise DataError(f"{path}, line {int(wrong[0]) + 2}: not exactly one {label} is 1. {SOURCE}")
    fault = pl.coalesce(pl.when(pl.col(column) == 1).then(pl.lit(name)) for column, name in FAULTS.items())
    grade = pl.coalesce(
        pl.when(pl.col(f"TypeOfSteel_{grade_name}") == 1).then(pl.lit(grade_name)) for grade_name in GRADES
    )
    plate = pl.int_range(pl.len()).cast(pl.String).str.zfill(4)
    return (
        table.select(plate=plate, grade=grade).hstack(table.select(*CHANNELS)).with_columns(table.select(fault=fault))
    )


def _plant(rows: pl.DataFrame, grade: str, seed: int) -> Plant:
    name = f"steel-{grade.lower()}"

    def files() -> Files:
        return {"plates.parquet": parquet(rows.drop("grade")), "site.toml": _site_toml(name, len(rows), grade, seed)}

    return Plant(name, files)


def _site_toml(name: str, plates: int, grade: str, seed: int) -> bytes:
    faults = {"kind": "multiclass", "target": "fault", "classes": tuple(FAULTS.values()), "metric": "accuracy"}
    table = {
        "name": name,
        "data": {
            "files": "plates.parquet",
            "group": "plate",
            "channels": CHANNELS,
            "split": {"validation": 0.15, "folds": FOLDS, "fold": seed % FOLDS, "seed": seed // FOLDS},
        },
        "tasks": {"fault": faults},
    }
    about = (
        f"{plates} faulty plates of steel {grade} (UCI 198). Every plate stands for itself, so the folds deal plates.\n"
        "Left out: position on the coil and conveyor length, which tell the coil. `other` is what fits no name."
    )
    return toml(table, about)
