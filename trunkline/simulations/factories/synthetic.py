"""Built-in plants that need no data: one law of wear, seen through other sensors at every plant.

Each unit (a press tool, a kiln lining, a pump, a mill spindle) is run to failure. Load and wear are hidden; wear grows
by a Paris-like law, faster under load and faster the further it is (Paris and Erdogan 1963). Three hidden signals leave
the machine: the load, a temperature that follows the load the more slowly and the higher the more worn the unit is, and
a vibration that rises with wear times load; both start from a level that differs from unit to unit. A plant never sees
these: its sensors are noisy, bent mixtures of the three in units of their own. So levels tell little and the pattern
over time tells much, and that pattern, unlike the sensors, is the same everywhere: a shared trunk can carry it over.
"""

import io
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import h5py
import numpy as np
import polars as pl
from numpy.typing import NDArray

from trunkline.errors import ConfigError
from trunkline.protocol.arrays import seed_of
from trunkline.simulations.factories.folder import Files, Plant, Wish, toml, write_plants

Matrix = NDArray[np.float64]

STEPS = 240  # rows a unit is run for; every unit fails long before (lives are 20 to 140 rows, 58 in the mean)
WINDOW = 32
HORIZON = 12  # rows: `failing` is 1 when the unit fails within this many
CAP = 48  # rows of remaining life above which wear leaves no trace yet
STAGES = ("fresh", "worn", "critical")  # wear below 0.35, below 0.7, above

CROSSTALK = 0.35  # standard deviation of what a sensor sees of the other signals, its own being 1
NOISE = 0.25  # standard deviation of a sensor's own noise, on the same scale
BEND = 0.2  # largest share of a sensor's response that is not linear

SIGNALS = ("load", "heat", "vibration")

# per signal the sensors that mostly see it: name, size of one standard deviation, level
SENSORS = {
    "load": (
        ("force_kN", 38.0, 410.0),
        ("oil_bar", 6.5, 82.0),
        ("motor_A", 7.0, 46.0),
        ("torque_Nm", 95.0, 870.0),
        ("power_kW", 8.5, 61.0),
    ),
    "heat": (
        ("surface_C", 11.0, 164.0),
        ("bearing_K", 6.0, 341.0),
        ("oil_F", 14.0, 176.0),
        ("coolant_C", 4.5, 38.0),
        ("gap_um", 21.0, 130.0),
    ),
    "vibration": (
        ("vibration_mm_s", 0.9, 3.4),
        ("acoustic_dB", 3.2, 79.0),
        ("shock_g", 0.35, 1.6),
        ("particles_ppm", 14.0, 55.0),
        ("strain_um_m", 44.0, 315.0),
    ),
}


@dataclass(frozen=True)
class Kind:
    """One line of machines: what a plant of this kind records, labels and calls things.

    Args:
        channels: sensors of the first plant of this kind.
        learn, test: groups to learn from (validation included), and to be tested on.
        hours: sampling interval.
        regimes: operating regimes; more than one writes the regime's set point as a column of its own.
        missing: share of sensor values that were not recorded.
    """

    name: str
    channels: int
    learn: int
    test: int
    hours: float
    tasks: tuple[str, ...]
    file: Literal["csv", "parquet", "hdf5", "npz"]
    regimes: int = 1
    missing: float = 0.0


# the mill is the small one: as many channels as any, a third of the others' labelled units
KINDS = (
    Kind("press", 4, 180, 80, 2.0, ("rul",), "csv"),
    Kind("kiln", 6, 180, 80, 8.0, ("rul", "failing", "stage"), "parquet", regimes=3, missing=0.02),
    Kind("pump", 9, 180, 80, 6.0, ("efficiency", "leak"), "hdf5"),
    Kind("mill", 12, 60, 120, 1.0, ("rul", "failing"), "npz", regimes=3, missing=0.03),
)


def write(out: Path, wish: Wish) -> list[Path]:
    """Site folders press-01, kiln-02, pump-03, mill-04, and round again with other sensors for more plants.

    Args:
        wish: `plants` any number (default 4); `groups` leaves each plant that many units to learn from, validation
            included, and its test units in a file of their own.

    Raises:
        ConfigError: `plants` or `groups` cannot be dealt.
    """
    plants = len(KINDS) if wish.plants is None else wish.plants
    if plants < 1:
        raise ConfigError(f"--plants {plants}: ask for at least one plant.")
    if wish.groups is not None and wish.groups < 2:
        raise ConfigError(f"--groups {wish.groups}: a plant needs 2 units, one to train and one to validate.")
    return write_plants(out, [_plant(index, wish) for index in range(plants)])


