"""What every task kind promises: how its label column is read, what it learns, how it is judged."""

import copy
import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal, NamedTuple, Self

import numpy as np
import polars as pl
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from trunkline.config.tasks import TaskConfig
from trunkline.errors import ConfigError, DataError, StorageError, nearest
from trunkline.models.labels import Labels, Places, known
from trunkline.protocol.contract import TaskCard

__all__ = ["BETA", "Labels", "Metric", "Samples", "Task", "effective_number", "known", "listed", "numbers", "shares"]

BLANKS = ("", "na", "n/a", "nan", "null", "none", "-")  # ways to write "no number" in a text file
BETA = 0.999  # of the effective number of samples; not 0.9999, because overlapping windows repeat each other


class Metric(NamedTuple):
    """How a number of the report reads."""

    unit: str  # "" = the label's own unit
    better: Literal["lower", "higher"]


class Samples(NamedTuple):
    """What a task may know of the inputs it will meet, apart from their values.

    Args:
        channels: inputs in order.
        window: rows a sample; None where a sample is one row.
        clock: whether `order` is a time, in seconds; otherwise it only counts or ranks.
        scale: (mean, standard deviation) that each channel was scaled by; empty where that depends on a regime.
    """

    channels: tuple[str, ...]
    window: int | None = None
    clock: bool = False
    scale: tuple[tuple[float, float], ...] = ()


