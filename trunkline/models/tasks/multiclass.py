"""One of several classes: a fault's name, or a stage of wear on an ordered scale."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import polars as pl
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from trunkline.config import TaskConfig
from trunkline.errors import ConfigError, DataError, nearest
from trunkline.models.tasks.task import Labels, Metric, Task, effective_number

MOST = 256  # classes found in a column; more of them look like a measurement
BOUND = 10.0  # largest emphasis of a rare class beside the commonest


class Multiclass(Task):
    """Labels are words or whole numbers; `classes` in site.toml, or else every distinct value `read` first sees.

    Rare classes count more, by the effective number of samples (Cui et al. 2019, arXiv:1901.05555), at most tenfold.
    The probabilities are those of this weighted loss.

    With `ordinal` the classes have an order (`classes` as listed, else sorted: numbers by value), and the head answers
    K - 1 questions "beyond class k?" from one shared score (CORAL, Cao et al. 2020, arXiv:1901.07884).
    """

    kind = "multiclass"
    primary = "macro_f1"
    METRICS = {  # noqa: RUF012  (declared ClassVar in Task)
        "macro_f1": Metric("of 1", "higher"),
        "accuracy": Metric("of 1", "higher"),
        "balanced_accuracy": Metric("of 1", "higher"),
        "mae_classes": Metric("classes", "lower"),
    }

    def __init__(self, name: str, config: TaskConfig) -> None:
        super().__init__(name, config)
        self.classes: tuple[str, ...] = config.classes or ()
        if config.classes is not None and len(set(config.classes)) != max(len(config.classes), 2):
            raise ConfigError(
                f"[tasks.{name}]: `classes` should name two or more different classes. Found {list(config.classes)}. "
                f"Leave it out to use every value of column `{config.target}`."
            )
        self.counts: tuple[int, ...] = (1,) * len(self.classes)

    @property
    def metrics(self) -> dict[str, Metric]:
        return {name: metric for name, metric in self.METRICS.items() if name != "mae_classes" or self.config.ordinal}

    @property
    def outputs(self) -> int:
        if not self.classes:
            raise DataError(f"Task {self.name!r}: its classes are not known yet. Read its label column first.")
        return len(self.classes) - self.config.ordinal

    def read(self, column: pl.Series, where: str) -> Labels:
        text = _as_text(column)
        found = [word for word in text.unique(maintain_order=True).to_list() if word is not None]
        if not self.classes:
            self.classes = self._discovered(found, column, where)
            self.counts = (1,) * len(self.classes)
        codes = {word: float(place) for place, word in enumerate(self.classes)}
        if unknown := [word for word in found if word not in codes]:
            row = int((text == unknown[0]).arg_max() or 0)
            raise self._bad(
                column, where, row, column[row], f"one of {', '.join(self.classes)}{nearest(unknown[0], self.classes).rstrip('.')}",
                f"Correct it, or list it under `classes` of [tasks.{self.name}].",
            )  # fmt: skip
        values = text.replace_strict([None, *codes], [None, *codes.values()], return_dtype=pl.Float32)
        return np.array(values.fill_null(float("nan")).to_numpy(), dtype=np.float32)

    def _discovered(self, found: list[str], column: pl.Series, where: str) -> tuple[str, ...]:
        if not found:
            raise DataError(
                f"{where}: column `{column.name}` of task {self.name!r} is empty, so its classes are not known. "
                f"List them under `classes` of [tasks.{self.name}], or take the task out of site.toml."
            )
        if len(found) > MOST:
            raise DataError(
                f"{where}: column `{column.name}` of task {self.name!r} has {len(found)} different values; at most "
                f"{MOST} are taken for classes. A measurement is kind = 'regression'; otherwise list `classes`."
            )
        whole = all(word.removeprefix("-").isdecimal() for word in found)
        return tuple(sorted(found, key=int if whole else None))

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
        counts = np.array(self.counts, dtype=np.float64)
        weight = 1.0 / effective_number(counts)
        weight = np.minimum(weight, BOUND * weight.min())
        return tuple((weight * counts.sum() / (weight * counts).sum()).tolist())

    def state(self) -> dict[str, object]:
        return {"kind": self.kind, "classes": list(self.classes), "counts": list(self.counts)}

    def load_state(self, state: Mapping[str, Any]) -> None:
        loaded = self._loaded(state)
        self.classes, self.counts = tuple(loaded["classes"]), tuple(loaded["counts"])

    def head(self, width: int) -> nn.Module:
        return Cumulative(width, self.outputs) if self.config.ordinal else super().head(width)

    def loss(self, output: Tensor, labels: Tensor) -> Tensor:
        missing = labels.isnan()
        output = output.float()
        truth = torch.where(missing, 0.0, labels).long()
        if self.config.ordinal:
            beyond = (truth[:, None] > torch.arange(self.outputs, device=output.device)).float()  # (batch, K - 1)
            each = (beyond * F.softplus(-output) + (1.0 - beyond) * F.softplus(output)).mean(dim=1)
        else:
            each = -output.log_softmax(dim=1).gather(1, truth[:, None])[:, 0]
        each = each * torch.tensor(self.emphasis, device=output.device)[truth]
        return torch.where(missing, 0.0, each).sum() / (~missing).sum().clamp(min=1)

    def predict(self, output: Tensor) -> NDArray[np.float32]:
        """(batch, outputs) -> (batch, K) probabilities, also where `ordinal`."""
        output = output.detach().float()
        if self.config.ordinal:
            # each "beyond k?" is at most as likely as the one before, so that no class gets less than nothing
            beyond = output.sigmoid().cummin(dim=1).values
            edge = torch.ones_like(beyond[:, :1])
            beyond = torch.cat([edge, beyond, torch.zeros_like(edge)], dim=1)  # (batch, K + 1)
            return (beyond[:, :-1] - beyond[:, 1:]).cpu().numpy()
        return output.softmax(dim=1).cpu().numpy()

    def _score(self, prediction: NDArray[Any], labels: Labels) -> float | None:
        count = prediction.shape[1]
        guess, truth = prediction.argmax(axis=1), labels.astype(np.int64)
        if (truth == truth[0]).all():
            return None
        hits = np.bincount(truth[guess == truth], minlength=count)
        either = np.bincount(guess, minlength=count) + np.bincount(truth, minlength=count)
        named = either > 0  # a class neither there nor guessed has no F1
        return float((2.0 * hits[named] / either[named]).mean())

    def _others(self, prediction: Tensor, labels: Tensor) -> dict[str, float | None]:
        # here and not above: it takes a second to import, and most commands measure nothing
        from torchmetrics.functional import mean_absolute_error
        from torchmetrics.functional.classification import multiclass_accuracy, multiclass_recall

        count = prediction.shape[1]
        guess, truth = prediction.argmax(dim=1), labels.long()
        present = np.unique(truth.numpy()).tolist()
        recall = multiclass_recall(guess, truth, num_classes=count, average="none")
        return {
            "accuracy": float(multiclass_accuracy(guess, truth, num_classes=count, average="micro")),
            # over the classes that occur; the library's own macro mean also counts a class that was only guessed
            "balanced_accuracy": float(recall[present].mean()) if len(present) > 1 else None,
            "mae_classes": float(mean_absolute_error(guess.double(), labels)),
        }


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
