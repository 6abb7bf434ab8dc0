"""Bearing vibration of the Case Western Reserve University: which part is damaged and how badly, at four motor loads.

Bearing Data Center, K. Loparo: 12 kHz, drive-end accelerometer, damage of 7, 14, 21 and 28 thousandths of an inch on the
inner race, the ball or the outer race. One record of 10 s a damage and load; each load is a plant.

A sample is a stretch of 2,048 readings, written as 15 short spectra of 32 bands each: a spectrogram that a small network
reads on one core. Each stretch is standardised before, because sessions differ in amplifier gain, which would name the
damage. Undamaged bearings are left out: they exist at 48 kHz, and the sampling rate would give them away.
"""

from pathlib import Path

import numpy as np
import polars as pl
from numpy.typing import NDArray

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

FILE, RECORDS = "cwru_12k_drive_end.npz", "cwru_12k_drive_end_records.csv"
LOADS = (0, 1, 2, 3)  # hp
STRETCH = 2048  # readings a sample: 0.17 s, five turns of the shaft
FRAME, HOP = 256, 128  # readings a spectrum, and from one to the next
FRAMES = (STRETCH - FRAME) // HOP + 1
BANDS = 32
LEARNING = 0.7  # share of each record, its first; the rest is the test
VALIDATION = 0.25  # share of that, its last
SIZES = ("7", "14", "21", "28")
SOURCE = (
    "Get the 12k drive-end records from the Case Western Reserve University Bearing Data Center, pack them as "
    f"{FILE} (`<record>|DE`, 16-bit readings) with {RECORDS}, and give their folder with --data."
)


def write(out: Path, wish: Wish) -> list[Path]:
    """Site folders load-0 .. load-3.

    Raises:
        ConfigError: another number of plants, or `groups`, was asked for.
        DataError: a file is absent or is not the records it should hold.
    """
    as_it_comes(wish, "cwru", len(LOADS))
    folder = find_folder(wish, "cwru", RECORDS, SOURCE)
    names = ["record", "cls", "size_mil", "load_hp", "fs_hz"]
    try:
        records = pl.read_csv(folder / RECORDS, columns=names).sort("record")
        with np.load(folder / FILE, allow_pickle=False) as file:
            readings = {name: file[f"{name}|DE"] for name in records["record"]}
    except (OSError, ValueError, KeyError, pl.exceptions.PolarsError) as error:
        text = str(error).splitlines()[0]
        raise DataError(f"{folder}: {FILE} and {RECORDS} do not hold the records ({text}). {SOURCE}") from None
    if odd := records.filter(pl.col("fs_hz") != 12_000)["record"].to_list():
        raise DataError(
            f"{folder / RECORDS}: {odd[0]} is not sampled at 12 kHz; the rate would name its class. {SOURCE}"
        )
    return write_plants(out, [_plant(records.filter(pl.col("load_hp") == load), load, readings) for load in LOADS])


def stretches(readings: int) -> dict[str, NDArray[np.int64]]:
    """Part -> (n,) first reading of each of its stretches; parts follow each other, with a stretch left out between them.

    Training and validation are in the ratio 3 to 1 to the row: site.toml cuts them there again.
    """
    whole = readings // STRETCH - 2
    ratio = round(1 / VALIDATION)
    validate = round(LEARNING * whole / ratio)
    sizes = {"train": validate * (ratio - 1), "validation": validate, "test": whole - validate * ratio}
    starts = dict(zip(sizes, np.cumsum([0, *(size + 1 for size in sizes.values())]), strict=False))
    return {part: (starts[part] + np.arange(size)) * STRETCH for part, size in sizes.items()}


def spectra(stretch: NDArray[np.int16]) -> NDArray[np.float32]:
    """One stretch (2048,) -> (15, 32) log10 power of its standardised readings, in bands of 188 Hz from 47 Hz up.

    Raises:
        DataError: the sensor stood still, so there is nothing to standardise by.
    """
    values = stretch.astype(np.float64)
    if not (spread := values.std()):
        raise DataError(f"cwru: a stretch of {STRETCH} equal readings; the record is damaged. {SOURCE}")
    frames = np.lib.stride_tricks.sliding_window_view((values - values.mean()) / spread, FRAME)[::HOP]
    power = np.square(np.abs(np.fft.rfft(frames * np.hanning(FRAME), axis=1)))[:, 1:]  # (15, 128), without the mean
    bands: NDArray[np.float64] = power.reshape(FRAMES, BANDS, -1).mean(axis=2)
    return np.log10(bands + 1e-6).astype(np.float32)


def _plant(records: pl.DataFrame, load: int, readings: dict[str, NDArray[np.int16]]) -> Plant:
    name = f"load-{load}"

    def files() -> Files:
        tables: dict[str, list[pl.DataFrame]] = {"head": [], "tail": []}
        for record, damage, size in records.select("record", "cls", "size_mil").iter_rows():
            of = stretches(len(readings[record]))
            for end, starts in (("head", [*of["train"], *of["validation"]]), ("tail", [*of["test"]])):
                rows = np.concatenate([spectra(readings[record][start : start + STRETCH]) for start in starts])
                table = pl.DataFrame(rows, schema=_bands())
                labels = {"damage": pl.lit(damage), "size": pl.lit(str(size))}
                # a group is on one side only, so the two ends of a record go by two names
                names = {"record": pl.lit(f"{record}-{end}"), "frame": pl.int_range(pl.len(), dtype=pl.Int32)}
                tables[end].append(table.select(**names, **labels, **{band: pl.col(band) for band in _bands()}))
        tables_by_file = {f"{end}.parquet": parquet(pl.concat(parts)) for end, parts in tables.items()}
        return {**tables_by_file, "site.toml": _site_toml(name, load, records.height)}

    return Plant(name, files)


def _bands() -> list[str]:
    return [f"band{band:02d}" for band in range(BANDS)]


def _site_toml(name: str, load: int, records: int) -> bytes:
    table = {
        "name": name,
        "data": {
            "files": "head.parquet",
            "test_files": "tail.parquet",
            "group": "record",
            "order": "frame",
            "channels": _bands(),
            "window": FRAMES,
            "stride": FRAMES,
            "split": {"by": "time", "validation": VALIDATION},
        },
        "tasks": {
            "damage": {"kind": "multiclass", "target": "damage", "metric": "accuracy"},
            "size": {"kind": "multiclass", "target": "size", "classes": SIZES, "metric": "accuracy"},
        },
    }
    about = (
        f"{records} bearing records of CWRU at {load} hp, 12 kHz, drive end; one sample is {STRETCH} readings as "
        f"{FRAMES} spectra of {BANDS} bands.\n"
        f"Each record is split in time: the first {LEARNING:.0%} for learning, its last quarter validates, the rest tests; "
        "a sample is left out between them.\n"
        "damage: of the inner race (IR), the ball (B) or the outer race (OR). size: of it, in thousandths of an inch.\n"
        "There is one bearing a damage, the same at all loads: figures say how well these bearings are told apart."
    )
    return toml(table, about)
