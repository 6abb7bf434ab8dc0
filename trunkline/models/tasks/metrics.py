"""The last third of a task: where it decides, and how its predictions are measured."""

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar, Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from trunkline.config.tasks import TaskConfig
from trunkline.errors import ConfigError, nearest
from trunkline.models.labels import Labels, known


class Metric(NamedTuple):
    """How a number of the report reads."""

    unit: str  # "" = the label's own unit
    better: Literal["lower", "higher"]


class Metrics(ABC):
    """How a task's predictions are calibrated and scored."""

    kind: ClassVar[str]
    METRICS: ClassVar[dict[str, Metric]]  # every metric this kind knows
    primary: str  # of the kind; `metric` in site.toml puts another one in its place for one task
    name: str
    config: TaskConfig
    trouble: str  # what `calibrate` found that a person should read

    def _choose_primary(self) -> None:
        """Take over `metric` of site.toml.

        Raises:
            ConfigError: this kind has no such metric.
        """
        if self.config.metric:
            if self.config.metric not in self.METRICS:
                raise ConfigError(
                    f"[tasks.{self.name}]: `metric = {self.config.metric!r}` is none of kind {self.kind!r}"
                    f"{nearest(self.config.metric, self.METRICS)} Known: {', '.join(self.METRICS)}."
                )
            self.primary = self.config.metric

    @property
    def metrics(self) -> dict[str, Metric]:
        """The metrics of this task: those of its kind that its configuration gives a meaning."""
        return self.METRICS

    def scored_mask(self, labels: Labels) -> NDArray[np.bool_]:
        """(rows,) which samples count in the metrics; a label may carry more numbers than those that are scored."""
        return known(labels)

    def calibrate(self, prediction: NDArray[Any], labels: Labels) -> None:
        """Choose where this task decides, from one model's VALIDATION rows; nothing where a kind has no such choice.

        Two models decide at two places: calibrate a copy of the task for each. What a person should read about it (no
        validation row is ever called) is left in `trouble`.

        Args:
            prediction: what `predict` gave, one row a sample.
            labels: (rows,) or (rows, k), NaN where missing.
        """
        return

    def calibrated(self, prediction: NDArray[Any]) -> NDArray[Any]:
        """The same predictions as probabilities that mean what they say, after `calibrate`; the order of any two stays.

        `score` and `measure` take what `predict` gave, and do this themselves where a metric asks for it.
        """
        return prediction

    @abstractmethod
    def _score(self, prediction: NDArray[Any], labels: Labels) -> float | None:
        """The kind's own primary metric over rows that all have a label, at least one; a bootstrap calls it thousands of times."""

    @abstractmethod
    def _others(self, prediction: Tensor, labels: Tensor) -> dict[str, float | None]:
        """The other metrics over the same rows, float64."""

    def _metric(self, name: str, prediction: NDArray[Any], labels: Labels) -> float | None:
        """Any one metric over such rows. A kind answers here without `_others` what is quick to compute alone."""
        if name == type(self).primary:
            return self._score(prediction, labels)
        return self._others(*_doubles(prediction, labels))[name]

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

    def scores(
        self, outputs: Tensor, labels: NDArray[Any], numbers: Mapping[str, Tensor]
    ) -> NDArray[np.float64] | None:
        """`score` of many sites at once, NaN where it is None; None where there is no quicker way than one by one.

        Shape:
            outputs (sites, rows, outputs), labels (sites, rows, ...) with NaN where missing, numbers (sites, ...) -> (sites,).
        """
        return None

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

    def _never_called(self, rows: int, threshold: float) -> str:
        return (
            f"none of {rows} validation samples reaches its threshold of {threshold:.3g}, so it would never say yes. Let "
            f"validation have positive labels (other `seed` or more `validation` under [data.split]), or judge it by a "
            f"`metric` that needs no threshold."
        )


def _doubles(prediction: NDArray[Any], labels: Labels) -> tuple[Tensor, Tensor]:
    return torch.from_numpy(prediction.astype(np.float64)), torch.from_numpy(labels.astype(np.float64))


def _finite(value: float | None) -> float | None:
    return float(value) if value is not None and math.isfinite(value) else None
