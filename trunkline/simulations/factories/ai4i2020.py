"""AI4I 2020: a made-up milling machine that makes parts of three qualities, which are the plants here.

Matzka: Explainable Artificial Intelligence for Predictive Maintenance Applications (AI4I 2020); UCI Machine Learning
Repository, id 601. One row is one part. Heat, power and overstrain failures follow fixed rules of the inputs, and the
limit of overstrain differs by quality; tool wear strikes at a random moment; random failures are random, so `RNF` is no
task. The temperatures are a random walk over the rows: rows side by side belong together and are split as blocks.
"""

import math
from pathlib import Path

import polars as pl

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

FILE = "ai4i2020.csv"
QUALITIES = ("L", "M", "H")
SENSORS = {
    "Air temperature [K]": "air_k",
    "Process temperature [K]": "process_k",
    "Rotational speed [rpm]": "speed_rpm",
    "Torque [Nm]": "torque_nm",
    "Tool wear [min]": "wear_min",
}
# what the failures depend on, as a process engineer would compute it from the five sensors of the same row
PHYSICS = {
    "excess_k": pl.col("process_k") - pl.col("air_k"),
    "power_w": pl.col("speed_rpm") * pl.col("torque_nm") * (2.0 * math.pi / 60.0),
    "strain_min_nm": pl.col("wear_min") * pl.col("torque_nm"),
}
CHANNELS = (*SENSORS.values(), *PHYSICS)
MODES = ("TWF", "HDF", "PWF", "OSF")
BLOCK = 100  # rows of the whole machine; the air temperature moves about 0.1 K a row
FOLDS = 5
SOURCE = "Get `AI4I 2020 Predictive Maintenance` (id 601) from the UCI Machine Learning Repository and give its folder with --data."


def write(out: Path, wish: Wish) -> list[Path]:
    """Site folders quality-l, quality-m and quality-h.

    Args:
        wish: `seed` chooses the fold of blocks that tests (seed % 5) and the shuffle behind the folds (seed // 5).

    Raises:
        ConfigError: `plants` or `groups` was asked for.
        DataError: the file is absent or another version.
    """
    as_it_comes(wish, "ai4i2020", len(QUALITIES))
    rows = read_parts(find_folder(wish, "ai4i2020", FILE, SOURCE) / FILE)
    return write_plants(
        out, [_plant(rows.filter(pl.col("quality") == quality), quality, wish.seed) for quality in QUALITIES]
    )


def read_parts(path: Path) -> pl.DataFrame:
    """`quality`, `block`, `row`, the columns of CHANNELS, `failure` and the modes, in the order of making."""
    table = read_csv(path, ("UDI", "Product ID", "Type", *SENSORS, "Machine failure", *MODES, "RNF"), SOURCE)
    row = pl.col("UDI") - 1
    block = pl.format("block-{}", (row // BLOCK).cast(pl.String).str.zfill(3))
    sensors = [pl.col(name).cast(pl.Float64).alias(short) for name, short in SENSORS.items()]
    inputs = table.select(pl.col("Type").alias("quality"), block.alias("block"), row.alias("row"), *sensors)
    labels = table.select(pl.col("Machine failure").alias("failure"), *MODES)
    return inputs.with_columns(**PHYSICS).hstack(labels)


def _plant(rows: pl.DataFrame, quality: str, seed: int) -> Plant:
    name = f"quality-{quality.lower()}"

    def files() -> Files:
        about = _site_toml(name, len(rows), quality, seed)
        return {"parts.parquet": parquet(rows.drop("quality")), "site.toml": about}

    return Plant(name, files)


def _site_toml(name: str, parts: int, quality: str, seed: int) -> bytes:
    table = {
        "name": name,
        "data": {
            "files": "parts.parquet",
            "group": "block",
            "order": "row",
            "channels": CHANNELS,
            "split": {"validation": 0.2, "folds": FOLDS, "fold": seed % FOLDS, "seed": seed // FOLDS},
        },
        "tasks": {
            "failure": {"kind": "binary", "target": "failure"},
            "modes": {"kind": "multilabel", "targets": MODES},
        },
    }
    about = (
        f"{parts} parts of quality {quality} from one milling machine (AI4I 2020, UCI 601, made-up data).\n"
        f"A group is a block of {BLOCK} rows of the machine: its temperatures are a random walk.\n"
        "excess_k: process over air temperature. power_w: speed x torque. strain_min_nm: wear x torque.\n"
        "Left out: UDI and product number; RNF, which is random by design. The modes are never inputs."
    )
    return toml(table, about)
