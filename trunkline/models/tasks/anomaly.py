"""Is this normal? Learnt from normal rows alone, because few plants have enough failures to learn from."""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import polars as pl
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from trunkline.config.tasks import TaskConfig
from trunkline.errors import DataError
from trunkline.models.labels import Places
from trunkline.models.tasks.binary import Binary
from trunkline.models.tasks.task import Labels, Metric, Samples, Task

SEGMENTS = 16  # a window is rebuilt as at most this many averages over time; finer detail is mostly noise
REBUILT = 512  # numbers rebuilt at most, so that a thousand channels cost no more than a few
LATEST = 4  # it is judged by the last quarter of them: an alarm should end with its cause, not a window later
LEAST = 10  # flagged validation rows below which the threshold is not chosen by them
MOST_ALARMS = 0.5  # share of normal validation rows above a cut that was chosen for its F1
DAY = 86_400.0
FLAG, TOUCHED, SEGMENT, TIME = range(4)  # columns of the labels


class Anomaly(Task):
    """A score that is large where a sample is not like the normal ones of training, and a threshold for it.

    The column, where there is one, holds 0 and 1 (or false/true, no/yes); an empty cell counts as normal in training
    and not at all in the metrics. A training sample with a flagged row anywhere in its window teaches nothing.

    The head is an autoencoder: a bottleneck of `latent` numbers, from which it rebuilds the sample. Two distances
    are measured, each in the units of its own scatter over the normal training samples: of what could not be rebuilt of
    the latest rows (as Q or SPE), and of the latent numbers (as Hotelling's T2); both as in multivariate process
    monitoring (Jackson and Mudholkar 1979). The score is the larger of the two, 1 at the 99th percentile of training.

    A sample's labels are (4,): its flag; whether any row of its window is flagged; the group it lies in; and its time
    since that group's first row, in seconds, or in rows where `order` is no time.
    """

    kind = "anomaly"
    decision_keys = ("threshold",)
    primary = "f1"
    fits_outputs = True
    METRICS = {  # noqa: RUF012  (declared ClassVar in Task)
        "f1": Metric("of 1", "higher"),
        "event_f1": Metric("of 1", "higher"),
        "false_alarms_per_day": Metric("a day", "lower"),
        "false_alarms_per_1000_rows": Metric("per 1000 rows", "lower"),
        "false_alarm_rate": Metric("%", "lower"),
        "missed_alarm_rate": Metric("%", "lower"),
        "auroc": Metric("of 1", "higher"),
    }

    def __init__(self, name: str, config: TaskConfig) -> None:
        super().__init__(name, config)
        self.channels, self.segments, self.rows = 1, 1, 1
        self.clock = False
        self.scatter: tuple[Scatter, Scatter] | None = None  # of what is left over and of the latent numbers
        self.threshold: float | None = None

    @property
    def metrics(self) -> dict[str, Metric]:
        other = "false_alarms_per_1000_rows" if self.clock else "false_alarms_per_day"
        return {name: metric for name, metric in self.METRICS.items() if name != other}

    @property
    def outputs(self) -> int:
        return self.channels * self.segments + self.config.latent

    def bind_inputs(self, samples: Samples) -> None:
        self.channels, self.rows, self.clock = len(samples.channels), samples.window or 1, samples.clock
        self.segments = max(1, min(SEGMENTS, self.rows, REBUILT // self.channels))

    def read_from(self, frame: pl.DataFrame, where: str) -> Labels:
        if not self.config.target:
            return np.full(frame.height, np.nan, np.float32)
        return super().read_from(frame, where)

    def read(self, column: pl.Series, where: str) -> Labels:
        reader = Binary(self.name, TaskConfig(kind="binary", target=self.config.target))
        labels = reader.read(column, where)
        if reader.words:  # two words have no order that says which of them is the fault
            row = int((column.cast(pl.String).str.strip_chars() == reader.words[-1]).arg_max() or 0)
            remedy = "Write 1 where something is wrong, and leave the cell empty where nobody knows."
            raise self._bad(column, where, row, column[row], "0 or 1, true or false, yes or no", remedy)
        return labels

    def labels_for_samples(self, labels: Labels, places: Places) -> Labels:
        """(rows,) flags -> (n, 4)."""
        ends, first, _, order = places
        flagged = np.concatenate([[0], np.cumsum(labels == 1.0)])
        start = first[ends]
        sample_labels = np.empty((len(ends), 4), np.float32)
        sample_labels[:, FLAG] = labels[ends]
        sample_labels[:, TOUCHED] = flagged[ends + 1] > flagged[np.maximum(start, ends - self.rows + 1)]
        sample_labels[:, SEGMENT] = np.unique(start, return_inverse=True)[1]
        sample_labels[:, TIME] = order[ends] - order[start] if self.clock and order is not None else ends - start
        return sample_labels

    def scored_mask(self, labels: Labels) -> NDArray[np.bool_]:
        scored: NDArray[np.bool_] = ~np.isnan(labels[:, FLAG])
        return scored

    def fit(self, labels: Labels) -> None:
        if not len(labels) or np.isnan(labels[:, TOUCHED]).all():
            raise self._no_labels()
        if not (labels[:, TOUCHED] == 0.0).any():
            raise DataError(
                f"Task {self.name!r}: every training sample holds a row flagged in {self._column()}, so there is "
                f"nothing normal to learn from. Add groups without anomalies, shorten `window`, or take "
                f"[tasks.{self.name}] out of site.toml."
            )

    def state(self) -> dict[str, object]:
        return {
            "kind": self.kind,
            "channels": self.channels,
            "segments": self.segments,
            "rows": self.rows,
            "clock": self.clock,
            "scatter": [scatter.state() for scatter in self.scatter or ()],
            "threshold": self.threshold,
        }

    def load_state(self, state: Mapping[str, Any]) -> None:
        loaded = self._loaded(state)
        self.channels, self.segments, self.rows = (int(loaded[key]) for key in ("channels", "segments", "rows"))
        self.clock = bool(loaded["clock"])
        scatters = [Scatter.of_state(stored) for stored in loaded["scatter"]]
        self.scatter = (scatters[0], scatters[1]) if scatters else None
        self.threshold = None if loaded["threshold"] is None else float(loaded["threshold"])

    def head(self, width: int) -> nn.Module:
        return Bottleneck(width, self.config.latent, self.channels * self.segments)

    def combine_with_inputs(self, output: Tensor, x: Tensor) -> Tensor:
        """(batch, outputs) -> the same, with what could not be rebuilt in place of what was; 0 for a silent sensor."""
        size = self.channels * self.segments
        x = x.float() if x.ndim == 3 else x.float()[..., None]  # (batch, channels, time)
        present = F.adaptive_avg_pool1d((~x.isnan()).float(), self.segments)
        seen = F.adaptive_avg_pool1d(x.nan_to_num(0.0), self.segments) / present.clamp(min=1e-6)
        left = torch.where(present > 0.0, seen - output[:, :size].view_as(seen), 0.0)
        return torch.cat([left.flatten(1), output[:, size:]], dim=1)

    def loss(self, output: Tensor, labels: Tensor) -> Tensor:
        """Mean square of what could not be rebuilt, over normal samples; linear beyond 3 standard deviations."""
        normal = labels[:, TOUCHED] == 0.0
        left = output[:, : self.channels * self.segments].float()
        losses = F.huber_loss(left, torch.zeros_like(left), reduction="none", delta=3.0).mean(dim=1)
        return torch.where(normal, losses, 0.0).sum() / normal.sum().clamp(min=1)

    def fit_outputs(self, output: Tensor, labels: Labels) -> None:
        """Measure how normal training samples scatter, and set a first threshold above nearly all of them."""
        normal = output[torch.from_numpy(labels[:, TOUCHED] == 0.0)].double().numpy()
        left, latent = self._split(normal)
        self.scatter = (Scatter.of(left), Scatter.of(latent))
        self.threshold = float(np.quantile(self._distance(normal), 1.0 - self.config.alarm_share))

    def _split(self, output: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """(n, outputs) -> what is left over of the latest segments (n, some, channels), latent (n, 1, latent)."""
        size = self.channels * self.segments
        left = output[:, :size].reshape(-1, self.channels, self.segments).swapaxes(1, 2)
        return left[:, -math.ceil(self.segments / LATEST) :], output[:, None, size:]

    def _distance(self, output: NDArray[np.float64]) -> NDArray[np.float64]:
        assert self.scatter is not None
        parts = self._split(output)
        distances = [scatter.distance(values) for scatter, values in zip(self.scatter, parts, strict=True)]
        return np.maximum(*distances)

    def predict(self, output: Tensor) -> NDArray[np.float32]:
        """(batch, outputs) as `combine_with_inputs` gave it -> (batch,) score; before `fit_outputs` the mean square left over."""
        values = output.detach().double().cpu().numpy()
        if self.scatter is None:
            size = self.channels * self.segments
            left: NDArray[np.float64] = np.square(values[:, :size]).mean(axis=1)
            return left.astype(np.float32)
        return self._distance(values).astype(np.float32)

    def calibrate(self, prediction: NDArray[Any], labels: Labels) -> None:
        """Set `threshold` on VALIDATION rows: at the best F1 where enough of them are flagged and that cut leaves most
        normal rows alone, else so that `alarm_share` of the normal ones lie above it. Without rows it stays.
        """
        finite = np.isfinite(prediction)
        scores, flags = prediction[finite].astype(np.float64), labels[finite, FLAG]
        flagged = flags == 1.0
        normal = scores[~flagged]
        if len(normal):
            self.threshold = float(np.quantile(normal, 1.0 - self.config.alarm_share))
        if flagged.sum() >= LEAST and len(normal):
            labelled = ~np.isnan(flags)
            cut = best_cut(scores[labelled], flagged[labelled], near=self.threshold)
            # where the flagged rows look like any other, F1 is best when everything alarms
            if (normal > cut).mean() <= MOST_ALARMS:
                self.threshold = cut
        reached = self.threshold is None or bool((scores > self.threshold).any())
        self.trouble = "" if reached else self._never_alarms(len(scores))

    def _never_alarms(self, rows: int) -> str:
        return (
            f"none of {rows} validation samples scores above its threshold of {self.threshold:.3g}, so nobody has seen "
            f"it alarm. Validate on more rows ([data.split]), or raise `alarm_share` of [tasks.{self.name}]."
        )

    def describe(self, labels: Labels) -> str:
        if not len(labels):
            return "no samples"
        labelled = self.scored_mask(labels)
        if not labelled.any():
            return "no labels; all count as normal"
        without = f", {1 - labelled.mean():.0%} unlabelled" if not labelled.all() else ""
        return f"{(labels[labelled, FLAG] == 1.0).mean():.1%} flagged{without}"

    def _score(self, prediction: NDArray[Any], labels: Labels) -> float | None:
        truth = labels[:, FLAG] == 1.0
        if not truth.any():
            return None
        # before a threshold is chosen, what the best one could give: a curve must not hang on a number nobody set
        cut = best_cut(prediction, truth, near=None) if self.threshold is None else self.threshold
        called = prediction > cut
        return 2.0 * int((called & truth).sum()) / (int(called.sum()) + int(truth.sum()))

    def _others(self, prediction: Tensor, labels: Tensor) -> dict[str, float | None]:
        # here and not above: it takes a second to import, and most commands measure nothing
        from torchmetrics.functional.classification import binary_auroc

        scores, rows = prediction.numpy(), labels.numpy()
        truth = rows[:, FLAG] == 1.0
        cut = best_cut(scores, truth, near=None) if self.threshold is None else self.threshold
        called = scores > cut
        events = count_events(called, truth, rows[:, SEGMENT], rows[:, TIME])
        normal, anomalous = int((~truth).sum()), int(truth.sum())
        whole = 2 * events.detected + events.missed + events.false
        days = observed(rows[:, SEGMENT], rows[:, TIME]) / DAY if self.clock else 0.0
        return {
            "event_f1": 2.0 * events.detected / whole if whole and anomalous else None,
            "false_alarms_per_day": events.false / days if days > 0.0 else None,
            "false_alarms_per_1000_rows": 1000.0 * events.false / len(rows),
            "false_alarm_rate": 100.0 * int((called & ~truth).sum()) / normal if normal else None,
            "missed_alarm_rate": 100.0 * int((~called & truth).sum()) / anomalous if anomalous else None,
            "auroc": float(binary_auroc(_ranks(prediction), torch.from_numpy(truth).long()))
            if normal and anomalous
            else None,
        }


class Bottleneck(nn.Module):
    """The embedding reduced to `latent` numbers, and a sample rebuilt from them.

    Shape:
        (batch, width) -> (batch, outputs + latent): rebuilt, then latent.
    """

    def __init__(self, width: int, latent: int, outputs: int) -> None:
        super().__init__()
        self.squeeze = nn.Linear(width, latent)
        self.open = nn.Linear(latent, width)
        self.rebuild = nn.Linear(width, outputs)

    def forward(self, x: Tensor) -> Tensor:
        latent = self.squeeze(x)
        return torch.cat([self.rebuild(F.gelu(self.open(latent))), latent], dim=1)


class Scatter:
    """Where the normal samples lie and how far they spread; the yardstick of a Mahalanobis distance.

    The covariance is shrunk towards a multiple of the identity as far as its own noise demands (Ledoit and Wolf 2004),
    so that a direction in which training happened to be still does not turn every later tremor into an alarm.

    Args:
        mean: (k,).
        whiten: (k, k), or (k,) where there are too many numbers for a matrix: (x - mean) @ whiten has unit covariance.
        usual: distance at the 99th percentile of training.
    """

    MOST = 256  # numbers up to which their correlations are used
    # Least shrinkage. Windows that overlap are fewer than they seem, and a direction that was still in a few quiet
    # minutes drifts later: on a water circuit one half ranked better than what the noise alone asks for.
    FLOOR = 0.5

    def __init__(self, mean: NDArray[np.float64], whiten: NDArray[np.float64], usual: float) -> None:
        self.mean, self.whiten, self.usual = mean, whiten, usual

    @classmethod
    def of(cls, values: NDArray[np.float64]) -> "Scatter":
        """Measured on normal samples: (n, parts, k), each part one more draw of the same k numbers."""
        flat = values.reshape(-1, values.shape[2])
        mean = flat.mean(axis=0)
        centred = flat - mean
        count, size = centred.shape
        level = max(float(np.square(centred).mean()), 1e-12)
        if size > cls.MOST:
            variance = np.square(centred).mean(axis=0)
            whiten = 1.0 / np.sqrt((1.0 - cls.FLOOR) * variance + cls.FLOOR * level)
        else:
            covariance = centred.T @ centred / count
            off = np.square(covariance - level * np.eye(size)).sum()
            noise = (np.square(np.square(centred).sum(axis=1)).mean() - np.square(covariance).sum()) / count
            share = float(np.clip(noise / off if off > 0.0 else 1.0, cls.FLOOR, 1.0))
            roots, vectors = np.linalg.eigh((1.0 - share) * covariance + share * level * np.eye(size))
            whiten = vectors / np.sqrt(np.maximum(roots, 1e-12))
        scatter = cls(mean, whiten, 1.0)
        scatter.usual = max(float(np.quantile(scatter.distance(values), 0.99)), 1e-6)
        return scatter

    def distance(self, values: NDArray[np.float64]) -> NDArray[np.float64]:
        """(n, parts, k) -> (n,): root mean square over the parts, in units of the usual largest."""
        centred = values - self.mean
        white = centred * self.whiten if self.whiten.ndim == 1 else centred @ self.whiten
        distance: NDArray[np.float64] = np.sqrt(np.square(white).sum(axis=2).mean(axis=1)) / self.usual
        return distance

    def state(self) -> dict[str, Any]:
        return {"mean": self.mean.tolist(), "whiten": self.whiten.tolist(), "usual": self.usual}

    @classmethod
    def of_state(cls, state: Mapping[str, Any]) -> "Scatter":
        return cls(np.array(state["mean"]), np.array(state["whiten"]), float(state["usual"]))


class Events(NamedTuple):
    """Stretches of consecutive samples: true ones that an alarm touched, true ones without one, alarms that touch none."""

    detected: int
    missed: int
    false: int


def count_events(
    called: NDArray[np.bool_], truth: NDArray[np.bool_], segment: NDArray[Any], time: NDArray[Any]
) -> Events:
    """Count events over samples in order; a stretch ends where the segment does, or where time steps back.

    Args:
        called, truth: (n,) whether an alarm was given, and whether it should have been.
        segment, time: (n,) of the labels. A bootstrap may hold the same segment twice, one behind the other.
    """
    if not len(called):
        return Events(0, 0, 0)
    piece = _pieces(segment, time)
    true, alarm = _stretches(truth, piece), _stretches(called, piece)
    hit = called & truth
    detected = len(np.unique(true[hit]))
    stretches, alarms = int(true.max()), int(alarm.max())
    return Events(detected, stretches - detected, alarms - len(np.unique(alarm[hit])))


def observed(segment: NDArray[Any], time: NDArray[Any]) -> float:
    """How long the samples watched, in the unit of `time`; each stands for the usual step between two of them."""
    if len(time) < 2:
        return 0.0
    steps = np.diff(time)[np.diff(_pieces(segment, time)) == 0]
    return float(steps.sum() + np.median(steps) * (len(time) - len(steps))) if len(steps) else 0.0


def _pieces(segment: NDArray[Any], time: NDArray[Any]) -> NDArray[np.int64]:
    """(n,) number of the unbroken stretch of time each sample lies in."""
    breaks = (np.diff(segment) != 0) | (np.diff(time) <= 0)
    return np.concatenate([[0], np.cumsum(breaks)])


def _stretches(on: NDArray[np.bool_], piece: NDArray[np.int64]) -> NDArray[np.int64]:
    """(n,) number, from 1, of the run of consecutive `on` samples each lies in; 0 where it is off."""
    before = np.concatenate([[False], on[:-1] & (np.diff(piece) == 0)])
    return np.where(on, np.cumsum(on & ~before), 0)


def best_cut(scores: NDArray[Any], truth: NDArray[np.bool_], near: float | None) -> float:
    """The threshold with the best F1, half-way between two scores; of equal ones the nearest to `near`, or the highest.

    Args:
        scores: (n,) finite.
        truth: (n,) at least one of them true.
    """
    order = np.argsort(-scores, kind="stable")
    score, hits = scores[order].astype(np.float64), np.cumsum(truth[order])
    below = np.append(score[1:], score[-1] - 1.0)
    possible = score > below  # equal scores cannot be told apart
    f1 = np.where(possible, 2.0 * hits / (np.arange(1, len(score) + 1) + hits[-1]), -1.0)
    best = ((score + below) / 2.0)[f1 == f1.max()]
    return float(best[0] if near is None else best[np.argmin(np.abs(best - near))])


def _ranks(scores: Tensor) -> Tensor:
    """Scores as places in their order, equal ones alike: a score has no upper end, and a probability is expected."""
    places: Tensor = torch.unique(scores, return_inverse=True)[1].double()
    return places / places.max().clamp(min=1.0)
