"""Site folders on disk: written whole or not at all, and never over something that this project did not write.

A folder carries `SHA256SUMS` beside its files. Where the sums still hold, the folder is exactly what an earlier
`trunkline sites` left there and may be replaced; anything else belongs to a person and is refused.
"""

import hashlib
import io
import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import polars as pl

from trunkline.errors import ConfigError, DataError
from trunkline.runtime.storage import write_atomic

SUMS = "SHA256SUMS"
STATE = ".trunkline"  # what the plant's daemon keeps inside its site folder by default
Files = dict[str, bytes]  # path inside the site folder -> content


@dataclass(frozen=True)
class Wish:
    """What `trunkline sites NAME` was asked for; None is the factory's own default."""

    data: Path | None = None
    plants: int | None = None
    groups: int | None = None
    seed: int = 0


@dataclass(frozen=True)
class Plant:
    """One site folder to be: its name, and its files once somebody asks for them."""

    name: str
    files: Callable[[], Files]


@dataclass(frozen=True)
class Factory:
    """One data set that `trunkline sites` can deal to plants.

    Args:
        write: (out, wish) -> the site folders below `out`, in order.
        needs_data: whether the wish must name a folder with the data set.
        about: one line for `trunkline sites --help`.
    """

    write: Callable[[Path, Wish], list[Path]]
    needs_data: bool
    about: str


def find_folder(wish: Wish, name: str, file: str, source: str) -> Path:
    """The folder of data set `name`: `--data` itself or the folder `name` below it, whichever holds `file`.

    Raises:
        DataError: no folder was given, or neither holds it; `source` says where to get the set.
    """
    if wish.data is None:
        raise DataError(f"{name}: no folder given. {source}")
    for folder in (wish.data, wish.data / name):
        if (folder / file).is_file():
            return folder
    raise DataError(f"{wish.data}: {file} is neither there nor in {wish.data / name}. {source}")


def read_csv(path: Path, columns: Sequence[str], source: str) -> pl.DataFrame:
    """The published table at `path`, once it has exactly `columns`.

    Raises:
        DataError: it is damaged, or an altered copy of the set.
    """
    try:
        table = pl.read_csv(path)
    except (pl.exceptions.PolarsError, OSError) as error:
        raise DataError(f"{path}: not a CSV table ({str(error).splitlines()[0]}). {source}") from None
    if odd := [name for name in (*columns, *table.columns) if name not in columns or name not in table.columns]:
        raise DataError(f"{path}: column `{odd[0]}` is missing, or is one too many. This is another version. {source}")
    return table


def as_it_comes(wish: Wish, name: str, plants: int) -> None:
    """Raise ConfigError where a data set whose plants are given by nature is asked to be dealt otherwise."""
    if wish.plants not in (None, plants):
        raise ConfigError(f"--plants {wish.plants}: {name} comes from {plants} plants. Leave --plants away.")
    if wish.groups is not None:
        raise ConfigError(
            f"--groups {wish.groups}: the plants of {name} own what they measured. Set `labelled_groups` under "
            "[data.split] of a site.toml to see how it learns from fewer labels."
        )


def parquet(rows: pl.DataFrame) -> bytes:
    """`rows` as a Parquet file."""
    buffer = io.BytesIO()
    rows.write_parquet(buffer, compression="zstd")
    return buffer.getvalue()


def write_plants(out: Path, plants: Sequence[Plant]) -> list[Path]:
    """Write every plant below `out`, after making sure that nothing foreign is there.

    Each folder is made aside and renamed into place, so a kill leaves whole sites only; running again completes them.

    Raises:
        ConfigError: `out` holds other entries than these plants, or a plant's folder holds something not written here.
        StorageError: the disk is full or read-only.
    """
    _refuse_foreign(out, {plant.name for plant in plants})
    return [_write_plant(out / plant.name, plant.files()) for plant in plants]


