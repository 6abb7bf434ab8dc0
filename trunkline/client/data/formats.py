"""One file of rows -> its column names, or some of its columns: CSV, Parquet, HDF5, npz.

Only the columns asked for are loaded; a 4 GB log of which three columns are inputs costs three columns.
"""

import zipfile
import zlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Literal

import h5py
import numpy as np
import polars as pl
from numpy.typing import NDArray

from trunkline.errors import DataError

Role = Literal["number", "order", "text", "label"]
"""How a column is read: a number; a number or timestamp; a name; whatever the task makes of it."""

SUFFIXES = {
    ".csv": "csv",
    ".parquet": "parquet",
    ".pq": "parquet",
    ".h5": "hdf5",
    ".hdf5": "hdf5",
    ".hdf": "hdf5",
    ".npz": "npz",
}
SEPARATORS = ",;\t"
UNREADABLE = (  # what the readers raise on damaged bytes; polars panics on some
    OSError, ValueError, TypeError, KeyError, EOFError, zipfile.BadZipFile, zlib.error, pl.exceptions.PolarsError, pl.exceptions.PanicException
)  # fmt: skip


def kind_of(path: Path) -> str:
    """'csv', 'parquet', 'hdf5' or 'npz', by suffix.

    Raises:
        DataError: the suffix is none of ours.
    """
    try:
        return SUFFIXES[path.suffix.lower()]
    except KeyError:
        suffixes = ", ".join(SUFFIXES)
        raise DataError(
            f"{path}: do not know how to read {path.suffix or 'a file without suffix'!r} files. Known: {suffixes}."
        ) from None


def columns_of(path: Path) -> list[str]:
    """The column names of `path`, without loading rows.

    Raises:
        DataError: the file cannot be read, or is not what its suffix says.
    """
    kind = kind_of(path)
    try:
        if kind == "csv":
            return _scan_csv(path, {}).collect_schema().names()
        if kind == "parquet":
            return list(pl.read_parquet_schema(path))
        if kind == "hdf5":
            with h5py.File(path, "r") as file:
                return list(dict.fromkeys(name for holder in _holders(file) for name in _datasets(holder)))
        with path.open("rb") as raw, np.load(raw, allow_pickle=False) as file:  # numpy leaves a bad file open itself
            return list(file.files)
    except pl.exceptions.NoDataError:
        raise DataError(
            f"{path}: is empty, not even a header line. Export it again, or take it out of the folder."
        ) from None
    except UNREADABLE as error:
        raise _unreadable(path, kind, error) from error


def load(path: Path, roles: dict[str, Role]) -> pl.DataFrame:
    """The columns of `path` named by `roles`, in that order, one row a sample.

    CSV cells that must be numbers are parsed as such; where one of them is not, all of that file's columns come as text,
    so that the caller can say which line it is.

    Raises:
        DataError: the file is damaged, or its columns differ in length.
    """
    kind = kind_of(path)
    names = list(roles)
    try:
        if kind == "csv":
            return _load_csv(path, roles)
        if kind == "parquet":
            return pl.scan_parquet(path, glob=False).select(names).collect()
        columns = _load_hdf5(path, names) if kind == "hdf5" else _load_npz(path, names)
    except UNREADABLE as error:
        raise _unreadable(path, kind, error) from error
    for name, column in columns.items():
        if column.ndim != 1:
            raise DataError(f"{path}: `{name}` has shape {column.shape}; a column is 1-D. Store one array a column.")
    lengths = {len(column) for column in columns.values()}
    if len(lengths) > 1:
        first, *further = columns
        odd = next(name for name in further if len(columns[name]) != len(columns[first]))
        raise DataError(
            f"{path}: `{first}` has {len(columns[first])} rows and `{odd}` has {len(columns[odd])}. Columns of one file must be equally long; export it again."
        )
    return pl.DataFrame({name: _series(name, column) for name, column in columns.items()})


