"""What comes next: a measurement some rows ahead, at several horizons, as quantiles."""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import polars as pl
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from trunkline.config.tasks import TaskConfig
from trunkline.errors import DataError
from trunkline.models.labels import Places
from trunkline.models.tasks.task import Labels, Metric, Samples, Task, known, numbers


class Forecast(Task):
    """Quantiles of `target`, so many rows ahead, from rows up to now only.

    A sample's labels are (2H,): the H values to come, then for each of them the seasonal-naive forecast, which is the
    latest value a whole number of seasons before it that is already known. Both are NaN where they lie outside the
    sample's own group and part.

    Where the target is an input channel too, the head also says how much of its last value and of its value one season
    ago each forecast takes over: the autoregressive path beside the network of LSTNet (Lai et al. 2018,
    arXiv:1703.07015). It starts as the seasonal-naive forecast, so that few rows of history are enough to match it.

    The quantiles are learnt by the pinball loss and put in order in `predict`, which never makes them worse
    (Chernozhukov et al. 2010, arXiv:0704.3649). The point forecast is the quantile nearest to one half.

    `mase` divides the mean absolute error by that of the seasonal-naive forecast of the nearest horizon over the
    training rows (Hyndman and Koehler 2006); below 1 is better than repeating the last season. `skill` compares with
    the naive forecast on the very rows that are scored.
    """

    kind = "forecast"
    primary = "mase"
    METRICS = {  # noqa: RUF012  (declared ClassVar in Task)
        "mase": Metric("of naive", "lower"),
        "rmse": Metric("", "lower"),
        "mae": Metric("", "lower"),
        "pinball": Metric("", "lower"),
        # too wide is wrong as well, but it is the band that is too narrow that somebody relies on
        "coverage": Metric("of 1", "higher"),
        "skill": Metric("of the naive error", "higher"),
    }

    def __init__(self, name: str, config: TaskConfig) -> None:
        super().__init__(name, config)
        self.mean, self.std = 0.0, 1.0  # of the values to come, in training
        self.naive = 1.0  # mean absolute error of the seasonal-naive forecast in training
        self.channel: int | None = None  # of the target among the input channels
        self.unscale = (0.0, 1.0)  # mean and standard deviation that channel was scaled by
        self.rows = 1  # of a sample

    @property
    def metrics(self) -> dict[str, Metric]:
        low, high = self.config.quantiles[0], self.config.quantiles[-1]
        banded = {"coverage": Metric(f"of {high - low:.3g}", "higher")} if low < high else {}
        return {name: metric for name, metric in self.METRICS.items() if name != "coverage"} | banded

    @property
    def shape(self) -> tuple[int, int]:
        """Horizons and quantiles."""
        return len(self.config.horizons), len(self.config.quantiles)

    @property
    def outputs(self) -> int:
        horizons, quantiles = self.shape
        return horizons * quantiles + (2 * horizons if self.channel is not None else 0)

    def read(self, column: pl.Series, where: str) -> Labels:
        remedy = "Correct the value, or leave the cell empty where it was not measured."
        return numbers(self, column, where, remedy).astype(np.float32)

    def bind_inputs(self, samples: Samples) -> None:
        self.rows = samples.window or 1
        self.channel = None
        if self.config.target in samples.channels and samples.scale:  # scaled by regime, it is another quantity
            self.channel = samples.channels.index(self.config.target)
            self.unscale = samples.scale[self.channel]

    def labels_for_samples(self, labels: Labels, places: Places) -> Labels:
        """(rows,) values -> (n, 2H): those to come, and the naive forecast of each."""
        ends, first, last, _ = places
        ahead = np.array(self.config.horizons, dtype=np.int64)
        rows = ends[:, None] + np.concatenate([ahead, ahead - self._naive_distance()])  # (n, 2H)
        inside = (rows >= first[ends][:, None]) & (rows <= last[ends][:, None])
        values = labels[np.where(inside, rows, 0)] if len(labels) else np.empty(rows.shape, np.float32)
        return np.where(inside, values, np.float32(np.nan))

    def _naive_distance(self) -> NDArray[np.int64]:
        """(H,) how far before each forecast value the naive one lies: whole seasons, and not in the future."""
        season = self.config.season
        return np.array([season * math.ceil(horizon / season) for horizon in self.config.horizons], dtype=np.int64)

    def unsupported(self, rows: int) -> str:
        farthest = max(self.config.horizons)
        if rows > farthest:
            return ""
        fits = f"the farthest horizon that fits is {rows - 1}" if rows > 1 else "no horizon fits"
        return (
            f"a horizon of {farthest} rows is longer than the data: the longest group has {rows} rows, so {fits}. "
            f"Lower `horizons` of [tasks.{self.name}], or give longer groups or another [data.split]."
        )

    def scored_mask(self, labels: Labels) -> NDArray[np.bool_]:
        return known(labels[:, : self.shape[0]])

    def _described(self, labels: Labels) -> str:
        return super()._described(labels[:, : self.shape[0]])

    def fit(self, labels: Labels) -> None:
        future, naive = np.split(labels.astype(np.float64), 2, axis=1)
        present = future[~np.isnan(future)]
        if not len(present):
            raise self._no_labels()
        nearest = int(np.argmin(self.config.horizons))
        miss = np.abs(future[:, nearest] - naive[:, nearest])
        miss = miss[~np.isnan(miss)]
        if not len(miss):
            raise DataError(
                f"Task {self.name!r}: `season` is {self.config.season} rows, and no training row has both a value "
                f"{self.config.horizons[nearest]} rows ahead and one a season before that. Lower `season` of "
                f"[tasks.{self.name}] to what the groups hold more than once."
            )
        self.mean = float(present.mean())
        spread = float(present.std())
        # equal values have no scale of their own; dividing by their rounding noise would blow the loss up
        self.std = spread if spread > 1e-6 * max(1.0, abs(self.mean)) else 1.0
        # a season that repeats to the digit leaves nothing to compare with: the spread of the values stands in
        self.naive = float(miss.mean()) if miss.mean() > 1e-6 * self.std else self.std

    def state(self) -> dict[str, object]:
        return {
            "kind": self.kind,
            "mean": self.mean,
            "std": self.std,
            "naive": self.naive,
            "place": self.channel,
            "unscale": list(self.unscale),
            "rows": self.rows,
        }

    def load_state(self, state: Mapping[str, Any]) -> None:
        loaded = self._loaded(state)
        self.mean, self.std, self.naive = (float(loaded[key]) for key in ("mean", "std", "naive"))
        self.channel = None if loaded["place"] is None else int(loaded["place"])
        self.unscale = (float(loaded["unscale"][0]), float(loaded["unscale"][1]))
        self.rows = int(loaded["rows"])

    def head(self, width: int) -> nn.Module:
        head = nn.Linear(width, self.outputs)
        if self.channel is not None:
            horizons, quantiles = self.shape
            reached = torch.tensor(self._seen() >= 0)
            with torch.no_grad():
                head.weight[horizons * quantiles :] = 0.0
                head.bias[horizons * quantiles :] = torch.cat([~reached, reached]).float()
        return head

    def _seen(self) -> NDArray[np.int64]:
        """(H,) where in a sample the naive forecast lies; negative where that is before the sample."""
        return self.rows - 1 + np.array(self.config.horizons, dtype=np.int64) - self._naive_distance()

    def combine_with_inputs(self, output: Tensor, x: Tensor) -> Tensor:
        """Add the autoregressive path: (batch, outputs) -> (batch, H * Q), in training standard deviations."""
        if self.channel is None:
            return output
        horizons, quantiles = self.shape
        series = x[:, self.channel] if x.ndim == 3 else x[:, self.channel, None]  # (batch, time)
        mean, std = self.unscale
        series = ((series.float() * std + mean - self.mean) / self.std).nan_to_num(0.0)
        seen = self._seen()
        rows = torch.from_numpy(np.maximum(seen, 0)).to(x.device)
        season = torch.where(torch.from_numpy(seen >= 0).to(x.device), series[:, rows], 0.0)  # (batch, H)
        takes_last, takes_season = output[:, horizons * quantiles :].view(-1, 2, horizons).unbind(dim=1)
        path = takes_last * series[:, -1:] + takes_season * season
        return (output[:, : horizons * quantiles].view(-1, horizons, quantiles) + path[..., None]).flatten(1)

    def loss(self, output: Tensor, labels: Tensor) -> Tensor:
        """Pinball over horizons and quantiles: output (batch, H * Q), labels (batch, 2H) -> ()."""
        horizons, quantiles = self.shape
        truth = labels[:, :horizons]
        missing = truth.isnan()
        truth = (torch.where(missing, self.mean, truth) - self.mean) / self.std
        miss = truth[..., None] - output.float().view(-1, horizons, quantiles)
        level = torch.tensor(self.config.quantiles, device=output.device)
        losses = torch.maximum(level * miss, (level - 1.0) * miss).mean(dim=2)  # (batch, H)
        return torch.where(missing, 0.0, losses).sum() / (~missing).sum().clamp(min=1)

    def predict(self, output: Tensor) -> NDArray[np.float32]:
        """(batch, H * Q) -> (batch, H, Q) in the target's unit, quantiles ascending."""
        values = output.detach().float().view(-1, *self.shape).sort(dim=2).values
        return (values.cpu().numpy() * self.std + self.mean).astype(np.float32)

    def _point(self, prediction: NDArray[Any]) -> NDArray[np.float64]:
        """(n, H, Q) -> (n, H)."""
        middle = int(np.argmin(np.abs(np.array(self.config.quantiles) - 0.5)))
        return prediction[:, :, middle].astype(np.float64)

    def _score(self, prediction: NDArray[Any], labels: Labels) -> float:
        truth = labels[:, : self.shape[0]]
        present = ~np.isnan(truth)
        return float(np.abs(self._point(prediction) - truth)[present].mean() / self.naive)

    def _others(self, prediction: Tensor, labels: Tensor) -> dict[str, float | None]:
        quantiles = prediction.numpy()
        truth, naive = np.split(labels.numpy(), 2, axis=1)
        present = ~np.isnan(truth)
        miss = self._point(quantiles) - truth
        level = np.array(self.config.quantiles)
        short = truth[..., None] - quantiles
        comparable = present & ~np.isnan(naive)
        usual = np.abs(naive - truth)[comparable].mean() if comparable.any() else 0.0
        return {
            "rmse": float(np.sqrt(np.square(miss[present]).mean())),
            "mae": float(np.abs(miss[present]).mean()),
            "pinball": float(np.maximum(level * short, (level - 1.0) * short)[present].mean()),
            "coverage": float(((quantiles[:, :, 0] <= truth) & (truth <= quantiles[:, :, -1]))[present].mean()),
            "skill": float(1.0 - np.abs(miss[comparable]).mean() / usual) if usual > 0.0 else None,
        }
