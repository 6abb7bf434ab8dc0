"""One of several grades of one condition: how worn a valve is, how much a pump leaks."""

from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray
from torch import Tensor

from trunkline.errors import DataError
from trunkline.models.tasks.multiclass import Multiclass, macro_f1
from trunkline.models.tasks.task import Labels, Metric, listed


class Ordinal(Multiclass):
    """Labels are grades: `classes` in their order, or numbers, which order themselves.

    The head answers K - 1 questions "beyond grade k?" from one shared score (CORAL, Cao et al. 2020, arXiv:1901.07884).
    The answer is the number of questions that are more likely yes than no, which is the median of the predicted
    distribution and so the grade with the smallest expected error in grades.

    The primary metric is `mae_grades`, how many grades the answer is off on average. Cohen's quadratic weighted kappa
    (1968), `qwk`, is reported beside it and can take its place: it says how much better than chance the grading is, but
    it has no value where all rows are of one grade, and it depends on how often each grade occurs, so that two plants
    with equally good models differ in it.
    """

    kind = "ordinal"
    primary = "mae_grades"
    METRICS = {  # noqa: RUF012  (declared ClassVar in Task)
        "mae_grades": Metric("grades", "lower"),
        "qwk": Metric("of 1", "higher"),
        "accuracy": Metric("of 1", "higher"),
        "macro_f1": Metric("of 1", "higher"),
    }

    @property
    def ordered(self) -> bool:
        return True

    def _discover_classes(self, words: list[str], column: pl.Series, where: str) -> tuple[str, ...]:
        words = list(super()._discover_classes(words, column, where))
        try:
            return tuple(sorted(words, key=float))
        except ValueError:
            raise DataError(
                f"{where}: column `{column.name}` of task {self.name!r} holds words, {listed(words)}, whose order nobody "
                f"knows. List them under `classes` of [tasks.{self.name}], from the least to the greatest."
            ) from None

    def decide(self, prediction: NDArray[Any]) -> NDArray[np.int64]:
        """(rows, K) probabilities -> (rows,) the median grade, an index in `classes`."""
        beyond = 1.0 - np.cumsum(prediction[:, :-1], axis=1, dtype=np.float64)  # (rows, K - 1)
        return np.asarray((beyond > 0.5).sum(axis=1))

    def _score(self, prediction: NDArray[Any], labels: Labels) -> float | None:
        return float(np.abs(self.decide(prediction) - labels).mean(dtype=np.float64))

    def _metric(self, name: str, prediction: NDArray[Any], labels: Labels) -> float | None:
        guess = self.decide(prediction)
        if name == "qwk":
            return quadratic_kappa(guess, labels)
        if name == "macro_f1":
            return macro_f1(guess, labels.astype(np.int64), prediction.shape[1])
        return super()._metric(name, prediction, labels)

    def _others(self, prediction: Tensor, labels: Tensor) -> dict[str, float | None]:
        return {
            name: self._metric(name, prediction.numpy(), labels.numpy()) for name in ("qwk", "accuracy", "macro_f1")
        }


def quadratic_kappa(guess: NDArray[np.int64], truth: NDArray[Any]) -> float | None:
    """Cohen's kappa with quadratic weights (1968): 1 is perfect, 0 what guessing at the same rates would reach.

    It is 1 minus the mean squared distance over that of a guess and a truth drawn apart from each other. None where
    both are always the same grade.

    Args:
        guess, truth: (rows,) grades.
    """
    guessed, true = guess.astype(np.float64), truth.astype(np.float64)
    disagreement = guessed.var() + true.var() + (guessed.mean() - true.mean()) ** 2
    return float(1.0 - np.square(guessed - true).mean() / disagreement) if disagreement > 0.0 else None
