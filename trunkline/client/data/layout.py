"""Which group, moment and part each row belongs to, and the one order in which a site's rows are kept."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import polars as pl
from numpy.typing import NDArray

from trunkline.client.data.folds import SplitInput
from trunkline.client.data.notes import Findings, counted
from trunkline.client.data.preprocess import clean
from trunkline.client.data.read import Table
from trunkline.client.data.split import PARTS, TEST, TRAIN, VALIDATION, Split, divide, read_split
from trunkline.client.data.windows import segments
from trunkline.config.site import SiteConfig
from trunkline.config.tasks import CLASSED
from trunkline.errors import DataError
from trunkline.runtime.storage import Sealing

Floats = NDArray[np.float64]
Rows = NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Layout:
    """The rows of a site in their final order: by part, then group, then order.

    Args:
        rows: (n,) row of the table.
        part, group, order: (n,) of each.
        first, last: (n,) the segment (one group's rows of one part) each row lies in.
        names: group names; `group` holds places in it.
    """

    rows: Rows
    part: NDArray[np.int8]
    group: NDArray[np.int32]
    order: Floats
    first: Rows
    last: Rows
    names: tuple[str, ...]

    @property
    def training(self) -> NDArray[np.bool_]:
        return np.equal(self.part, TRAIN)


def read_groups(
    config: SiteConfig, table: Table, findings: Findings
) -> tuple[NDArray[np.int32], Floats, tuple[str, ...]]:
    """Group place and order of every row in file order, and the sorted group names.

    Rows without a group or moment are a problem; a stand-in lets the rest of the site be looked at all the same.
    """
    columns = table.frame.columns
    group_column = config.data.group if config.data.group in columns else None
    order_column = config.data.order if config.data.order in columns else None
    if group_column:
        text = table.frame[group_column].cast(pl.String)
        _complete(table, text.is_null(), f"group (column `{group_column}`)", findings)
        text = text.fill_null("")
        names = tuple(text.unique().sort().to_list())
        group = text.cast(pl.Enum(list(names))).to_physical().to_numpy().astype(np.int32)
    else:  # one group; rows of test_files are another machine's, or another time's
        group = (np.arange(table.frame.height) >= table.test_from).astype(np.int32)
        names = ("all", "test files") if group[-1] else ("all",)
    if order_column:
        order = table.frame[order_column].to_numpy()
        _complete(table, pl.Series(~np.isfinite(order)), f"order (column `{order_column}`)", findings)
        return group, np.nan_to_num(order), names
    by_group = np.argsort(group, kind="stable")  # counted within each group, so that another group's rows move nothing
    order = np.empty(table.frame.height)
    order[by_group] = np.arange(len(order)) - segments(group[by_group])[0]
    return group, order, names


def _complete(table: Table, empty: pl.Series, column: str, findings: Findings) -> None:
    rows = empty.arg_true()
    if len(rows):
        places = [table.place(int(row)) for row in rows.head(3)]
        more = f" and {len(rows) - len(places):,} more" if len(rows) > len(places) else ""
        findings.problem(
            places[0], f"no {column} in {counted(len(rows), 'row')}: {'; '.join(places)}{more}.", "Fill it in or delete the row."
        )  # fmt: skip


def sort_rows(table: Table, config: SiteConfig, group: NDArray[np.int32], order: Floats, findings: Findings) -> Rows:
    """Rows by group and order, exact duplicates dropped."""
    rows = np.lexsort((order, group))
    if not config.data.order:
        return rows
    exact, differing = clean.duplicates(table.frame, rows, group, order)
    if len(exact):
        findings.info(
            "rows", f"{counted(len(exact), 'exact duplicate row')} dropped, such as {table.place(int(rows[exact[0]]))}."
        )
    if len(differing):
        findings.warn(
            "rows",
            f"{counted(len(differing), 'row')} with the group and `{config.data.order}` of another row but other values, "
            f"such as {table.place(int(rows[differing[0]]))}; all are kept.",
            "Is `group` too coarse, or was something logged twice?",
        )  # fmt: skip
    return np.delete(rows, exact)


def keep_apart(table: Table, group: NDArray[np.int32], names: tuple[str, ...], findings: Findings) -> None:
    """A problem for each group that is in `files` and in `test_files`."""
    shared = np.intersect1d(group[: table.test_from], group[table.test_from :])
    for code in shared[:5]:
        first_row, last_row = (np.flatnonzero(group == code)[[0, -1]]).tolist()
        findings.problem(
            "",
            f"group {names[code]} is in {table.file_of(first_row)} and in {table.file_of(last_row)}: "
            "what is trained on would be tested on.",
            "If these are two machines, give them two names; if it is one, take it out of one of the files.",
        )  # fmt: skip
    if len(shared) > 5:
        findings.problem("", f"{len(shared) - 5} further groups are in `files` and `test_files`.")


def lay_out_rows(
    table: Table, config: SiteConfig, group: NDArray[np.int32], order: Floats, names: tuple[str, ...], rows: Rows,
    labels: dict[str, NDArray[np.float32]], path: Path | None, findings: Findings, hold_out: bool = True,
    seal: Sealing | None = None,
) -> tuple[Layout, Split | None]:  # fmt: skip
    """Deal the rows to the three parts and lay each part's rows side by side.

    Args:
        hold_out: False: what would be held out for validation trains too; one group is then enough beside test files.
        seal: opens what is at `path`.
    """
    from_files = (
        rows < table.test_from
    )  # rows of `files`; those of `test_files` are test rows and take no part in splitting
    codes, local = np.unique(group[rows[from_files]], return_inverse=True)
    present = _present(config, labels, rows[from_files], local, len(codes))
    data = SplitInput(tuple(names[code] for code in codes), local.astype(np.int32), order[rows[from_files]], present)
    part = np.full(len(rows), TEST, dtype=np.int8)
    part[from_files] = TRAIN  # where splitting fails, the rest is still looked at as if all rows were for training
    split: Split | None = None
    stored: Split | None = None
    try:
        stored = read_split(path, seal) if path else None
    except DataError as error:
        findings.problem("", str(error))
    if config.data.group is None or config.data.group in table.frame.columns:
        by = config.data.split.by if config.data.group else "time"
        apart = bool(config.data.test_files)
        if not hold_out and by == "group" and len(data.names) == 1 and apart and stored is None:
            shares = config.data.split
            split = Split(by, shares.seed, shares.validation, 0.0, {data.names[0]: PARTS[TRAIN]}, {})
        else:
            dealt = divide(data, config.data.split, by, apart, stored, path or Path("split.json"), findings)
            if dealt is not None:
                split, part[from_files] = dealt
    if not hold_out:
        part[part == VALIDATION] = TRAIN
    final = np.argsort(part, kind="stable")
    rows, part = rows[final], part[final]
    first, last = segments(part, group[rows])
    return Layout(rows, part, group[rows], order[rows], first, last, names), split


def _present(
    config: SiteConfig, labels: dict[str, NDArray[np.float32]], rows: Rows, group: NDArray[np.intp], groups: int
) -> NDArray[np.bool_]:
    """(groups, classes): whether a group holds a class, over all tasks with classes."""
    blocks = [np.zeros((groups, 0), dtype=bool)]
    for name, label in labels.items():
        if config.tasks[name].kind in CLASSED:
            values = label[rows]
            labelled = ~np.isnan(values)
            classes, code = np.unique(values[labelled], return_inverse=True)
            block = np.zeros((groups, len(classes)), dtype=bool)
            block[group[labelled], code] = True
            blocks.append(block)
    return np.concatenate(blocks, axis=1)
