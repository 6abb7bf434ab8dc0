"""A site's files -> one table with the columns its site.toml names, every cell of the kind it is used as.

Files are read in sorted order and laid end to end. Nothing is cleaned here: this stage says what cannot be read, with
file, line, column and value.
"""

from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import polars as pl
from numpy.typing import NDArray

from trunkline.client.data.formats import Role, columns_of, kind_of, load
from trunkline.client.data.notes import Findings, counted, some
from trunkline.config.site import POLICY, SiteConfig
from trunkline.errors import DataError, nearest

MISSING = ("", "na", "n/a", "nan", "null", "none", "-", "?")  # how exports write "no value", compared without case
NO_LABEL = ("", "na", "n/a", "nan", "null")  # shorter: "none" and "-" may be the name of a class
TRUTH = {"true": "1", "false": "0"}
OURS = ("site.toml", POLICY)  # never data, whatever a pattern matches
Bad = tuple[str, str, str]  # place, value, what it should have been


@dataclass(frozen=True)
class Table:
    """All rows of a site in file order.

    Args:
        frame: needed columns only; number columns are Float64 (null or NaN where missing), names are String.
        files: as shown to the engineer, training files first.
        starts: (files + 1,) first row of each file, and the total.
        test_from: first row that came from `test_files`; the number of rows when there are none.
        clock: whether the order column is a time, in seconds; otherwise it only counts or ranks.
    """

    frame: pl.DataFrame
    files: tuple[Path, ...]
    starts: NDArray[np.int64]
    test_from: int
    clock: bool = False

    def file_of(self, row: int) -> Path:
        return self.files[int(np.searchsorted(self.starts, row, side="right")) - 1]

    def place(self, row: int) -> str:
        """`plant/a.csv, line 17` (the header is line 1), or `plant/a.parquet, row 16`."""
        file = int(np.searchsorted(self.starts, row, side="right")) - 1
        return _place(self.files[file], row - int(self.starts[file]))


def _place(path: Path, row: int) -> str:
    return f"{path}, line {row + 2}" if kind_of(path) == "csv" else f"{path}, row {row + 1}"


NUMBERS = ("regression", "forecast")  # task kinds whose label is a measurement


def roles_of(config: SiteConfig) -> tuple[dict[str, Role], dict[str, str]]:
    """How each needed column is read, and what it is called in messages."""
    data = config.data
    uses: list[tuple[str, Role, str]] = [(name, "number", "channel") for name in data.channels]
    uses += [(name, "number", "regime column") for name in data.regime]
    uses += [
        (target, "number", f"target of task {name!r}")
        for name, task in config.tasks.items()
        if task.kind in NUMBERS
        for target in task.columns
    ]
    uses += [(data.order, "order", "order column")] if data.order else []
    uses += [(data.group, "text", "group column")] if data.group else []
    uses += [(name, "text", "categorical column") for name in data.categorical]
    uses += [
        (target, "label", f"target of task {name!r}")
        for name, task in config.tasks.items()
        if task.kind not in NUMBERS
        for target in task.columns
    ]
    roles: dict[str, Role] = {}
    called: dict[str, str] = {}
    for name, role, use in uses:
        roles.setdefault(name, role)
        called.setdefault(name, use)
    return roles, called


def find_files(folder: Path, patterns: str | tuple[str, ...], key: str, findings: Findings) -> list[Path]:
    """The files of the globs, sorted, each once; a problem for each glob that matches none."""
    files: set[Path] = set()
    for pattern in (patterns,) if isinstance(patterns, str) else patterns:
        try:
            matching = {path for path in folder.glob(pattern) if path.is_file() and path.name not in OURS}
        except (ValueError, NotImplementedError, IndexError):
            findings.problem(
                str(folder / "site.toml"),
                f"`data.{key}`: {pattern!r} is not a pattern relative to the site folder.",
                "Write it like 'sensors/*.parquet'.",
            )
            continue
        if not matching:
            present = sorted(
                str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file() and path.name not in OURS
            )
            findings.problem(
                str(folder), f"no file matches {pattern!r} (`data.{key}`).",
                (f"Files there: {some(present)}." if present else "The folder holds no data at all.") + " Mend the pattern in site.toml or put the files in place.",
            )  # fmt: skip
        files |= matching
    return sorted(files)


