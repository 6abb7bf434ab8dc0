"""Z-scores per channel and operating regime, learnt from training rows and nothing else."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trunkline.client.data.preprocess.regimes import Regimes
from trunkline.errors import SensorMismatch

FLAT = 1e-13  # a spread below this share of the mean is rounding, not signal
FARTHEST = 1e6  # scaled values end here, so that a spike beyond float32 stays a number
Floats = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Scaler:
    """What a plant's training rows look like; private like them.

    Args:
        channels: inputs in order; "age" last when the site asks for it.
        regimes: how settings map to a row of the arrays below.
        count: (regimes, channels) training values that were there.
        mean: (regimes, channels) in the channel's own unit; 0 for "age", which is only divided.
        std: (regimes, channels); 0 where the channel does not move, whose scaled value is then 0.
    """

    channels: tuple[str, ...]
    regimes: Regimes
    count: NDArray[np.int64]
    mean: Floats
    std: Floats

    def transform(self, values: Floats, settings: Floats) -> NDArray[np.float32]:
        """Scale raw rows as training rows were.

        Shape:
            values (rows, channels), NaN where silent; settings (rows, settings) -> (rows, channels) float32, NaN kept.

        Raises:
            SensorMismatch: `values` has another number of columns than the scaler knows.
        """
        if values.shape[1] != len(self.channels):
            raise SensorMismatch(
                f"rows with {values.shape[1]} columns came; this site has {len(self.channels)}: {', '.join(self.channels)}."
            )
        regime = self.regimes.of(settings)
        columns = [
            scale(values[:, index], self.mean[:, index], self.std[:, index], regime) for index in range(values.shape[1])
        ]
        return np.stack(columns, axis=1) if columns else np.zeros((len(values), 0), dtype=np.float32)

    def to_dict(self) -> dict[str, Any]:
        """JSON-able, exact: `Scaler.from_dict(json.loads(json.dumps(scaler.to_dict())))` scales alike to the last bit."""
        return {
            "channels": list(self.channels),
            "regimes": self.regimes.to_dict(),
            "count": self.count.tolist(),
            "mean": self.mean.tolist(),
            "std": self.std.tolist(),
        }

    @classmethod
    def from_dict(cls, state: Mapping[str, Any]) -> "Scaler":
        channels = tuple(state["channels"])
        shape = (-1, len(channels))
        return cls(
            channels=channels,
            regimes=Regimes.from_dict(state["regimes"]),
            count=np.array(state["count"], dtype=np.int64).reshape(shape),
            mean=np.array(state["mean"], dtype=np.float64).reshape(shape),
            std=np.array(state["std"], dtype=np.float64).reshape(shape),
        )


def moments(values: Floats, regime: NDArray[np.int64], regimes: int) -> tuple[NDArray[np.int64], Floats, Floats]:
    """Count, mean and standard deviation (population) of a channel's training values per regime, NaN left out.

    A regime in which the channel never spoke takes the figures of all rows.
    """
    heard = np.isfinite(values)
    if not heard.all():
        values, regime = values[heard], regime[heard]
    count = np.bincount(regime, minlength=regimes)
    if not len(values):
        return count, np.zeros(regimes), np.zeros(regimes)
    # sums are taken around a value of the same regime: a constant then has a spread of exactly 0, whatever its size
    around = np.full(regimes, values[0])
    around[regime[::-1]] = values[::-1]
    shifted = values - around[regime]
    at_least_one = np.maximum(count, 1)
    shift = np.bincount(regime, weights=shifted, minlength=regimes) / at_least_one
    spread = np.bincount(regime, weights=(shifted - shift[regime]) ** 2, minlength=regimes) / at_least_one
    mean, std = around + shift, np.sqrt(spread)
    if (silent := count == 0).any():
        mean[silent], std[silent] = values.mean(), values.std()
    std[std <= FLAT * np.abs(mean)] = 0.0
    return count, mean, std


def scale(values: Floats, mean: Floats, std: Floats, regime: NDArray[np.int64]) -> NDArray[np.float32]:
    """(value - mean) / std of each row's regime; (rows,) -> (rows,) float32."""
    inverse = np.divide(1.0, std, out=np.zeros_like(std), where=std > 0.0)
    scaled = values - mean[regime]
    scaled *= inverse[regime]
    np.clip(scaled, -FARTHEST, FARTHEST, out=scaled)
    return scaled.astype(np.float32)