class Task(ABC):
    """One thing to predict at one site: `[tasks.NAME]` of its site.toml.

    A task is used in this order: `read` its label column (all rows of the site), `expect` the inputs, bring labels to
    samples by `at`, `fit` on the training labels, `look` at the training samples, then `head`, `loss`, `predict`, `measure`
    as often as wanted. `state` is what `fit` and `look` learnt, for the vault.

    Args:
        name: also the name of its head.
        config: its table in site.toml.

    Raises:
        ConfigError: the table cannot be meant, or the name cannot be a head's.
    """

    kind: ClassVar[str]
    METRICS: ClassVar[dict[str, Metric]]  # every metric this kind knows
    primary: str  # of the kind; `metric` in site.toml puts another one in its place for one task

    def __init__(self, name: str, config: TaskConfig) -> None:
        if hasattr(nn.ModuleDict(), name):  # heads live in one, and its own attributes would be shadowed
            raise ConfigError(
                f"[tasks.{name}]: PyTorch uses the name {name!r} itself. Rename the table; `target` may stay."
            )
        self.name = name
        self.config = config
        self.trouble = ""  # what `calibrate` found that a person should hear of
        if config.metric:
            if config.metric not in self.METRICS:
                raise ConfigError(
                    f"[tasks.{name}]: `metric = {config.metric!r}` is none of kind {self.kind!r}"
                    f"{nearest(config.metric, self.METRICS)} Known: {', '.join(self.METRICS)}."
                )
            self.primary = config.metric

    @property
    def metrics(self) -> dict[str, Metric]:
        """The metrics of this task: those of its kind that its configuration gives a meaning."""
        return self.METRICS

    @property
    def card(self) -> TaskCard:
        """What the site may say of this task."""
        metric = self.METRICS[self.primary]
        return TaskCard(
            task=self.name,
            kind=self.kind,
            metric=self.primary,
            unit=metric.unit or self.config.unit,
            better=metric.better,
        )

    @property
    @abstractmethod
    def outputs(self) -> int:
        """Numbers the head gives a sample."""

    @abstractmethod
    def read(self, column: pl.Series, where: str) -> Labels:
        """The label column as numbers, NaN where a label is missing.

        Args:
            column: as the file has it.
            where: the file, for errors.

        Raises:
            DataError: a value is no label of this task; the text names file, column, value, row and remedy.
        """

    def read_from(self, frame: pl.DataFrame, where: str) -> Labels:
        """The labels of this task out of a table that has all of `config.columns`: (rows,) or (rows, k), in its order."""
        return self.read(frame[self.config.target], where)

    def bind_inputs(self, samples: Samples) -> None:
        """Hear what the inputs look like, before `at` and `head`; only a task that reads its own input needs to know."""
        return

    def labels_for_samples(self, labels: Labels, places: Places) -> Labels:
        """The labels of the samples that end at rows `places.ends`, out of the labels of all rows of one part.

        Args:
            labels: (rows,) or (rows, k), sorted by group then order.
        """
        return labels[places.ends]

    def unsupported(self, rows: int) -> str:
        """What this task cannot do in a part whose longest group has `rows` rows, as a sentence; "" where it can."""
        return ""

    def scored_mask(self, labels: Labels) -> NDArray[np.bool_]:
        """(rows,) which samples count in the metrics; a task may carry more with a label than what it is judged by."""
        return known(labels)

    @abstractmethod
    def fit(self, labels: Labels) -> None:
        """Learn scale or class counts from the TRAINING labels.

        Raises:
            DataError: no label at all, or all of one class.
        """

    def fit_inputs(self, newest: NDArray[np.float32], labels: Labels) -> None:
        """See the inputs of the TRAINING samples, after `fit`; for a task that `meets` them.

        Args:
            newest: (n, channels) the last row of each sample, scaled, NaN where missing.
            labels: (n,) or (n, k), as `fit` had them.
        """
        return

    @abstractmethod
    def state(self) -> dict[str, object]:
        """What `read` and `fit` learnt, ready for JSON."""

    @abstractmethod
    def load_state(self, state: Mapping[str, Any]) -> None:
        """Take over what `state` gave.

        Raises:
            StorageError: it is the state of another kind of task.
        """

    @abstractmethod
    def loss(self, output: Tensor, labels: Tensor) -> Tensor:
        """Mean loss over the labels that are present; exactly 0, with zero gradient, where none is.

        Shape:
            output (batch, outputs) as `meet` gave it, labels (batch,) or (batch, k), NaN where missing -> ().
        """

    @abstractmethod
    def predict(self, output: Tensor) -> NDArray[np.float32]:
        """Head outputs (batch, outputs) -> what a person reads: values, or probabilities."""

    @abstractmethod
    def _score(self, prediction: NDArray[Any], labels: Labels) -> float | None:
        """The kind's own primary metric over rows that all have a label, at least one; a bootstrap calls it thousands of times."""

    @abstractmethod
    def _others(self, prediction: Tensor, labels: Tensor) -> dict[str, float | None]:
        """The other metrics over the same rows, float64."""

    def _metric(self, name: str, prediction: NDArray[Any], labels: Labels) -> float | None:
        """Any one metric over such rows. A kind answers here without `_others` what is quick to say alone."""
        if name == type(self).primary:
            return self._score(prediction, labels)
        return self._others(*_doubles(prediction, labels))[name]

    def head(self, width: int) -> nn.Module:
        """The private last layer, (batch, width) -> (batch, outputs): linear, for it learns from the fewest labels.

        Nothing that was learnt from labels may show in it: where a run lends the head, the centre sees its first values.
        """
        return nn.Linear(width, self.outputs)

    def init_head(self, head: nn.Module) -> None:
        """Move a new head that stays home to where this site's training labels say that training should begin."""
        return

    @property
    def meets(self) -> bool:
        """Whether `meet` changes anything: whether the head needs the sample itself beside its embedding."""
        return type(self).combine_with_inputs is not Task.combine_with_inputs

    def combine_with_inputs(self, output: Tensor, x: Tensor) -> Tensor:
        """What the head gave for the samples `x`, made ready for `loss` and `predict`.

        Only a task with a way past the network needs `x` (reconstruction, highway); others take the output as it is.

        Shape:
            output (batch, outputs), x (batch, channels, time) or (batch, columns) -> (batch, anything).
        """
        return output

    lifted: Tensor | None = None  # the weights of classes in `loss`, where `with_numbers` gave them

    def loss_numbers(self) -> dict[str, Tensor] | None:
        """What `loss` reads that was learnt from this site's labels, by name; None where it cannot be lifted out.

        Sites whose tasks differ in nothing else can be trained in one go: `with_numbers` gives the task of each.
        """
        return None

    def with_numbers(self, numbers: Mapping[str, Tensor]) -> Self:
        """A copy whose `loss` reads these instead of its own."""
        other = copy.copy(self)
        other.__dict__.update(numbers)
        return other

    def scores(
        self, outputs: Tensor, labels: NDArray[Any], numbers: Mapping[str, Tensor]
    ) -> NDArray[np.float64] | None:
        """`score` of many sites at once, NaN where it is None; None where there is no quicker way than one by one.

        Shape:
            outputs (sites, rows, outputs), labels (sites, rows, ...) with NaN where missing, numbers (sites, ...) -> (sites,).
        """
        return None

    settles: ClassVar[bool] = False  # whether `settle` wants the trained model's outputs on the training samples

    def fit_outputs(self, output: Tensor, labels: Labels) -> None:
        """Learn what one trained model's outputs look like on TRAINING samples, before `predict`; see `calibrate`."""
        return

    def calibrate(self, prediction: NDArray[Any], labels: Labels) -> None:
        """Choose where this task decides, from one model's VALIDATION rows; nothing where a kind has no such choice.

        Two models decide at two places: calibrate a copy of the task for each. What a person should hear of it (no
        validation row is ever called) is left in `trouble`.
        """
        return

    decision_keys: ClassVar[tuple[str, ...]] = ()  # keys of `state` that `calibrate` sets

    def decisions(self) -> dict[str, Any]:
        """What `calibrate` has chosen, ready for JSON."""
        state = self.state()
        return {key: state[key] for key in self.decision_keys}

    def take_decisions(self, decisions: Mapping[str, Any]) -> None:
        """Decide as `decisions` says, which another model of this task was calibrated for."""
        self.load_state({**self.state(), **decisions})

    def calibrated(self, prediction: NDArray[Any]) -> NDArray[Any]:
        """The same predictions as probabilities that mean what they say, after `calibrate`; the order of any two stays.

        `score` and `measure` take what `predict` gave, and do this themselves where a metric asks for it.
        """
        return prediction

    def describe(self, labels: Labels) -> str:
        """What the labels of some samples look like, in one line; and the share of samples that have none."""
        there = known(labels)
        if not there.any():
            return "no labels" if len(labels) else "no samples"
        without = f", {1 - there.mean():.0%} unlabelled" if not there.all() else ""
        return self._described(labels[there]) + without

    def _described(self, labels: Labels) -> str:
        """The words of `describe` for samples that all have a label, at least one."""
        values = labels[~np.isnan(labels)]
        return f"{values.min():.4g} to {values.max():.4g}, median {np.median(values):.4g}"

    def warnings(self, part: str, labels: Labels) -> list[str]:
        """What deserves a look in the labels of `part` ("train", "validation" or "test"), after `fit`."""
        return []

    def score(self, prediction: NDArray[Any], labels: Labels) -> float | None:
        """The primary metric (`metric` of site.toml, or the kind's own); None where undefined (no labels, one class).

        Args:
            prediction: what `predict` gave, one row a sample.
            labels: (rows,) or (rows, k), NaN where missing; such rows do not count.
        """
        present = self.scored_mask(labels)
        if not present.any():
            return None
        return _finite(self._metric(self.primary, prediction[present], labels[present]))

    def measure(self, prediction: NDArray[Any], labels: Labels) -> dict[str, float | None]:
        """One value for each of `metrics`; None where it is undefined or not finite. Arguments as in `score`."""
        measured: dict[str, float | None] = {}
        present = self.scored_mask(labels)
        if present.any():
            prediction, labels = prediction[present], labels[present]
            measured = {type(self).primary: self._score(prediction, labels)}
            measured |= self._others(*_doubles(prediction, labels))
            measured[self.primary] = self.score(prediction, labels)
        return {name: _finite(measured.get(name)) for name in self.metrics}

    def _loaded(self, state: Mapping[str, Any]) -> Mapping[str, Any]:
        if state.get("kind") != self.kind:
            raise StorageError(
                f"Task {self.name!r} is of kind {self.kind!r}; what was stored is of kind {state.get('kind')!r}. "
                f"Undo the change of `kind` in site.toml, or start a run of another name."
            )
        return state

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

    def _never_called(self, rows: int, threshold: float) -> str:
        return (
            f"none of {rows} validation samples reaches its threshold of {threshold:.3g}, so it would never say yes. Let "
            f"validation have positive labels (other `seed` or more `validation` under [data.split]), or judge it by a "
            f"`metric` that needs no threshold."
        )

    def _one_class(self, name: str, count: int) -> DataError:
        return DataError(
            f"Task {self.name!r}: all {count} training labels of {self._column()} are {name!r}; there is "
            f"nothing to tell apart. Add groups where it differs, change `seed` of [data.split], or take "
            f"[tasks.{self.name}] out of site.toml."
        )


