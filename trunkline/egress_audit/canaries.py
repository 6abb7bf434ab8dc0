"""Canaries: values and names that occur nowhere else, inserted into a copy of a site so that they are recognised anywhere."""

import json
import secrets
import tomllib
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import polars as pl
from numpy.typing import NDArray

from trunkline.client.data import SiteData, open_data
from trunkline.client.data.formats import kind_of, load
from trunkline.client.data.notes import Findings
from trunkline.client.data.read import NUMBERS, find_files, roles_of
from trunkline.client.state.vault import Entry, Vault
from trunkline.config.site import POLICY, PolicyConfig, SiteConfig, read_site
from trunkline.errors import DataError
from trunkline.runtime.storage import write_atomic

MARK = 0xC0FFEE00  # in the low 32 bits of a canary's float64, with its serial number
WIDE, LONG = 4, 4  # sensors and rows beside each other that carry a canary
TRIES = 40  # names for a group, until one of them is assigned to the training part
DISTINCTIVE = 10  # digits and signs of a decimal text that no other number has
SHIFT = 3.0  # of a canary weight: training moves it by a few hundredths, so it stays recognisable as trained from


@dataclass
class Canaries:
    """What was inserted into the data of a site's copy.

    Args:
        column: the new name of a sensor, and the name that it had.
        group: the new id of a group; empty where the site has no groups.
        values: of sensors in training rows.
        labels: of a numeric label in these rows.
    """

    column: tuple[str, str]
    group: str = ""
    values: list[float] = field(default_factory=list)
    labels: list[float] = field(default_factory=list)


def canary_value(like: float, serial: int) -> float:
    """A number as large as `like` whose lower 32 bits no measurement has."""
    bits = int(np.float64(like if like else 1.0).view(np.uint64))
    return float(np.uint64((bits & ~0xFFFFFFFF) | (MARK + serial)).view(np.float64))


def patterns(value: float) -> list[bytes]:
    """A canary value as it may be written: float64 in both byte orders, and as decimal text."""
    texts = {repr(value), repr(float(np.float32(value))), str(np.float32(value))}
    texts |= {f"{value:.{digits}g}" for digits in (7, 8, 9, 12)}
    distinctive = sorted(text for text in texts if len(text) >= DISTINCTIVE)
    return [np.float64(value).tobytes(), np.float64(value).tobytes()[::-1], *(text.encode() for text in distinctive)]


def insert_in_data(folder: Path, scratch: Path) -> Canaries:
    """Insert canaries into the data of a site's copy: a sensor's name, a group's, values of training rows, a numeric label.

    Args:
        scratch: a folder for what opening the site writes.

    Raises:
        DataError: no group could be named so that it is trained on.
    """
    config = read_site(folder)
    tables = _tables(folder, config)
    old = config.data.channels[0]
    canaries = Canaries((f"zq{secrets.token_hex(6)}_{old}", old))
    tables = {path: table.rename({old: canaries.column[0]}) for path, table in tables.items()}
    toml = tomllib.loads((folder / "site.toml").read_text(encoding="utf-8"))
    _write_toml(folder / "site.toml", _renamed(toml, *reversed(canaries.column)))
    group = config.data.group
    if group is not None:
        tables, canaries.group = _with_group(folder, scratch, tables, group)
    config = read_site(folder)
    path, rows = _training_rows(folder, scratch, tables, config)
    table = tables[path]
    serial = 0
    for channel in config.data.channels[:WIDE]:
        cells = table[channel].cast(pl.Float64, strict=False).to_numpy().copy()
        like = float(np.nanmedian(cells))
        for row in rows:
            cells[row] = canary_value(like, serial)
            canaries.values.append(float(cells[row]))
            serial += 1
        table = table.with_columns(pl.Series(channel, cells))
    for task in config.tasks.values():
        if task.kind in NUMBERS and not canaries.labels and task.target not in config.data.channels:
            cells = table[task.target].cast(pl.Float64, strict=False).to_numpy().copy()
            like = float(np.nanmedian(cells))
            for row in rows:
                cells[row] = canary_value(like, serial)
                canaries.labels.append(float(cells[row]))
                serial += 1
            table = table.with_columns(pl.Series(task.target, cells))
    _write_table(path, table)
    return canaries


def insert_in_vault(state: Path, run: str, round: int) -> dict[str, NDArray[Any]]:
    """Insert canaries into stem and heads as `round` left them; name -> array that the next round trains from.

    Every private tensor of four numbers or more gets four canaries side by side.
    """
    vault = Vault(state, run)
    entry = vault.before(round + 1)
    assert entry is not None  # of a round that has been answered
    private: dict[str, NDArray[Any]] = {}
    serial = 1
    for name, array in entry.private.items():
        private[name] = np.array(array)
        if array.dtype.kind != "f" or array.size < WIDE:
            continue
        flat = private[name].reshape(-1)
        for index in range(WIDE):
            flat[index] = _canary_weight(serial)
            serial += 1
    vault.put(round, replace(entry, private=private))
    return {name: array for name, array in private.items() if array.dtype.kind == "f" and array.size >= WIDE}


def _canary_weight(serial: int) -> np.float32:
    bits = int(np.float32(SHIFT).view(np.uint32))
    return np.uint32((bits & ~0xFFFFF) | (0xBEE00 + serial & 0xFFFFF)).view(np.float32)


def always_open(folder: Path) -> None:
    """Give a site's copy hours that never end, where it has any: it runs now, and still announces that it has hours."""
    toml = tomllib.loads((folder / "site.toml").read_text(encoding="utf-8"))
    if "hours" in toml:
        toml["hours"] = {"zone": toml["hours"]["zone"]}
        _write_toml(folder / "site.toml", toml)


