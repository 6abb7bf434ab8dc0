"""A hydraulic rig in graded states of wear: cooler, valve, pump, accumulator, and whether the oil is still settling.

Helwig, Pignanelli, Schütze: Condition Monitoring of a Complex Hydraulic System Using Multivariate Statistics (I2MTC
2015). 2,205 load cycles of 60 s; one cycle is one sample. The rig ran through its states in order, so its cycles come in
194 runs of constant condition, and a run is the group: neighbours of one run are near copies. Only the sensors at most
10 Hz and one pressure are used; the other pressures and the motor power are not among the files this reads.
"""

from pathlib import Path

import numpy as np
import polars as pl
from numpy.typing import NDArray

from trunkline.errors import ConfigError, DataError
from trunkline.simulations.factories.folder import Files, Plant, Wish, find_folder, parquet, toml, write_plants

SECONDS = 60  # a cycle
FLOWS = ("FS1", "FS2")  # 10 Hz; their mean and spread within each second are two channels
SLOW = ("TS1", "TS2", "TS3", "TS4", "VS1", "CE", "CP", "SE", "PS2_60pt")  # one value a second
TASKS = {  # task -> column of profile.csv
    "cooler": "cooler_pct",
    "valve": "valve_pct",
    "pump": "pump_leak",
    "accumulator": "accumulator_bar",
    "stable": "stable_flag",
}
RUN_OF = ("cooler_pct", "valve_pct", "pump_leak", "accumulator_bar")  # what was set; a run is where none changes
FOLDS = 5
SOURCE = (
    "Get `Condition monitoring of hydraulic systems` (id 447) from the UCI Machine Learning Repository and give the folder "
    "with profile.csv and sensors.npz (one array a sensor, cycles x samples), or the one above it, with --data."
)


def write(out: Path, wish: Wish) -> list[Path]:
    """Site folders cooler-003, cooler-020, cooler-100 with four tasks, or with --plants 1 `rig` with the cooler as fifth.

    Args:
        wish: `groups` leaves labels to that many training runs; `seed` S tests fold S % 5 of partition S // 5, so that
            five seeds in a row are one whole cross-validation.

    Raises:
        ConfigError: another number of plants than 1 or 3.
        DataError: a file of the data set is absent or is not what its name says.
    """
    if wish.plants not in (None, 1, 3):
        raise ConfigError(
            f"--plants {wish.plants}: the rig ran in three states of its cooler; ask for 3, or for 1, all together."
        )
    rows = read_cycles(find_folder(wish, "hydraulic", "profile.csv", SOURCE))
    if wish.plants == 1:
        return write_plants(out, [_plant("rig", rows, tuple(TASKS), wish)])
    states = rows["cooler_pct"].unique().sort().to_list()
    by_state = [(f"cooler-{state:03d}", rows.filter(pl.col("cooler_pct") == state)) for state in states]
    return write_plants(out, [_plant(name, cycles, tuple(TASKS)[1:], wish) for name, cycles in by_state])


def read_cycles(folder: Path) -> pl.DataFrame:
    """One row a second: `run`, `cycle`, `second` (counted through all cycles), 26 inputs, and the conditions.

    Each of the 13 signals comes twice: as it is, for its level, and as `*_shape` less its mean over the cycle, for what
    happens within it, which the drift of the oil's temperature would hide.

    Raises:
        DataError: a sensor or column is absent or has another size.
    """
    try:
        profile = pl.read_csv(folder / "profile.csv", columns=list(TASKS.values()))
        with np.load(folder / "sensors.npz", allow_pickle=False) as sensors:
            signals = _signals({name: sensors[name] for name in (*FLOWS, *SLOW)}, profile.height)
    except (OSError, ValueError, KeyError, pl.exceptions.PolarsError) as error:
        text = str(error).splitlines()[0]
        raise DataError(f"{folder}: profile.csv and sensors.npz are not the rig's cycles ({text}). {SOURCE}") from None
    condition = profile.select(RUN_OF).to_numpy()
    run = np.concatenate([[0], np.cumsum((condition[1:] != condition[:-1]).any(axis=1))])
    columns: dict[str, NDArray[np.generic]] = {
        "run": np.repeat([f"run-{run_number:03d}" for run_number in run], SECONDS),
        "cycle": np.repeat(np.arange(profile.height, dtype=np.int32), SECONDS),
        "second": np.arange(profile.height * SECONDS, dtype=np.int32),
    }
    columns |= {name: signal.ravel() for name, signal in signals.items()}
    shape = {f"{name}_shape": (signal - signal.mean(axis=1, keepdims=True)).ravel() for name, signal in signals.items()}
    labels = {name: np.repeat(profile[name].to_numpy(), SECONDS) for name in profile.columns}
    return pl.DataFrame({**columns, **shape, **labels})


def _signals(sensors: dict[str, NDArray[np.float32]], cycles: int) -> dict[str, NDArray[np.float32]]:
    """The 13 signals, (cycles, 60) float32 each."""
    signals: dict[str, NDArray[np.float32]] = {}
    for name, values in sensors.items():
        samples = 10 * SECONDS if name in FLOWS else SECONDS
        if values.shape != (cycles, samples):
            raise ValueError(f"{name} has shape {values.shape}, expected {(cycles, samples)}")
        if name in FLOWS:
            seconds = values.reshape(cycles, SECONDS, 10).astype(np.float64)
            signals[f"{name}_mean"] = seconds.mean(axis=2).astype(np.float32)
            signals[f"{name}_spread"] = seconds.std(axis=2).astype(np.float32)
        else:
            signals[name] = values.astype(np.float32)
    return signals


def _plant(name: str, rows: pl.DataFrame, tasks: tuple[str, ...], wish: Wish) -> Plant:
    def files() -> Files:
        return {"cycles.parquet": parquet(rows), "site.toml": _site_toml(name, rows, tasks, wish)}

    return Plant(name, files)


def _site_toml(name: str, rows: pl.DataFrame, tasks: tuple[str, ...], wish: Wish) -> bytes:
    channels = [column for column in rows.columns if column not in ("run", "cycle", "second", *TASKS.values())]
    split: dict[str, object] = {
        "validation": 0.08 if len(tasks) == len(TASKS) else 0.12,  # runs are few, and conditions rare among them
        "folds": FOLDS,
        "fold": wish.seed % FOLDS,
        "seed": wish.seed // FOLDS,
    }
    if wish.groups is not None:
        split["labelled_groups"] = wish.groups
    table = {
        "name": name,
        "data": {
            "files": "cycles.parquet",
            "group": "run",
            "order": "second",
            "channels": channels,
            "window": SECONDS,
            "stride": SECONDS,
            "clean": {"outliers": "keep"},  # a cycle's load steps lie far from its median, as they should
            "split": split,
        },
        "tasks": {task: {"kind": "multiclass", "target": TASKS[task], "metric": "accuracy"} for task in tasks},
    }
    about = (
        f"{rows.height // SECONDS:,} load cycles of ZeMA's hydraulic rig (UCI 447), one a sample, "
        f"in {rows['run'].n_unique()} runs of constant condition.\n"
        "A run is the group: cycles of one run are near copies, and a split by cycle tells the valve with .99 accuracy "
        "where runs set aside give .66.\n"
        f"Tested on fold {wish.seed % FOLDS} of {FOLDS}; --seed 0 to {FOLDS - 1} are one cross-validation."
    )
    return toml(table, about)