def _refuse_foreign(out: Path, names: set[str]) -> None:
    if not out.exists():
        return
    if not out.is_dir():
        raise ConfigError(f"{out}: is a file; site folders are written into a folder. Give another --out.")
    visible = sorted(entry.name for entry in out.iterdir() if not entry.name.startswith("."))
    # a run takes every folder it finds: sites of an earlier, larger deal would silently join this one
    if foreign := [name for name in visible if name not in names]:
        raise ConfigError(
            f"{out}: holds {foreign[0]!r} (and {len(foreign) - 1} more), which this command does not write. "
            "Give an empty --out, or move it away."
        )
    for name in visible:
        if edited := _not_ours(out / name):
            raise ConfigError(
                f"{out / name}: holds {edited}, which `trunkline sites` did not leave there. It is kept; "
                "give another --out, or move it away."
            )


def _not_ours(folder: Path) -> str | None:
    """The first entry of `folder` that an earlier run did not write like this, or None."""
    if not folder.is_dir():
        return "a file of that name"
    paths = {str(path.relative_to(folder)): path for path in sorted(folder.rglob("*")) if not path.is_dir()}
    paths = {name: path for name, path in paths.items() if not name.startswith(f"{STATE}/")}
    if not paths:
        return None
    sums = paths.pop(SUMS, None)
    if sums is None:
        return f"{next(iter(paths))!r} without {SUMS}"
    digests = {name: digest for digest, _, name in (line.partition("  ") for line in sums.read_text().splitlines())}
    for name, path in paths.items():
        if name not in digests:
            return repr(name)
        if hashlib.sha256(path.read_bytes()).hexdigest() != digests[name]:
            return f"an edited {name!r}"
    return None


def _write_plant(folder: Path, files: Files) -> Path:
    lines = (f"{hashlib.sha256(content).hexdigest()}  {name}\n" for name, content in sorted(files.items()))
    sums = "".join(lines).encode()
    whole = all((folder / name).is_file() for name in (*files, SUMS))
    if whole and (folder / SUMS).read_bytes() == sums:
        return folder  # the same bytes are there already, and with them perhaps the site's state
    if (folder / STATE).exists():
        raise ConfigError(
            f"{folder}: has trained already ({STATE} is there), and its data would change under it. "
            "Give another --out, or remove the folder."
        )
    aside, before = (folder.with_name(f".{folder.name}.{suffix}") for suffix in ("new", "old"))
    for left in (aside, before):  # of a run that was killed
        shutil.rmtree(left, ignore_errors=True)
    for name, content in {**files, SUMS: sums}.items():
        write_atomic(aside / name, content, mode=0o644)
    if folder.exists():
        folder.rename(before)
    aside.rename(folder)
    shutil.rmtree(before, ignore_errors=True)
    return folder


def toml(table: Mapping[str, Any], about: str) -> bytes:
    """`table` as a TOML document under the comment `about`: scalars, lists of scalars, and tables of these."""
    lines = [*(f"# {line}".rstrip() for line in about.splitlines())]
    _toml_table(lines, (), table)
    return ("\n".join(lines) + "\n").encode()


def _toml_table(lines: list[str], path: tuple[str, ...], table: Mapping[str, Any]) -> None:
    plain = {key: value for key, value in table.items() if not isinstance(value, Mapping)}
    if path and (plain or not table):
        lines += ["", f"[{'.'.join(path)}]"]
    lines += [f"{key} = {_toml_value(value)}" for key, value in plain.items()]
    for key, value in table.items():
        if isinstance(value, Mapping):
            _toml_table(lines, (*path, key), value)


def _toml_value(value: object) -> str:
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(_toml_value(item) for item in value)}]"
    if isinstance(value, (str, bool, int, float)):
        return json.dumps(value, ensure_ascii=False)  # JSON scalars are TOML scalars
    raise TypeError(f"no TOML for {type(value).__name__}")
