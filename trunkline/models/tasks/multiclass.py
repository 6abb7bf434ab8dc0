"""One of several classes: a fault's name, or a stage of wear on an ordered scale."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import polars as pl
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from trunkline.config.tasks import TaskConfig
from trunkline.errors import ConfigError, DataError, nearest
from trunkline.models.tasks.calibration import EDGE, ENOUGH, calibration_error, soften, temperature
from trunkline.models.tasks.crossentropy import one_of_many
from trunkline.models.tasks.task import Labels, Metric, Task, effective_number, listed, shares

MOST = 256  # classes found in a column; more of them look like a measurement
MOST_BROKEN = 20  # the same where they are numbers with a fraction
BOUND = 10.0  # largest emphasis of a rare class beside the commonest


class Multiclass(Task):
    """Labels are words or whole numbers; `classes` in site.toml, or else every distinct value `read` first sees.

    Rare classes count more, by the effective number of samples (Cui et al. 2019, arXiv:1901.05555), at most tenfold;
    `class_weights = "none"` leaves that out. The probabilities are those of this weighted loss, sharpened or softened
    by one temperature in `calibrated`; `ece` is that of the likeliest class, measured on those.

    With `ordinal` the classes have an order (`classes` as listed, else sorted: numbers by value), and the head answers
    K - 1 questions "beyond class k?" from one shared score (CORAL, Cao et al. 2020, arXiv:1901.07884). The likeliest
    class is the answer, as without an order; kind "ordinal" has the same head and is judged by grades.
    """

    kind = "multiclass"
    decision_keys = ("temperature",)
    primary = "macro_f1"
    METRICS = {  # noqa: RUF012  (declared ClassVar in Task)
        "macro_f1": Metric("of 1", "higher"),
        "accuracy": Metric("of 1", "higher"),
        "balanced_accuracy": Metric("of 1", "higher"),
        "mae_classes": Metric("classes", "lower"),
        "ece": Metric("of 1", "lower"),
    }

    def __init__(self, name: str, config: TaskConfig) -> None:
        super().__init__(name, config)
        self.classes: tuple[str, ...] = config.classes or ()
        if config.classes is not None and len(set(config.classes)) != max(len(config.classes), 2):
            raise ConfigError(
                f"[tasks.{name}]: `classes` should name two or more different classes. Found {list(config.classes)}. "
                f"Leave it out to use every value of column `{config.target}`."
            )
        if self.ordered and (config.focal or config.label_smoothing):
            key = "focal" if config.focal else "label_smoothing"
            raise ConfigError(f"[tasks.{name}]: `{key}` is for classes without an order. Drop it, or `ordinal`.")
        self.counts: tuple[int, ...] = (1,) * len(self.classes)
        self.temperature = 1.0

    @property
    def ordered(self) -> bool:
        """Whether neighbouring classes are closer than distant ones."""
        return self.config.ordinal

    @property
    def metrics(self) -> dict[str, Metric]:
        return {name: metric for name, metric in self.METRICS.items() if name != "mae_classes" or self.ordered}

    @property
    def outputs(self) -> int:
        if not self.classes:
            raise DataError(f"Task {self.name!r}: its classes are not known yet. Read its label column first.")
        return len(self.classes) - self.ordered

    def read(self, column: pl.Series, where: str) -> Labels:
        text = _as_text(column)
        words = [word for word in text.unique(maintain_order=True).to_list() if word is not None]
        if not self.classes:
            self.classes = self._discover_classes(words, column, where)
            self.counts = (1,) * len(self.classes)
        codes = {word: float(code) for code, word in enumerate(self.classes)}
        if unknown := [word for word in words if word not in codes]:
            row = int((text == unknown[0]).arg_max() or 0)
            raise self._bad(
                column, where, row, column[row], f"one of {', '.join(self.classes)}{nearest(unknown[0], self.classes).rstrip('.')}",
                f"Correct it, or list it under `classes` of [tasks.{self.name}].",
            )  # fmt: skip
        values = text.replace_strict([None, *codes], [None, *codes.values()], return_dtype=pl.Float32)
        return np.array(values.fill_null(float("nan")).to_numpy(), dtype=np.float32)

    def _discover_classes(self, words: list[str], column: pl.Series, where: str) -> tuple[str, ...]:
        if not words:
            raise DataError(
                f"{where}: column `{column.name}` of task {self.name!r} is empty, so its classes are not known. "
                f"List them under `classes` of [tasks.{self.name}], or take the task out of site.toml."
            )
        if len(words) > MOST:
            raise DataError(
                f"{where}: column `{column.name}` of task {self.name!r} has {len(words)} different values; at most "
                f"{MOST} are taken for classes. A measurement is kind = 'regression'; otherwise list `classes`."
            )
        whole = all(word.removeprefix("-").isdecimal() for word in words)
        if not whole and len(words) > MOST_BROKEN and all(map(_is_number, words)):
            raise DataError(
                f"{where}: column `{column.name}` of task {self.name!r} has {len(words)} different numbers with fractions, "
                f"such as {listed(words, 3)}; at most {MOST_BROKEN} are taken for classes. A measurement is "
                f"kind = 'regression'; otherwise list `classes`."
            )
        return tuple(sorted(words, key=int if whole else None))

    def fit(self, labels: Labels) -> None:
        present = labels[~np.isnan(labels)].astype(np.int64)
        if not len(present):
            raise self._no_labels()
        counts = np.bincount(present, minlength=len(self.classes))
        if (counts > 0).sum() == 1:
            raise self._one_class(self.classes[present[0]], len(present))
        self.counts = tuple(counts.tolist())

    @property
    def emphasis(self) -> tuple[float, ...]:
        """Weight of each class in the loss; 1 on average over the training labels."""
        if self.config.class_weights == "none":
            return (1.0,) * len(self.classes)
        counts = np.array(self.counts, dtype=np.float64)
        weight = 1.0 / effective_number(counts)
        weight = np.minimum(weight, BOUND * weight.min())
        return tuple((weight * counts.sum() / (weight * counts).sum()).tolist())

    def state(self) -> dict[str, object]:
        return {
            "kind": self.kind,
            "classes": list(self.classes),
            "counts": list(self.counts),
            "temperature": self.temperature,
        }

    def load_state(self, state: Mapping[str, Any]) -> None:
        loaded = self._loaded(state)
        self.classes, self.counts = tuple(loaded["classes"]), tuple(loaded["counts"])
        self.temperature = float(loaded.get("temperature", 1.0))  # absent in what an older version stored

    def head(self, width: int) -> nn.Module:
        return Cumulative(width, self.outputs) if self.ordered else super().head(width)

    def loss(self, output: Tensor, labels: Tensor) -> Tensor:
        missing = labels.isnan()
        output = output.float()
        truth = torch.where(missing, 0.0, labels).long()
        if self.ordered:
            beyond = (truth[:, None] > torch.arange(self.outputs, device=output.device)).float()  # (batch, K - 1)
            losses = (beyond * F.softplus(-output) + (1.0 - beyond) * F.softplus(output)).mean(dim=1)
        else:
            losses = one_of_many(output, truth, self.config.focal, self.config.label_smoothing)
        weight = torch.tensor(self.emphasis, device=output.device) if self.loss_weights is None else self.loss_weights
        losses = losses * weight[truth]
        return torch.where(missing, 0.0, losses).sum() / (~missing).sum().clamp(min=1)

    def loss_numbers(self) -> dict[str, Tensor]:
        return {"loss_weights": torch.tensor(self.emphasis)}

    def predict(self, output: Tensor) -> NDArray[np.float32]:
        """(batch, outputs) -> (batch, K) probabilities, also where the classes have an order."""
        output = output.detach().float()
        if self.ordered:
            # each "beyond k?" is at most as likely as the one before, so that no class gets less than nothing
            beyond = output.sigmoid().cummin(dim=1).values
            edge = torch.ones_like(beyond[:, :1])
            beyond = torch.cat([edge, beyond, torch.zeros_like(edge)], dim=1)  # (batch, K + 1)
            return (beyond[:, :-1] - beyond[:, 1:]).cpu().numpy()
        return output.softmax(dim=1).cpu().numpy()

    def calibrate(self, prediction: NDArray[Any], labels: Labels) -> None:
        """Find the temperature of the probabilities on these VALIDATION rows; the likeliest class of each row stays."""
        present = ~np.isnan(labels) & ~np.isnan(prediction).any(axis=1)
        truth = labels[present].astype(np.int64)
        if not self.ordered and len(truth) >= ENOUGH and truth.min() < truth.max():
            self.temperature = temperature(prediction[present], truth)

    def calibrated(self, prediction: NDArray[Any]) -> NDArray[Any]:
        if self.temperature == 1.0:
            return prediction
        return soften(np.log(np.maximum(prediction.astype(np.float64), EDGE)), 1.0 / self.temperature).astype(
            prediction.dtype
        )

    def decide(self, prediction: NDArray[Any]) -> NDArray[np.int64]:
        """(rows, K) probabilities -> (rows,) the index in `classes` of this task's answer."""
        return np.asarray(prediction.argmax(axis=1))

    def _described(self, labels: Labels) -> str:
        return shares(self.classes, labels)

    def warnings(self, part: str, labels: Labels) -> list[str]:
        occurring = np.bincount(labels[~np.isnan(labels)].astype(np.int64), minlength=len(self.classes))
        strange = [
            f"{name!r} ({count:,})"
            for name, count, trained in zip(self.classes, occurring, self.counts, strict=True)
            if count and not trained
        ]
        if not strange:
            return []
        return [
            f"{part} has labels that no training sample has: {listed(strange)}. Nobody can learn them here, and each "
            f"counts as a miss. Label such training groups, or change `seed` of [data.split]."
        ]

    def _score(self, prediction: NDArray[Any], labels: Labels) -> float | None:
        return macro_f1(self.decide(prediction), labels.astype(np.int64), prediction.shape[1])

    def _metric(self, name: str, prediction: NDArray[Any], labels: Labels) -> float | None:
        if name == "accuracy":
            return float((self.decide(prediction) == labels).mean())
        if name == "mae_classes":
            return float(np.abs(self.decide(prediction) - labels).mean(dtype=np.float64))
        if name == "ece":
            return calibration_error(self.calibrated(prediction).max(axis=1), self.decide(prediction) == labels)
        return super()._metric(name, prediction, labels)

    def _others(self, prediction: Tensor, labels: Tensor) -> dict[str, float | None]:
        # here and not above: it takes a second to import, and most commands measure nothing
        from torchmetrics.functional.classification import multiclass_recall

        rows, truth = prediction.numpy(), labels.numpy()
        guess = torch.from_numpy(self.decide(rows))
        present = np.unique(truth.astype(np.int64)).tolist()
        recall = multiclass_recall(guess, labels.long(), num_classes=rows.shape[1], average="none")
        return {
            # over the classes that occur; the library's own macro mean also counts a class that was only guessed
            "balanced_accuracy": float(recall[present].mean()) if len(present) > 1 else None,
            **{name: self._metric(name, rows, truth) for name in ("accuracy", "mae_classes", "ece")},
        }