def _plant(index: int, wish: Wish) -> Plant:
    kind = KINDS[index % len(KINDS)]
    name = f"{kind.name}-{index + 1:02d}"

    def files() -> Files:
        rng = np.random.default_rng(seed_of(wish.seed, "synthetic", name))
        learn = kind.learn if wish.groups is None else wish.groups
        # later plants of a kind were fitted out by somebody else: another sensor or two
        channels = kind.channels + index // len(KINDS) % 3
        rows = _rows(kind, name, learn + kind.test, channels, rng)
        # few units, or a number of them that was asked for, are all there to learn from: others are tested
        apart = kind.name == "mill" or wish.groups is not None
        names = rows["unit"].unique(maintain_order=True)
        tables = {"history": rows}
        if apart:
            first = pl.col("unit").is_in(names[:learn].implode())
            tables = {"history": rows.filter(first), "acceptance": rows.filter(~first)}
        written = {
            f"{stem}{suffix}": data for stem, table in tables.items() for suffix, data in _encode(kind.file, table)
        }
        return {**written, "site.toml": _site_toml(kind, name, rows.columns, learn, apart)}

    return Plant(name, files)


def wear_out(units: int, regimes: int, rng: np.random.Generator) -> dict[str, Matrix]:
    """Run `units` to failure.

    Returns:
        (units, STEPS) each: `load`, `heat`, `vibration` (about zero mean), `wear` (0 new, 1 failed), `regime` (0, 1,
        ...), and `alive`, 1.0 up to and including the row before failure.
    """
    shape = (units, STEPS)
    # set points hold for some ten rows, the load wanders about them
    switch = rng.random(shape) < 0.09
    switch[:, 0] = True
    draw = rng.integers(0, regimes, shape)
    last = np.maximum.accumulate(np.where(switch, np.arange(STEPS), 0), axis=1)
    regime = np.take_along_axis(draw, last, axis=1)
    level = np.take_along_axis(rng.uniform(0.6, 1.4, shape), last, axis=1)
    noise = rng.normal(0.0, 0.12, shape)
    rate = 0.0062 * np.exp(0.12 * np.clip(rng.standard_normal(units), -2.5, 2.5))  # bounded: nothing lasts for ever
    jumps = rng.lognormal(0.0, 0.3, shape)
    wear = rng.uniform(0.0, 0.25, units)
    drift = np.zeros(units)
    heat = level[:, 0].copy()
    load_all, wear_all, heat_all = (np.empty(shape) for _ in range(3))
    for step in range(STEPS):
        drift = 0.7 * drift + noise[:, step]
        load = np.clip(level[:, step] + drift, 0.2, 2.0)
        wear = np.minimum(wear + rate * load**2 * np.exp(1.6 * wear) * jumps[:, step], 2.0)
        # a worn machine warms up further, and takes longer to
        heat = heat + (0.75 - 0.68 * np.minimum(wear, 1.0)) * (load * (1.0 + 0.35 * wear) - heat)
        load_all[:, step], wear_all[:, step], heat_all[:, step] = load, wear, heat
    # position and make of each unit, larger than what wear adds: a plant with few units learns these by heart instead of
    # the pattern over time, and that is what a trunk trained on many plants' units saves it from
    position, make = rng.normal(0.0, 0.5, (units, 1)), rng.normal(0.0, 1.0, (units, 1))
    heat_all = heat_all + position
    vibration = make + 1.1 * wear_all * load_all
    alive = (wear_all < 1.0).astype(np.float64)
    signals = {"load": (load_all - 1.0) / 0.28, "heat": (heat_all - 1.15) / 0.3, "vibration": (vibration - 0.5) / 0.6}
    return {**signals, "wear": wear_all, "regime": regime.astype(np.float64), "alive": alive}


def sense(signals: Matrix, regime: Matrix, channels: int, noise: float, rng: np.random.Generator) -> Matrix:
    """What one plant's sensors make of the hidden signals.

    Args:
        signals: (rows, 3), in the order of SIGNALS.
        regime: (rows,) index of the operating regime; each regime shifts and stretches every sensor.

    Returns:
        (rows, channels), before the plant's physical units; channel k mostly sees signal k modulo 3.
    """
    main_signal = np.arange(channels) % signals.shape[1]
    mix = rng.normal(0.0, CROSSTALK, (signals.shape[1], channels))
    mix[main_signal, np.arange(channels)] += 1.0
    bend = rng.uniform(-BEND, BEND, channels)
    clean = signals @ mix
    clean = clean + bend * np.tanh(clean) + 0.1 * bend * clean**2
    seen = clean + rng.normal(0.0, noise, clean.shape)
    count = int(regime.max()) + 1
    shift, stretch = rng.normal(0.0, 2.0, (count, channels)), rng.lognormal(0.0, 0.25, (count, channels))
    index = regime.astype(np.int64)
    return np.asarray(seen * stretch[index] + shift[index] * (count > 1), dtype=np.float64)


