"""Small site folders for tests: a frame of made-up sensors and the site.toml that describes it."""

import json
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import polars as pl

RUL = {"kind": "regression", "target": "rul"}


def fleet(lengths: list[int] | int, channels: int = 2, seed: int = 0, rows: int = 10) -> pl.DataFrame:
    """Units u000, u001, ... that run to failure: unit, cycle, c0.., rul, failing (the last third of each unit)."""
    sizes = [rows] * lengths if isinstance(lengths, int) else lengths
    random = np.random.default_rng(seed)
    cycle = np.concatenate([np.arange(1, size + 1) for size in sizes])
    rul = np.concatenate([np.arange(size)[::-1] for size in sizes])
    columns: dict[str, Any] = {
        "unit": np.repeat([f"u{place:03d}" for place in range(len(sizes))], sizes),
        "cycle": cycle,
        "rul": rul.astype(np.float64),
        "failing": (rul * 3 < np.repeat(sizes, sizes)).astype(np.int64),
    }
    for place in range(channels):
        columns[f"c{place}"] = random.normal(10.0 * place, 1.0 + place, len(cycle)) + 0.05 * cycle
    return pl.DataFrame(columns)


def toml(value: Any) -> str:
    """A TOML value; nested tables inline."""
    if isinstance(value, dict):
        return "{ " + ", ".join(f"{json.dumps(key)} = {toml(one)}" for key, one in value.items()) + " }"
    return json.dumps(value)


def write_toml(folder: Path, data: dict[str, Any], tasks: dict[str, Any] | None = None) -> Path:
    """site.toml in `folder`: the settings that fit `fleet`, overridden by `data` (None takes a key out)."""
    folder.mkdir(parents=True, exist_ok=True)
    table = {"files": "data.csv", "group": "unit", "order": "cycle", "channels": ["c0", "c1"], "window": 4, **data}
    lines = ['name = "press-07"', "[data]"]
    lines += [f"{key} = {toml(value)}" for key, value in table.items() if value is not None]
    for name, task in (tasks or {"rul": RUL}).items():
        lines += [f"[tasks.{name}]", *(f"{key} = {toml(value)}" for key, value in task.items())]
    (folder / "site.toml").write_text("\n".join(lines) + "\n")
    return folder


def write_site(folder: Path, frame: pl.DataFrame, tasks: dict[str, Any] | None = None, **data: Any) -> Path:
    """A site folder whose one data.csv is `frame`."""
    write_toml(folder, data, tasks)
    frame.write_csv(folder / "data.csv")
    return folder


def write_hdf5(path: Path, frame: pl.DataFrame, group: str | None = None) -> None:
    with h5py.File(path, "w") as file:
        place = file.create_group(group) if group else file
        for name in frame.columns:
            place[name] = frame[name].to_list() if frame[name].dtype == pl.String else frame[name].to_numpy()


def write_npz(path: Path, frame: pl.DataFrame) -> None:
    columns = {name: frame[name] for name in frame.columns}
    np.savez(
        path,
        **{
            name: np.array(one.to_list()) if one.dtype == pl.String else one.to_numpy() for name, one in columns.items()
        },
    )