def numbers(task: Task, column: pl.Series, where: str, remedy: str) -> NDArray[np.float64]:
    """A label column as float64, NaN where blank; text that is a number counts as one.

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


def effective_number(counts: NDArray[np.float64]) -> NDArray[np.float64]:
    """How much `counts` samples are worth when samples repeat each other (Cui et al. 2019, arXiv:1901.05555)."""
    worth: NDArray[np.float64] = (1.0 - BETA ** np.maximum(counts, 1.0)) / (1.0 - BETA)
    return worth


def listed(words: Sequence[str], most: int = 6) -> str:
    """The first `most` words with commas, and how many were left out."""
    rest = f", ... ({len(words) - most} more)" if len(words) > most else ""
    return ", ".join(words[:most]) + rest


def shares(names: Sequence[str], labels: Labels) -> str:
    """The share of each class among `labels`, places in `names`, all of them known."""
    codes, counts = np.unique(labels.astype(np.int64), return_counts=True)
    return listed([f"{names[code]} {count / len(labels):.1%}" for code, count in zip(codes, counts, strict=True)])


def _doubles(prediction: NDArray[Any], labels: Labels) -> tuple[Tensor, Tensor]:
    return torch.from_numpy(prediction.astype(np.float64)), torch.from_numpy(labels.astype(np.float64))


def _finite(value: float | None) -> float | None:
    return float(value) if value is not None and math.isfinite(value) else None