def _rows(kind: Kind, name: str, units: int, channels: int, rng: np.random.Generator) -> pl.DataFrame:
    """One plant's table: unit, hour, perhaps setpoint, the sensors, a column a task."""
    world = wear_out(units, kind.regimes, rng)
    keep = world["alive"] > 0
    unit, step = np.nonzero(keep)
    flat = {key: value[keep] for key, value in world.items()}  # (rows,)
    left = keep.sum(axis=1)[unit] - step  # rows until failure, 1 at the last row
    sensors = sense(np.stack([flat[signal] for signal in SIGNALS], axis=1), flat["regime"], channels, NOISE, rng)
    drawer = {signal: rng.permutation(len(names)) for signal, names in SENSORS.items()}
    text = np.asarray([f"{name}-{serial:04d}" for serial in range(1, units + 1)])
    columns: dict[str, NDArray[Any]] = {
        "unit": text[unit] if kind.file in ("csv", "parquet") else unit + 1,  # files of arrays hold numbers
        "hour": step * kind.hours,
    }
    if kind.regimes > 1:
        columns["setpoint"] = 600.0 + 300.0 * flat["regime"]
    for channel in range(channels):
        signal = SIGNALS[channel % len(SIGNALS)]
        label, scale, level = SENSORS[signal][drawer[signal][channel // len(SIGNALS)]]
        values = level + scale * rng.lognormal(0.0, 0.4) * sensors[:, channel]
        values[rng.random(len(values)) < kind.missing] = np.nan
        columns[label] = np.round(values, 4)
    leaks = flat["wear"] > 0.72 + 0.08 * rng.standard_normal(units)[unit]
    efficiency = 86.0 - 17.0 * flat["wear"] ** 1.3 - 0.8 * flat["load"] + rng.normal(0.0, 0.4, len(unit))
    labels = {
        "rul": left * kind.hours,
        "failing": (left <= HORIZON).astype(np.int8),
        "stage": np.asarray(STAGES)[np.digitize(flat["wear"], (0.35, 0.7))],
        "efficiency": np.round(efficiency, 3),
        "leak": np.where(step % 3 == 2, leaks, np.nan),  # an inspection looks at every third row only
    }
    return pl.DataFrame({**columns, **{task: labels[task] for task in kind.tasks}}, nan_to_null=True)


def _encode(file: str, rows: pl.DataFrame) -> list[tuple[str, bytes]]:
    """(suffix, content) of the files that hold `rows`; csv comes as three, the way loggers cut their output."""
    buffer = io.BytesIO()
    if file == "csv":
        units = rows["unit"].unique(maintain_order=True)
        thirds = [part.tolist() for part in np.array_split(units.to_numpy(), 3)]
        parts = [rows.filter(pl.col("unit").is_in(third)) for third in thirds if third]
        return [(f"/line-{index}.csv", part.write_csv().encode()) for index, part in enumerate(parts, start=1)]
    if file == "parquet":
        rows.write_parquet(buffer)
        return [(".parquet", buffer.getvalue())]
    arrays = {column.name: column.to_numpy() for column in rows.iter_columns()}  # null -> NaN
    if file == "npz":
        np.savez_compressed(buffer, allow_pickle=False, **arrays)
        return [(".npz", buffer.getvalue())]
    with h5py.File(buffer, "w") as book:
        for column, values in arrays.items():
            # a stored time would give other bytes each run
            book.create_dataset(column, data=values, compression="gzip", track_times=False)
    return [(".h5", buffer.getvalue())]


def _site_toml(kind: Kind, name: str, columns: list[str], learn: int, apart: bool) -> bytes:
    """The plant's own description of the table that `_rows` makes."""
    glob = {"csv": "/*.csv", "parquet": ".parquet", "hdf5": ".h5", "npz": ".npz"}[kind.file]
    inputs = [column for column in columns if column not in ("unit", "hour", "setpoint", *kind.tasks)]
    data: dict[str, Any] = {"files": f"history{glob}"}
    if apart:
        data["test_files"] = f"acceptance{glob}"
    data |= {"group": "unit", "order": "hour", "channels": inputs, "window": WINDOW}
    if kind.regimes > 1:
        data["regime"] = ["setpoint"]
    share = {} if apart else {"test": round(kind.test / (kind.learn + kind.test), 3)}
    data["split"] = {"validation": 0.2, **share}
    hours = kind.hours
    tables: dict[str, dict[str, Any]] = {
        "rul": {"kind": "regression", "target": "rul", "unit": "hours", "cap": CAP * hours},
        "failing": {"kind": "binary", "target": "failing", "weight": 0.3},
        "stage": {"kind": "multiclass", "target": "stage", "classes": STAGES, "ordinal": True, "weight": 0.3},
        "efficiency": {"kind": "regression", "target": "efficiency", "unit": "%"},
        "leak": {"kind": "binary", "target": "leak", "weight": 0.3},
    }
    about = {
        "rul": "rul: hours to failure.",
        "failing": f"failing: fails within {HORIZON * hours:g} hours.",
        "stage": "stage: wear in three steps.",
        "efficiency": "efficiency: of the pump, in percent.",
        "leak": "leak: whether an inspection found one; most rows have none.",
    }
    head = (
        f"A made-up plant: {learn} units of a {kind.name} line to learn from, run to failure; a row every {hours:g} h."
    )
    text = "\n".join([head, *(about[task] for task in kind.tasks)])
    return toml({"name": name, "data": data, "tasks": {task: tables[task] for task in kind.tasks}}, text)