def read_table(folder: Path, config: SiteConfig, findings: Findings) -> Table | None:
    """Every row of the site; None when there is nothing to go on with. Columns that cannot be read are left out.

    All trouble goes to `findings`: files that cannot be read, columns that are not there, text where numbers belong,
    columns that change their kind between files, no rows at all.
    """
    training = find_files(folder, config.data.files, "files", findings)
    testing = find_files(folder, config.data.test_files, "test_files", findings)
    if shared := set(training) & set(testing):
        findings.problem(
            str(min(shared)),
            "is matched by `data.files` and by `data.test_files`.",
            "Test rows must not be trained on: make the patterns disjoint.",
        )
        testing = [path for path in testing if path not in shared]
    roles, called = roles_of(config)
    headers = _headers([*training, *testing], findings)
    usable = _present(headers, roles, called, findings)
    bad: dict[str, list[Bad]] = defaultdict(list)
    frames: dict[Path, pl.DataFrame] = {}
    order = config.data.order if config.data.order in usable else None
    clock = order is not None
    for path in headers:
        try:
            frame = load(path, {name: roles[name] for name in roles if name in usable})
        except DataError as error:
            findings.problem("", str(error))
            continue
        clock = clock and order is not None and _is_time(frame[order])
        frames[path] = frame.with_columns(_typed(frame[name], roles[name], path, bad) for name in frame.columns)
    for name, cases in bad.items():
        where, value, expected = cases[0]
        more = f" ({counted(len(cases) - 1, 'further file')} too)" if len(cases) > 1 else ""
        _complain(
            findings,
            _only_for(name, config),
            where,
            f"{called[name]} `{name}` holds {value}{more}; expected {expected}.",
            "Mend or empty the cell, or take the column out of site.toml.",
        )
        usable.discard(name)
    for name in [name for name in usable if roles[name] == "label"]:
        if not _same_kind(name, called[name], frames, _only_for(name, config), findings):
            usable.discard(name)
    return _assemble(frames, {name: role for name, role in roles.items() if name in usable}, testing, clock, findings)


def _headers(paths: list[Path], findings: Findings) -> dict[Path, list[str]]:
    headers: dict[Path, list[str]] = {}
    for path in paths:
        try:
            headers[path] = columns_of(path)
        except DataError as error:
            findings.problem("", str(error))
    return headers


def _present(
    headers: dict[Path, list[str]], roles: dict[str, Role], called: dict[str, str], findings: Findings
) -> set[str]:
    """The needed columns that every file has; a problem for each other one."""
    usable = set(roles)
    for name in roles:
        without = [path for path, columns in headers.items() if name not in columns]
        if not without:
            continue
        usable.discard(name)
        columns_there = headers[without[0]]
        more = f" ({counted(len(without) - 1, 'further file')} neither)" if len(without) > 1 else ""
        holder = next((path for path in headers if path not in without), None)
        hint = f" {holder} has it." if holder else ""
        findings.problem(
            str(without[0]), f"has no {called[name]} `{name}`{more}{_near(name, columns_there)}{hint}",
            f"Columns there: {some(columns_there, 40)}. Correct site.toml or the file.",
        )  # fmt: skip
    return usable


def _near(name: str, columns: list[str]) -> str:
    alike = [column for column in columns if column.strip().casefold() == name.strip().casefold()]
    return f"; did you mean {alike[0]!r}?" if alike else nearest(name, columns)


def _assemble(
    frames: dict[Path, pl.DataFrame], roles: dict[str, Role], testing: list[Path], clock: bool, findings: Findings
) -> Table | None:
    heights = {path: frame.height for path, frame in frames.items()}
    for key, paths in (
        ("files", [path for path in frames if path not in testing]),
        ("test_files", [path for path in frames if path in testing]),
    ):
        empty = [path for path in paths if not heights[path]]
        for path in empty:
            if len(empty) == len(paths):
                findings.problem(
                    str(path), f"holds no rows (`data.{key}`).", "Export it again, or take it out of the folder."
                )
            else:
                findings.warn(str(path), "holds no rows; the other files are used.")
    if not sum(heights.values()) or not roles:
        return None
    frame = pl.concat([part.select(list(roles)) for part in frames.values()], how="vertical_relaxed", rechunk=True)
    frame = frame.with_columns(_label(frame[name]) for name, role in roles.items() if role == "label")
    starts = np.cumsum([0, *heights.values()]).astype(np.int64)
    test_from = int(sum(height for path, height in heights.items() if path not in testing))
    return Table(frame, tuple(frames), starts, test_from, clock)


