"""Yes or no: fails soon, leaks, out of tolerance."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import polars as pl
import torch
from numpy.typing import NDArray
from torch import Tensor

from trunkline.config.tasks import TaskConfig
from trunkline.models.tasks.calibration import ENOUGH, best_cut, calibration_error, logit, platt, sigmoid
from trunkline.models.tasks.crossentropy import yes_or_no
from trunkline.models.tasks.task import Labels, Metric, Task, effective_number, numbers, shares

WORDS = {"0": 0, "1": 1, "0.0": 0, "1.0": 1, "false": 0, "true": 1, "no": 0, "yes": 1}
BOUND = 10.0  # largest emphasis of the rarer class: with five positives, more would fit those five


class Binary(Task):
    """Labels may be 0 and 1, booleans, true/false, yes/no, or two words of the site's own.

    Of two words the second in the alphabet is the positive one ("bad" < "ok": predicts the probability of "ok"); write
    0 and 1 where that is not meant.

    The rarer class counts more, by the effective number of samples (Cui et al. 2019, arXiv:1901.05555), tenfold at
    most; `class_weights = "none"` leaves that out. What `predict` gives are the probabilities of this weighted loss, so a
    rare failure is called earlier than its frequency alone would; `threshold`, 0.5 until `calibrate` moves it, is where
    `f1` and `accuracy` cut. `calibrated` turns them into frequencies, and `brier` and `ece` are measured on those.
    """

    kind = "binary"
    decision_keys = ("threshold", "line")
    primary = "f1"
    METRICS = {  # noqa: RUF012  (declared ClassVar in Task)
        "f1": Metric("of 1", "higher"),
        "auroc": Metric("of 1", "higher"),
        "average_precision": Metric("of 1", "higher"),
        "accuracy": Metric("of 1", "higher"),
        "brier": Metric("of 1", "lower"),
        "ece": Metric("of 1", "lower"),
    }

    def __init__(self, name: str, config: TaskConfig) -> None:
        super().__init__(name, config)
        self.words: tuple[str, ...] = ()  # the site's own two words, negative first
        self.counts = (1, 1)  # training labels: negative, positive
        self.threshold = 0.5
        self.line = (1.0, 0.0)  # slope and shift from the log-odds of `predict` to those of `calibrated`

    @property
    def outputs(self) -> int:
        return 1

    def read(self, column: pl.Series, where: str) -> Labels:
        remedy = "Write 0 and 1, or leave the cell empty where the label is unknown."
        if column.dtype in (pl.String, pl.Categorical, pl.Enum):
            return self._read_words(column, where, remedy)
        values = numbers(self, column, where, remedy)
        if wrong := np.flatnonzero(~np.isnan(values) & (values != 0) & (values != 1)).tolist():
            raise self._bad(column, where, wrong[0], column[wrong[0]], "0 or 1", remedy)
        return values.astype(np.float32)

    def _read_words(self, column: pl.Series, where: str, remedy: str) -> Labels:
        text = column.cast(pl.String).str.strip_chars()
        text = text.set(text == "", None)
        words_used = [word for word in text.unique(maintain_order=True).to_list() if word is not None]
        if not self.words and all(word.lower() in WORDS for word in words_used):
            codes = {word: WORDS[word.lower()] for word in words_used}
        else:
            words = self.words or tuple(sorted(words_used)[:2])
            codes = dict(zip(words, (0, 1), strict=False))
            if foreign := [word for word in words_used if word not in codes]:
                strangers = [word for word in words_used if word.lower() not in WORDS]
                # beside a "yes" it is the "maybe" that is wrong; among strangers, the third
                wrong = (
                    foreign[0] if self.words else strangers[0] if len(strangers) < len(words_used) else words_used[2]
                )
                expected = (
                    " or ".join(map(repr, words)) if self.words else f"two words of its own, not {len(words_used)}"
                )
                row = int((text == wrong).arg_max() or 0)
                raise self._bad(
                    column, where, row, column[row], f"0 or 1, true or false, yes or no; or {expected}", remedy
                )
            self.words = words
        values = text.replace_strict([None, *codes], [None, *map(float, codes.values())], return_dtype=pl.Float32)
        return np.array(values.fill_null(float("nan")).to_numpy(), dtype=np.float32)

    def fit(self, labels: Labels) -> None:
        present = labels[~np.isnan(labels)]
        if not len(present):
            raise self._no_labels()
        positive = int((present > 0.5).sum())
        if positive in (0, len(present)):
            name = (self.words or ("0", "1"))[positive > 0] if len(self.words) != 1 else self.words[0]
            raise self._one_class(name, len(present))
        self.counts = (len(present) - positive, positive)

    @property
    def emphasis(self) -> float:
        """How much a positive label weighs beside a negative one."""
        if self.config.class_weights == "none":
            return 1.0
        negative, positive = effective_number(np.array(self.counts, dtype=np.float64))
        return float(np.clip(negative / positive, 1.0 / BOUND, BOUND))

    def state(self) -> dict[str, object]:
        return {
            "kind": self.kind,
            "words": list(self.words),
            "counts": list(self.counts),
            "threshold": self.threshold,
            "line": list(self.line),
        }

    def load_state(self, state: Mapping[str, Any]) -> None:
        loaded = self._loaded(state)
        negative, positive = loaded["counts"]
        self.counts = (int(negative), int(positive))
        self.words, self.threshold = tuple(loaded["words"]), float(loaded["threshold"])
        slope, shift = loaded.get("line", (1.0, 0.0))  # absent in what an older version stored
        self.line = (float(slope), float(shift))

    def loss(self, output: Tensor, labels: Tensor) -> Tensor:
        missing = labels.isnan()
        truth = torch.where(missing, 0.0, labels)
        config = self.config
        emphasis = self.emphasis if self.loss_weights is None else self.loss_weights
        losses = yes_or_no(output[:, 0].float(), truth, emphasis, config.focal, config.label_smoothing)
        return torch.where(missing, 0.0, losses).sum() / (~missing).sum().clamp(min=1)

    def loss_numbers(self) -> dict[str, Tensor]:
        return {"loss_weights": torch.as_tensor(self.emphasis, dtype=torch.float32)}

    def predict(self, output: Tensor) -> NDArray[np.float32]:
        """(batch, 1) -> (batch,) probability of the positive class."""
        probability: NDArray[np.float32] = output.detach()[:, 0].float().sigmoid().cpu().numpy()
        return probability

    def calibrate(self, prediction: NDArray[Any], labels: Labels) -> None:
        """Move `threshold` to the cut with the best F1 on these VALIDATION rows; of equal ones the nearest to 0.5.

        Without a positive label there is no F1, and the threshold stays. With enough labels of both classes the line
        from scores to frequencies is drawn too; it rises, so that a cut of the one is a cut of the other.

        Args:
            prediction: (rows,) probabilities.
            labels: (rows,), NaN where missing.
        """
        present = ~np.isnan(labels) & ~np.isnan(prediction)
        score, truth = prediction[present], labels[present] > 0.5
        cut = best_cut(score, truth, self.threshold)
        self.threshold = self.threshold if cut is None else cut
        if ENOUGH <= truth.sum() <= len(truth) - ENOUGH:
            self.line = platt(logit(score), truth)
        self.trouble = (
            "" if (score > self.threshold).any() or not len(score) else self._never_called(len(score), self.threshold)
        )

    def calibrated(self, prediction: NDArray[Any]) -> NDArray[Any]:
        if self.line == (1.0, 0.0):
            return prediction
        slope, shift = self.line
        return sigmoid(slope * logit(prediction) + shift).astype(prediction.dtype)

    def _described(self, labels: Labels) -> str:
        return shares(self.words if len(self.words) == 2 else ("0", "1"), labels)

    def _score(self, prediction: NDArray[Any], labels: Labels) -> float | None:
        called, truth = prediction > self.threshold, labels > 0.5
        positive = int(truth.sum())
        return 2.0 * int((called & truth).sum()) / (int(called.sum()) + positive) if positive else None

    def _metric(self, name: str, prediction: NDArray[Any], labels: Labels) -> float | None:
        truth = labels > 0.5
        if name == "accuracy":
            return float(((prediction > self.threshold) == truth).mean())
        if name == "brier":
            return float(np.square(self.calibrated(prediction) - truth, dtype=np.float64).mean())
        if name == "ece":
            return calibration_error(self.calibrated(prediction), truth)
        return super()._metric(name, prediction, labels)

    def _others(self, prediction: Tensor, labels: Tensor) -> dict[str, float | None]:
        # here and not above: it takes a second to import, and most commands measure nothing
        from torchmetrics.functional.classification import binary_auroc, binary_average_precision

        truth = labels.long()
        mixed = 0 < int(truth.sum()) < len(truth)  # there is nothing to rank within one class
        quick = ("accuracy", "brier", "ece")
        return {
            "auroc": float(binary_auroc(prediction, truth)) if mixed else None,
            "average_precision": float(binary_average_precision(prediction, truth)) if mixed else None,
            **{name: self._metric(name, prediction.numpy(), labels.numpy()) for name in quick},
        }
