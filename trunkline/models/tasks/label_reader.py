"""The first third of a task: its label columns become arrays, with errors that name file, row and remedy."""

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray

from trunkline.config.tasks import TaskConfig
from trunkline.errors import DataError
from trunkline.models.labels import Labels, Places, known

BLANKS = ("", "na", "n/a", "nan", "null", "none", "-")  # ways to write "no number" in a text file


class LabelReader(ABC):
    """How labels are read, brought to samples and described."""

    name: str
    config: TaskConfig

    @abstractmethod
    def read(self, column: pl.Series, where: str) -> Labels:
        """One label column as numbers, (rows,) float32, NaN where a label is missing.

        Args:
            column: as the file has it.
            where: the file, for errors.

        Raises:
            DataError: a value is no label of this task; the text names file, column, value, row and remedy.
        """

    def read_from(self, frame: pl.DataFrame, where: str) -> Labels:
        """The labels of this task out of a table that has all of `config.columns`: (rows,) or (rows, k), in its order."""
        return self.read(frame[self.config.target], where)

    def labels_for_samples(self, labels: Labels, places: Places) -> Labels:
        """The labels of the samples that end at rows `places.ends`, out of the labels of all rows of one part.

        Args:
            labels: (rows,) or (rows, k), sorted by group then order.

        Returns:
            (n,) or (n, k), a row for each of `places.ends`.
        """
        return labels[places.ends]

    def unsupported(self, rows: int) -> str:
        """Why this task cannot work with a part whose longest group has `rows` rows, as a sentence; "" where it can."""
        return ""

    def describe(self, labels: Labels) -> str:
        """What the labels of some samples look like, in one line; and the share of samples that have none.

        Args:
            labels: (n,) or (n, k), NaN where missing.
        """
        labelled = known(labels)
        if not labelled.any():
            return "no labels" if len(labels) else "no samples"
        without = f", {1 - labelled.mean():.0%} unlabelled" if not labelled.all() else ""
        return self._described(labels[labelled]) + without

    def _described(self, labels: Labels) -> str:
        """The words of `describe` for samples that all have a label, at least one."""
        values = labels[~np.isnan(labels)]
        return f"{values.min():.4g} to {values.max():.4g}, median {np.median(values):.4g}"

    def warnings(self, part: str, labels: Labels) -> list[str]:
        """What deserves a look in the labels of `part` ("train", "validation" or "test"), after `fit`.

        Args:
            labels: (n,) or (n, k), NaN where missing.
        """
        return []

    def _column(self) -> str:
        return f"column `{self.config.columns[0]}`" if self.config.columns else "its label"

    def _bad(self, column: pl.Series, where: str, row: int, value: object, expected: str, remedy: str) -> DataError:
        return DataError(
            f"{where}: column `{column.name}`, data row {row + 1}: {value!r} is no label of task {self.name!r}; "
            f"expected {expected}. {remedy}"
        )

    def _no_labels(self) -> DataError:
        return DataError(
            f"Task {self.name!r}: {self._column()} has no label in any training row. Label some training "
            f"groups, raise `labelled_groups`, or take [tasks.{self.name}] out of site.toml."
        )

    def _one_class(self, name: str, count: int) -> DataError:
        return DataError(
            f"Task {self.name!r}: all {count} training labels of {self._column()} are {name!r}; there is "
            f"nothing to tell apart. Add groups where it differs, change `seed` of [data.split], or take "
            f"[tasks.{self.name}] out of site.toml."
        )


def numbers(task: LabelReader, column: pl.Series, where: str, remedy: str) -> NDArray[np.float64]:
    """A label column as (rows,) float64, NaN where blank; text that is a number counts as one.

    Raises:
        DataError: the first value that is no number, with its row and `remedy`.
    """
    if column.dtype == pl.String:
        text = column.str.strip_chars()
        text = text.set(text.str.to_lowercase().is_in(BLANKS), None)
        parsed = text.cast(pl.Float64, strict=False)
        wrong = (parsed.is_null() & text.is_not_null()).arg_true()
        if len(wrong):
            raise task._bad(column, where, wrong[0], column[wrong[0]], "a number", remedy)
    elif column.dtype.is_numeric() or column.dtype in (pl.Boolean, pl.Null):
        parsed = column.cast(pl.Float64)
    else:
        first = column.is_not_null().arg_max() or 0
        raise task._bad(column, where, first, column[first], f"a number, not {column.dtype}", remedy)
    values = parsed.fill_null(math.nan).to_numpy().astype(np.float64)
    if huge := np.flatnonzero(np.abs(values) > np.finfo(np.float32).max).tolist():
        raise task._bad(column, where, huge[0], column[huge[0]], "a finite number", remedy)
    return values


def listed(words: Sequence[str], most: int = 6) -> str:
    """The first `most` words with commas, and how many were left out."""
    ending = f", ... ({len(words) - most} more)" if len(words) > most else ""
    return ", ".join(words[:most]) + ending


def shares(names: Sequence[str], labels: NDArray[Any]) -> str:
    """The share of each class among `labels` (n,), indices into `names`, all of them known."""
    codes, counts = np.unique(labels.astype(np.int64), return_counts=True)
    return listed([f"{names[code]} {count / len(labels):.1%}" for code, count in zip(codes, counts, strict=True)])
