"""A number in the label's own unit: remaining life, wear, efficiency."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import polars as pl
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from trunkline.config.tasks import TaskConfig
from trunkline.models.tasks.task import Labels, Metric, Task, numbers


class Regression(Task):
    """Labels are learnt as standard deviations from the training mean, and predicted in their own unit.

    With `cap` every label above it counts as the cap, in training and in every metric but `rmse_uncapped`: far from
    its end a machine shows no wear, and no model can tell 200 cycles from 300 (Heimes 2008, PHM conference).

    `loss`: "huber" (beyond one standard deviation linear), "mse", or "pinball" for the `quantile` (Koenker and
    Bassett 1978).

    `intercept = false` is for what is zero when its inputs are (a balance, a flow): labels are divided and not shifted,
    and the head has no bias.

    `nasa_score`, for the unit "cycles" only, is the sum over rows of exp(-d/13) - 1 for early (d < 0) and exp(d/10) - 1
    for late predictions, d = predicted - true cycles (Saxena et al. 2008, PHM conference).
    """

    kind = "regression"
    primary = "rmse"
    METRICS = {  # noqa: RUF012  (declared ClassVar in Task)
        "rmse": Metric("", "lower"),
        "rmse_uncapped": Metric("", "lower"),
        "mae": Metric("", "lower"),
        "r2": Metric("of variance", "higher"),
        "nasa_score": Metric("points", "lower"),
    }

    def __init__(self, name: str, config: TaskConfig) -> None:
        super().__init__(name, config)
        self.mean = 0.0
        self.std = 1.0

    @property
    def metrics(self) -> dict[str, Metric]:
        return {
            name: metric
            for name, metric in self.METRICS.items()
            if name != "nasa_score" or self.config.unit == "cycles"
        }

    @property
    def outputs(self) -> int:
        return 1

    def head(self, width: int) -> nn.Module:
        return nn.Linear(width, self.outputs, bias=self.config.intercept)

    def read(self, column: pl.Series, where: str) -> Labels:
        remedy = "Correct the value, or leave the cell empty where the label is unknown."
        return numbers(self, column, where, remedy).astype(np.float32)

    def fit(self, labels: Labels) -> None:
        present = self._capped(labels[~np.isnan(labels)].astype(np.float64))
        if not len(present):
            raise self._no_labels()
        self.mean = float(present.mean()) if self.config.intercept else 0.0
        spread = float(present.std() if self.config.intercept else np.sqrt(np.mean(np.square(present))))
        # equal labels have no scale of their own; dividing by their rounding noise would blow the loss up
        self.std = spread if spread > 1e-6 * max(1.0, abs(self.mean)) else 1.0

    def state(self) -> dict[str, object]:
        return {"kind": self.kind, "mean": self.mean, "std": self.std}

    def load_state(self, state: Mapping[str, Any]) -> None:
        loaded = self._loaded(state)
        self.mean, self.std = float(loaded["mean"]), float(loaded["std"])

    def loss(self, output: Tensor, labels: Tensor) -> Tensor:
        missing = labels.isnan()
        cap = self.config.cap
        truth = torch.where(missing, self.mean, labels if cap is None else labels.clamp(max=cap))
        miss = torch.where(missing, 0.0, (truth - self.mean) / self.std - output[:, 0].float())  # truth minus output
        if self.config.loss in (None, "huber"):
            losses = F.huber_loss(miss, torch.zeros_like(miss), reduction="none")
        elif self.config.loss == "mse":
            losses = miss.square()
        else:
            losses = torch.maximum(self.config.quantile * miss, (self.config.quantile - 1.0) * miss)
        return losses.sum() / (~missing).sum().clamp(min=1)

    def loss_numbers(self) -> dict[str, Tensor]:
        return {"mean": torch.tensor(self.mean), "std": torch.tensor(self.std)}

    def scores(
        self, outputs: Tensor, labels: NDArray[Any], numbers: Mapping[str, Tensor]
    ) -> NDArray[np.float64] | None:
        if self.primary != "rmse":
            return None
        mean, std = (numbers[name].cpu().numpy()[:, None] for name in ("mean", "std"))
        values = self._capped(outputs[..., 0].float().cpu().numpy() * std + mean).astype(np.float64)
        missing = np.isnan(labels)
        square = np.where(missing, 0.0, np.square(values - self._capped(labels)))
        count = (~missing).sum(axis=1)
        mean_square = np.divide(square.sum(axis=1), count, out=np.full(len(count), np.nan), where=count > 0)
        rmse: NDArray[np.float64] = np.sqrt(mean_square)
        return rmse

    def predict(self, output: Tensor) -> NDArray[np.float32]:
        """(batch, 1) -> (batch,), in the label's unit and never above the cap."""
        values = output.detach()[:, 0].float().cpu().numpy() * self.std + self.mean
        return self._capped(values).astype(np.float32)

    def _capped(self, values: NDArray[Any]) -> NDArray[Any]:
        return values if self.config.cap is None else np.minimum(values, self.config.cap)

    def _score(self, prediction: NDArray[Any], labels: Labels) -> float:
        miss = prediction.astype(np.float64) - self._capped(labels)
        return float(np.sqrt(np.mean(np.square(miss))))

    def _others(self, prediction: Tensor, labels: Tensor) -> dict[str, float | None]:
        # here and not above: it takes a second to import, and most commands measure nothing
        from torchmetrics.functional import mean_absolute_error, mean_squared_error, r2_score

        truth = labels if self.config.cap is None else labels.clamp(max=self.config.cap)
        late = prediction - truth
        # torchmetrics takes sums of squares below 1e-4 for nothing, whatever the unit: what it sees has a spread of one
        middle, spread = truth.mean(), (truth - truth.mean()).abs().max()
        return {
            "rmse_uncapped": float(mean_squared_error(prediction, labels, squared=False)),
            "mae": float(mean_absolute_error(prediction, truth)),
            "r2": float(r2_score((prediction - middle) / spread, (truth - middle) / spread))
            if truth.min() < truth.max()
            else None,
            "nasa_score": float(torch.where(late < 0, torch.expm1(-late / 13.0), torch.expm1(late / 10.0)).sum()),
        }