def macro_f1(guess: NDArray[np.int64], truth: NDArray[np.int64], count: int) -> float | None:
    """Mean F1 over the classes that occur or were guessed; None where all rows are of one class.

    Args:
        guess, truth: (rows,) indices of `count` classes.
    """
    if (truth == truth[0]).all():
        return None
    hits = np.bincount(truth[guess == truth], minlength=count)
    either = np.bincount(guess, minlength=count) + np.bincount(truth, minlength=count)
    named = either > 0  # a class neither there nor guessed has no F1
    return float((2.0 * hits[named] / either[named]).mean())


class Cumulative(nn.Module):
    """One score, and a threshold for each "beyond class k?" (CORAL, arXiv:1901.07884).

    Shape:
        (batch, width) -> (batch, classes - 1).
    """

    def __init__(self, width: int, outputs: int) -> None:
        super().__init__()
        self.score = nn.Linear(width, 1, bias=False)
        # from likely to unlikely: equal thresholds would all have to part first
        self.beyond = nn.Parameter(torch.linspace(1.0, -1.0, outputs))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.score(x) + self.beyond
        return out


def _as_text(column: pl.Series) -> pl.Series:
    """Class names, trimmed; whole numbers without a point, because a gap turns a column of integers into floats."""
    if column.dtype.is_float():
        column = column.fill_nan(None)
        if (column == column.round()).all() and not column.is_infinite().any():
            column = column.cast(pl.Int64, strict=False)
    text = column.cast(pl.String).str.strip_chars()
    return text.set(text == "", None)


def _is_number(word: str) -> bool:
    try:
        float(word)
    except ValueError:
        return False
    return True
