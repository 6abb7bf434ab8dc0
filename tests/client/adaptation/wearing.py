"""Machines that wear: sensors that follow the remaining life, an offset of their own each, so that few machines mislead."""

import json
from pathlib import Path

import numpy as np
import polars as pl

from tests.client.data.sites import toml

CHANNELS = ("c0", "c1", "c2")
POLICY = ("trunk", "stem", "heads", "scaler")
RUN = {
    "rounds": 8,
    "seed": 3,
    "lend": ["trunk", "stem", "heads", "scaler"],
    "trunk": {"width": 16},
    "training": {"steps": 12, "batch_size": 64, "learning_rate": 0.01},
    "strategy": {"name": "fedavg"},
}


def machines(number: int, seed: int, *, rows: int = 40, name: str = "m", strange: float = 0.0) -> pl.DataFrame:
    """`strange`: how far the machines of this site differ from those of other seeds."""
    random = np.random.default_rng(seed)
    frames = []
    for place in range(number):
        left = np.arange(rows)[::-1].astype(float)
        wear = np.exp(-left / 12.0)
        offset = random.normal(0.0, 0.6, 3)
        sensors = [
            (1.0 + 0.3 * strange) * wear + offset[0] * 0.3,
            20.0 - 4.0 * wear + offset[1] + strange,
            5.0 + 2.0 * np.sqrt(wear) + offset[2] * 0.5,
        ]
        frames.append(
            pl.DataFrame(
                {
                    "unit": [f"{name}{place:02d}"] * rows,
                    "cycle": np.arange(rows),
                    **{
                        channel: one + random.normal(0.0, 0.15, rows)
                        for channel, one in zip(CHANNELS, sensors, strict=True)
                    },
                    "rul": left,
                    "failing": (left < 10).astype(np.int64),
                }
            )
        )
    return pl.concat(frames)


def write_plant(
    folder: Path, train: pl.DataFrame, test: pl.DataFrame, *, name: str, policy: tuple[str, ...] = POLICY,
    channels: tuple[str, ...] = CHANNELS, unit: str = "cycles",
) -> Path:  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    train.write_csv(folder / "train.csv")
    test.write_csv(folder / "test.csv")
    data = {
        "files": "train.csv", "test_files": "test.csv", "group": "unit", "order": "cycle", "window": 8,
        "channels": list(channels),
    }  # fmt: skip
    lines = [f"name = {json.dumps(name)}", "[data]", *(f"{key} = {toml(value)}" for key, value in data.items())]
    lines += ["[policy]", f"lend = {json.dumps(list(policy))}"]
    lines += ["[tasks.rul]", 'kind = "regression"', 'target = "rul"', f"unit = {json.dumps(unit)}", "cap = 30.0"]
    lines += ["[tasks.failing]", 'kind = "binary"', 'target = "failing"', "weight = 0.1"]
    (folder / "site.toml").write_text("\n".join(lines) + "\n")
    return folder


def plant(folder: Path, number: int, seed: int, *, strange: float = 0.0, **how: object) -> Path:
    train = machines(number, seed, name=f"s{seed}-", strange=strange)
    test = machines(6, seed + 1000, name=f"t{seed}-", strange=strange)
    return write_plant(folder, train, test, name=f"plant-{seed}", **how)  # type: ignore[arg-type]