def _unreadable(path: Path, kind: str, error: BaseException) -> DataError:
    first_line = str(error).strip().split("\n")[0]
    if "Object arrays" in first_line:
        return DataError(
            f"{path}: holds Python objects ({first_line}). Reading them could run code, so it is never done: "
            "store text as numpy strings (dtype 'U') and numbers as numbers."
        )
    hint = " Is it UTF-8?" if kind == "csv" and "utf" in str(error).lower() else ""
    return DataError(
        f"{path}: cannot be read as {kind} ({type(error).__name__}: {first_line}).{hint} "
        f"The file is damaged or not a {kind} file: export it again, or take it out."
    )


def _scan_csv(path: Path, types: dict[str, Any]) -> pl.LazyFrame:
    with path.open("rb") as file:
        header = file.readline(1_000_000).decode("utf-8", "replace")
    separator = max(SEPARATORS, key=header.count)
    # every column starts as text: guessing a type from the first rows is how "12" turns into "12.0" and 007 into 7
    return pl.scan_csv(path, separator=separator, infer_schema=False, schema_overrides=types, glob=False)


def _load_csv(path: Path, roles: dict[str, Role]) -> pl.DataFrame:
    numbers = {name: pl.Float64 for name, role in roles.items() if role == "number"}
    try:
        return _scan_csv(path, numbers).select(list(roles)).collect()
    except (
        pl.exceptions.ComputeError
    ):  # a number column holds something else (a space is enough): read the text, judge later
        return _scan_csv(path, {}).select(list(roles)).collect()


def _holders(file: Any) -> list[Any]:
    """The root and its groups: the places of an HDF5 file where columns may lie."""
    return [file, *(item for item in file.values() if isinstance(item, h5py.Group))]


def _datasets(holder: Any) -> dict[str, tuple[Any, int | None]]:
    """Column name -> (dataset, column index in it or None for a 1-D dataset)."""
    datasets: dict[str, tuple[Any, int | None]] = {}
    for name, item in holder.items():
        if not isinstance(item, h5py.Dataset):
            continue
        if item.ndim == 2 and "columns" in item.attrs:
            labels = [
                label_bytes.decode() if isinstance(label_bytes, bytes) else str(label_bytes)
                for label_bytes in item.attrs["columns"]
            ]
            datasets.update({label: (item, index) for index, label in enumerate(labels)})
        elif item.ndim == 1:
            datasets[name] = (item, None)
    return datasets


def _load_hdf5(path: Path, names: Sequence[str]) -> dict[str, NDArray[Any]]:
    with h5py.File(path, "r") as file:
        # all columns of one table lie in one place: take the place that has most of them
        tables = [_datasets(holder) for holder in _holders(file)]
        table = max(tables, key=lambda datasets: sum(name in datasets for name in names))
        if absent := [name for name in names if name not in table]:
            raise DataError(
                f"{path}: `{absent[0]}` lies in another group than `{names[0]}`. Put the columns of one table into one group."
            )
        return {name: _hdf5_column(*table[name]) for name in names}


def _hdf5_column(dataset: Any, index: int | None) -> NDArray[Any]:
    if h5py.check_string_dtype(dataset.dtype) is not None:
        dataset = dataset.asstr()
    return np.asarray(dataset[:] if index is None else dataset[:, index])


def _load_npz(path: Path, names: Iterable[str]) -> dict[str, NDArray[Any]]:
    with path.open("rb") as raw, np.load(raw, allow_pickle=False) as file:
        return {name: file[name] for name in names}


def _series(name: str, column: NDArray[Any]) -> pl.Series:
    if column.dtype.kind == "S":
        column = np.char.decode(column, "utf-8")
    if column.dtype.kind in "OU":
        return pl.Series(name, column.tolist(), dtype=pl.String)
    if column.dtype == np.float16:
        column = column.astype(np.float32)
    return pl.Series(name, column)