def set_policy(folder: Path, policy: PolicyConfig) -> None:
    """Give a site's copy this policy, wherever it had its own."""
    toml = tomllib.loads((folder / "site.toml").read_text(encoding="utf-8"))
    toml.pop("policy", None)
    _write_toml(folder / "site.toml", toml)
    _write_toml(
        folder / POLICY,
        policy.model_dump(mode="json", exclude_unset=True, exclude_none=True) | {"decide": policy.decide},
    )


def entries_of(state: Path, run: str) -> dict[int, Entry]:
    """round -> its entry in the vault."""
    vault = Vault(state, run)
    return {round: entry for round in vault.shelf.rounds() if (entry := vault.before(round + 1)) is not None}


def open_copy(folder: Path, scratch: Path) -> SiteData:
    """The site in `folder` as a daemon with a fresh state would open it."""
    return open_data(folder, scratch / secrets.token_hex(4))


def _tables(folder: Path, config: SiteConfig) -> dict[Path, pl.DataFrame]:
    findings = Findings()
    paths = [
        *find_files(folder, config.data.files, "files", findings),
        *find_files(folder, config.data.test_files, "test_files", findings),
    ]
    findings.refuse()
    return {path: load(path, roles_of(config)[0]) for path in paths}


def _with_group(
    folder: Path, scratch: Path, tables: dict[Path, pl.DataFrame], group: str
) -> tuple[dict[Path, pl.DataFrame], str]:
    """Rename one group, such that the site trains on it, and write the tables; the tables and the new name."""
    texts = {path: table.with_columns(pl.col(group).cast(pl.String)) for path, table in tables.items()}
    for path, table in texts.items():
        _write_table(path, table)
    data = open_copy(folder, scratch)
    names = [data.train.group_names[index] for index in np.unique(data.train.groups)]
    for attempt in range(TRIES):
        name = f"zq{secrets.token_hex(6)}"
        chosen = names[attempt % len(names)]
        renamed = {
            path: table.with_columns(pl.col(group).str.strip_chars().replace(chosen, name))
            for path, table in texts.items()
        }
        for path, table in renamed.items():
            _write_table(path, table)
        data = open_copy(folder, scratch)
        if name in [data.train.group_names[index] for index in np.unique(data.train.groups)]:
            return renamed, name
    raise DataError(f"{folder}: none of {TRIES} names for a group was assigned to the training part. Try again.")


def _training_rows(
    folder: Path, scratch: Path, tables: dict[Path, pl.DataFrame], config: SiteConfig
) -> tuple[Path, list[int]]:
    """A file and adjacent rows of it that the site trains on: in the middle of a training group, or early in time."""
    data = config.data
    first = next(iter(tables))
    if data.group is None:
        start = min(8, max(0, len(tables[first]) // 4 - LONG))
        return first, list(range(start, min(start + LONG, len(tables[first]))))
    opened = open_copy(folder, scratch)
    sizes = np.bincount(opened.train.groups, minlength=len(opened.train.group_names))
    for index in np.argsort(-sizes, kind="stable"):
        name = opened.train.group_names[index]
        for path, table in tables.items():
            rows = np.flatnonzero((table[data.group] == name).to_numpy())
            if len(rows):
                middle = len(rows) // 2
                return path, [int(row) for row in rows[middle : middle + LONG]]
    raise DataError(f"{folder}: no training row could be found again in the files.")


def _renamed(value: Any, old: str, new: str) -> Any:
    """A parsed TOML with one column renamed, wherever it occurs as a key or a value."""
    if isinstance(value, dict):
        return {new if key == old else key: _renamed(item, old, new) for key, item in value.items()}
    if isinstance(value, list):
        return [_renamed(item, old, new) for item in value]
    return new if value == old else value


def _write_toml(path: Path, table: dict[str, Any]) -> None:
    write_atomic(path, _toml(table, ()).encode())


def _toml(table: dict[str, Any], under: tuple[str, ...]) -> str:
    plain = {key: value for key, value in table.items() if not isinstance(value, dict)}
    text = "".join(f"{json.dumps(key)} = {json.dumps(value, ensure_ascii=False)}\n" for key, value in plain.items())
    for key, value in table.items():
        if isinstance(value, dict):
            path = (*under, key)
            text += f"\n[{'.'.join(json.dumps(step) for step in path)}]\n" + _toml(value, path)
    return text


def _write_table(path: Path, table: pl.DataFrame) -> None:
    """A table in place of the file it was read from, in that file's format."""
    kind = kind_of(path)
    if kind == "csv":
        table.write_csv(path)
    elif kind == "parquet":
        table.write_parquet(path)
    elif kind == "npz":
        columns: dict[str, Any] = {name: _plain(table[name]) for name in table.columns}
        np.savez(path, **columns)
    else:
        with h5py.File(path, "w") as file:
            for name in table.columns:
                cells = _plain(table[name])
                text = cells.dtype.kind == "U"
                file.create_dataset(
                    name, data=cells.astype(object) if text else cells, dtype=h5py.string_dtype() if text else None
                )


def _plain(column: pl.Series) -> NDArray[Any]:
    """A column as (rows,) numbers or texts, without Python objects; a missing cell is NaN or an empty text."""
    if column.dtype in (pl.String, pl.Categorical, pl.Enum):
        return np.array(column.cast(pl.String).fill_null("").to_list(), dtype=np.str_)
    if column.null_count():
        return column.cast(pl.Float64).fill_null(np.nan).to_numpy()
    return column.to_numpy()
