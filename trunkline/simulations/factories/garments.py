"""Garment workers: what twelve sewing and finishing teams of one factory achieved a day, against what was targeted.

Imran et al.; UCI Machine Learning Repository 2020, id 597. One row is one team, department and day; a plant is a team. The
target is known in the morning and is an input: predicting it as it stands is the baseline to beat, and hard to beat.
"""

import math
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

FILE = "garments_worker_productivity.csv"
TEAMS = 12
CHANNELS = (
    "targeted_productivity", "smv", "wip", "over_time", "incentive", "idle_time", "idle_men", "no_of_style_change",
    "no_of_workers",
)  # fmt: skip
CATEGORICAL = ("department", "day", "quarter")  # quarter of a month; there is a fifth, for days 29 to 31
TEST = 0.2  # last share of the dates
SOURCE = "Get `Productivity Prediction of Garment Employees` (id 597) from the UCI Machine Learning Repository and give its folder with --data."


def write(out: Path, wish: Wish) -> list[Path]:
    """Site folders team-01 .. team-12; the last 20 % of the dates test, the same dates at every team.

    Args:
        wish: `seed` draws the dates before them that validate.

    Raises:
        ConfigError: `plants` or `groups` was asked for.
        DataError: the file is absent or another version.
    """
    as_it_comes(wish, "garments", TEAMS)
    rows = read_days(find_folder(wish, "garments", FILE, SOURCE) / FILE)
    return write_plants(
        out, [_plant(rows.filter(pl.col("team") == team), team, wish.seed) for team in range(1, TEAMS + 1)]
    )


def read_days(path: Path) -> pl.DataFrame:
    """The published columns with `date` as 2015-01-31, `below_target` (0/1), and `test`: one of the last dates."""
    columns = ("date", "team", *CATEGORICAL, *CHANNELS, "actual_productivity")
    table = read_csv(path, columns, SOURCE)
    try:
        date = table["date"].str.to_date("%m/%d/%Y")
    except pl.exceptions.PolarsError:
        raise DataError(f"{path}: `date` should be month/day/year in every row. {SOURCE}") from None
    dates = date.unique().sort()
    first = dates[math.ceil((1.0 - TEST) * len(dates))]
    below = (table["actual_productivity"] < table["targeted_productivity"]).cast(pl.Int8)
    return table.with_columns(date=date.dt.strftime("%Y-%m-%d"), below_target=below, test=date >= first)


def _plant(rows: pl.DataFrame, team: int, seed: int) -> Plant:
    name = f"team-{team:02d}"

    def files() -> Files:
        parts = {
            part: rows.filter(pl.col("test") == (part == "test")).drop("test", "team") for part in ("train", "test")
        }
        return {
            **{f"{part}.parquet": parquet(table) for part, table in parts.items()},
            "site.toml": _site_toml(name, team, seed),
        }

    return Plant(name, files)


def _site_toml(name: str, team: int, seed: int) -> bytes:
    table = {
        "name": name,
        "data": {
            "files": "train.parquet",
            "test_files": "test.parquet",
            "group": "date",
            "channels": CHANNELS,
            "categorical": CATEGORICAL,
            # `wip` is what waits before sewing: finishing rows have none, and the stem learns what its absence means.
            # What a small team never did (nobody idle, one style) is a constant: kept, so that all teams have one stem
            "clean": {"missing": "keep", "constant": "keep"},
            "split": {"validation": 0.25, "seed": seed},
        },
        "tasks": {
            "productivity": {"kind": "regression", "target": "actual_productivity", "unit": "share", "loss": "huber"},
            "below_target": {"kind": "binary", "target": "below_target", "weight": 0.3},
        },
    }
    about = (
        f"Team {team} of a garment factory (UCI 597): one row a day and department, {len(CHANNELS)} numbers, 3 categories.\n"
        "Tested on the last 20 % of the dates; a date is never on two sides.\n"
        "productivity: share of the day's work that was done. below_target: less than targeted_productivity, which is\n"
        "known in the morning and therefore an input. Always compare with predicting targeted_productivity itself."
    )
    return toml(table, about)