def _typed(column: pl.Series, role: Role, path: Path, bad: dict[str, list[Bad]]) -> pl.Series:
    """`column` as its role wants it; where that fails, the first offending cell goes to `bad`."""
    if isinstance(column.dtype, pl.Categorical | pl.Enum):
        column = column.cast(pl.String)
    if role == "text":
        return column.cast(pl.String).str.strip_chars().replace("", None)
    if role == "label":
        return column
    if role == "order" and column.dtype == pl.String:
        column = _timestamps(column)
    if role == "order" and isinstance(column.dtype, pl.Datetime | pl.Date):
        return column.cast(pl.Datetime("us")).dt.epoch("us").cast(pl.Float64) / 1e6
    if role == "order" and isinstance(column.dtype, pl.Duration):
        return column.dt.total_microseconds().cast(pl.Float64) / 1e6
    if column.dtype == pl.String:
        return _parsed(column, path, bad)
    if column.dtype.is_numeric() or column.dtype in (pl.Boolean, pl.Null):
        return column.cast(pl.Float64)
    value = "nothing" if column.is_empty() else str(column[0])
    bad[column.name].append((_place(path, 0), f"{value!r} of type {column.dtype}", "a number"))
    return pl.Series(column.name, [None] * len(column), dtype=pl.Float64)


def _is_time(column: pl.Series) -> bool:
    if column.dtype == pl.String:
        column = _timestamps(column)
    return isinstance(column.dtype, pl.Datetime | pl.Date | pl.Duration)


def _parsed(column: pl.Series, path: Path, bad: dict[str, list[Bad]]) -> pl.Series:
    text = column.str.strip_chars()
    lower = text.str.to_lowercase()
    text = lower.replace(TRUTH).set(lower.is_in(MISSING), None)
    numbers = text.cast(pl.Float64, strict=False)
    wrong = text.is_not_null() & numbers.is_null()
    if wrong.any():
        row = int(wrong.arg_true()[0])
        hint = " with a decimal point" if str(column[row]).count(",") == 1 else ""
        bad[column.name].append(
            (
                _place(path, row),
                f"{column[row]!r} and {wrong.sum() - 1:,} more such cells" if wrong.sum() > 1 else repr(column[row]),
                f"a number{hint}",
            )
        )
    return numbers


def _timestamps(column: pl.Series) -> pl.Series:
    """Text like 2024-05-01 06:30:00 as a time; anything else unchanged."""
    filled = column.drop_nulls()
    if filled.is_empty() or filled.head(1).str.strip_chars().cast(pl.Float64, strict=False).null_count() == 0:
        return column
    try:
        return column.str.strip_chars().str.to_datetime(time_unit="us", strict=True)
    except pl.exceptions.PolarsError:
        return column


def _only_for(name: str, config: SiteConfig) -> tuple[str, ...]:
    """The tasks whose label column `name` is; none where it is an input, a group or an order too."""
    data = config.data
    if name in (*data.channels, *data.categorical, *data.regime, data.group, data.order):
        return ()
    return tuple(task for task, settings in config.tasks.items() if name in settings.columns)


def _complain(findings: Findings, tasks: tuple[str, ...], where: str, complaint: str, remedy: str) -> None:
    """A column that cannot be read costs the tasks that it is the label of, or else the site."""
    for task in tasks:
        findings.set_aside(task, where, complaint, remedy)
    if not tasks:
        findings.problem(where, complaint, remedy)


def _same_kind(
    name: str, called: str, frames: dict[Path, pl.DataFrame], tasks: tuple[str, ...], findings: Findings
) -> bool:
    """Whether a label column is text in all files or a number in all files."""
    kinds: dict[str, Path] = {}
    for path, frame in frames.items():
        dtype = frame[name].dtype
        if dtype != pl.Null and frame.height:
            kinds.setdefault(
                "text" if dtype == pl.String else "truth values" if dtype == pl.Boolean else "numbers", path
            )
    if len(kinds) < 2:
        return True
    (first, first_file), (second, second_file), *_ = kinds.items()
    complaint = f"{called} `{name}` holds {second}, but {first} in {first_file}."
    _complain(findings, tasks, str(second_file), complaint, "Write it the same way in all files.")
    return False


def _label(column: pl.Series) -> pl.Series:
    """A label column of text as whole numbers, numbers or truth values where every cell is one; CSV knows only text."""
    if column.dtype != pl.String:
        return column
    text = column.str.strip_chars()
    lower = text.str.to_lowercase()
    text = text.set(lower.is_in(NO_LABEL), None)
    for dtype in (pl.Int64, pl.Float64):
        numbers = text.cast(dtype, strict=False)
        if numbers.null_count() == text.null_count():
            return numbers
    if lower.filter(text.is_not_null()).is_in(list(TRUTH)).all():
        return pl.Series(column.name, lower.replace_strict(TRUTH, default=None).cast(pl.Int64).cast(pl.Boolean))
    return text
