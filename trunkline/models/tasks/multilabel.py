"""Any number of several things at once: which alarms will ring, which failure modes are there."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import polars as pl
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from trunkline.config.tasks import TaskConfig
from trunkline.errors import DataError
from trunkline.models.tasks.crossentropy import yes_or_no
from trunkline.models.tasks.skip_channels import SkipHead, fit_shared_weights, select_channels
from trunkline.models.tasks.task import Labels, Metric, Samples, Task, effective_number, listed, numbers
from trunkline.models.tasks.thresholds import choose_thresholds

FLAGS = {"false": "0", "true": "1", "no": "0", "yes": "1"}
BOUND = 10.0  # largest emphasis of a label's rarer answer, as for a binary task
HARD = 4.0  # gamma of the negatives in the asymmetric loss, and the probability below which they count nothing: both
MARGIN = 0.05  # are the values of the paper
START = (
    0.3  # threshold until `calibrate`: the best cut for F1 is half the best F1 (Lipton et al. 2014, arXiv:1402.1892)
)


class Multilabel(Task):
    """Labels are (rows, K): one column of 0 and 1 for each of `targets`, empty where nobody knows.

    `loss`: "weighted" (default), cross entropy in which the rarer answer of each label counts more, by the effective
    number of samples (Cui et al. 2019, arXiv:1901.05555) and tenfold at most, or as often as it comes with
    `class_weights = "none"`; or "asymmetric", in which easy negatives count next to nothing (Ridnik et al. 2021,
    arXiv:2009.14119; `focal` is its gamma for negatives, 4 where not given).

    `predict` takes the weights of the weighted loss out again, because labels that share one threshold must mean the
    same by a probability. `calibrate` chooses one threshold for all labels, and one of its own for a label where
    validation supports it.

    With `skip_channels` every target has channels of its own. Its output is the network's plus a weighted sum of these, with
    the same weights for all targets (see `skip_channels.py`); the head gives the weights too, J numbers behind the K
    outputs. A head that stays at the plant starts as the logistic regression on these channels alone. It does not start
    from each label's frequency in training: a network that knows how often each label rang in the very rows it trains on
    does not learn to look at what rang lately. Log-odds of each label's past belong among its channels.

    A label that is never positive in training cannot be learnt: `macro_f1` and `mean_average_precision` leave it out,
    `micro_f1`, which is over all cells of rows x labels, does not.
    """

    kind = "multilabel"
    decision_keys = ("thresholds",)
    primary = "micro_f1"
    METRICS = {  # noqa: RUF012  (declared ClassVar in Task)
        "micro_f1": Metric("of 1", "higher"),
        "macro_f1": Metric("of 1", "higher"),
        "mean_average_precision": Metric("of 1", "higher"),
    }

    def __init__(self, name: str, config: TaskConfig) -> None:
        super().__init__(name, config)
        self.positive = np.ones(len(config.targets), dtype=np.int64)  # training labels that are 1, of each target
        self.negative = np.ones(len(config.targets), dtype=np.int64)
        self.thresholds = np.full(len(config.targets), START, dtype=np.float32)
        self.skips = np.empty((0, len(config.targets)), dtype=np.int64)  # (J, K) indices of each target's skip channels
        self.start: tuple[float, ...] = ()  # weights of the skip channels and a level, where training begins

    @property
    def outputs(self) -> int:
        return len(self.config.targets) + len(self.skips)

    @property
    def combines_inputs(self) -> bool:
        return len(self.skips) > 0

    def bind_inputs(self, samples: Samples) -> None:
        """Find the skip channels; one that cleaning dropped counts as 0."""
        indices = {name: index for index, name in enumerate(samples.channels)}
        skips = [[indices.get(name, -1) for name in names] for names in self.config.skip_channels]
        self.skips = np.array(skips, dtype=np.int64).reshape(-1, len(self.config.targets))

    def fit_inputs(self, newest: NDArray[np.float32], labels: Labels) -> None:
        if len(self.skips):
            skips = select_channels(torch.from_numpy(np.ascontiguousarray(newest)), torch.from_numpy(self.skips))
            weights, level = fit_shared_weights(skips, torch.from_numpy(labels))
            self.start = (*weights.tolist(), level)

    def read(self, column: pl.Series, where: str) -> Labels:
        """One target's column -> (rows,)."""
        remedy = "Write 0 and 1, or leave the cell empty where the label is unknown."
        if column.dtype == pl.String:
            lower = column.str.strip_chars().str.to_lowercase()
            values = numbers(self, lower.replace(FLAGS), where, remedy)
        else:
            values = numbers(self, column, where, remedy)
        if wrong := np.flatnonzero(~np.isnan(values) & (values != 0) & (values != 1)).tolist():
            more = " A level is a task of kind 'regression' or 'ordinal'." if len(wrong) > 1 else ""
            raise self._bad(column, where, wrong[0], column[wrong[0]], "0 or 1", remedy + more)
        return values.astype(np.float32)

    def read_from(self, frame: pl.DataFrame, where: str) -> Labels:
        """(rows, K), in the order of `targets`."""
        return np.stack([self.read(frame[name], where) for name in self.config.targets], axis=1)

    def fit(self, labels: Labels) -> None:
        present = ~np.isnan(labels)
        if not present.any():
            raise self._no_labels()
        positive = (labels > 0.5).sum(axis=0)
        if not positive.any() or (positive == present.sum(axis=0)).all():
            raise DataError(
                f"Task {self.name!r}: all {int(present.sum()):,} training labels of {self._column()} are "
                f"{'1' if positive.any() else '0'}; there is nothing to tell apart. Add groups where they differ, change "
                f"`seed` of [data.split], or take [tasks.{self.name}] out of site.toml."
            )
        self.positive, self.negative = positive, present.sum(axis=0) - positive

    @property
    def emphasis(self) -> NDArray[np.float64]:
        """(K,) how much a positive label weighs beside a negative one."""
        if self.config.class_weights == "none" or self.config.loss == "asymmetric":
            return np.ones(len(self.config.targets))
        worth = effective_number(np.stack([self.negative, self.positive]).astype(np.float64))
        return np.asarray(np.clip(worth[0] / worth[1], 1.0 / BOUND, BOUND))

    def state(self) -> dict[str, object]:
        return {
            "kind": self.kind,
            "positive": self.positive.tolist(),
            "negative": self.negative.tolist(),
            "thresholds": self.thresholds.tolist(),
            **({"own": self.skips.tolist(), "start": list(self.start)} if len(self.skips) else {}),
        }

    def load_state(self, state: Mapping[str, Any]) -> None:
        loaded = self._loaded(state)
        self.positive, self.negative = (np.array(loaded[key], dtype=np.int64) for key in ("positive", "negative"))
        self.thresholds = np.array(loaded["thresholds"], dtype=np.float32)
        self.skips = np.array(loaded.get("own", []), dtype=np.int64).reshape(-1, len(self.config.targets))
        self.start = tuple(map(float, loaded.get("start", ())))

    def head(self, width: int) -> nn.Module:
        return SkipHead(width, len(self.config.targets), len(self.skips)) if len(self.skips) else super().head(width)

    def init_head(self, head: nn.Module) -> None:
        """Each bias becomes the best answer to all training samples alike, so that training starts at the frequencies.

        With skip channels, all labels begin at one level, and their own channels add to it.
        """
        if self.start and isinstance(head, SkipHead):
            level = self.start[-1] + torch.from_numpy(np.log(self.emphasis)).float()
            head.start_from(torch.tensor(self.start[:-1]), level)
            return
        answers = torch.linspace(-8.0, 8.0, 321)[:, None].expand(-1, len(self.config.targets))  # (answers, K)
        yes, no = (self._cell_losses(answers, torch.full_like(answers, truth)) for truth in (1.0, 0.0))
        # half a sample more of each, so that a label never seen is rare and not impossible
        cost = torch.from_numpy(self.positive + 0.5) * yes + torch.from_numpy(self.negative + 0.5) * no
        with torch.no_grad():
            head.bias.copy_(answers[:, 0][cost.argmin(dim=0)])  # type: ignore[operator]

    def combine_with_inputs(self, output: Tensor, x: Tensor) -> Tensor:
        """Add the skip channels: (batch, K + J) -> (batch, K)."""
        if not len(self.skips):
            return output
        labels = len(self.config.targets)
        skips = select_channels(x, torch.from_numpy(self.skips).to(x.device))
        return output[:, :labels] + torch.einsum("bj,bjk->bk", output[:, labels:], skips)

    def _cell_losses(self, output: Tensor, truth: Tensor) -> Tensor:
        """The loss of every cell, (rows, K)."""
        config = self.config
        if config.loss == "asymmetric":
            truth = truth * (1.0 - config.label_smoothing) + 0.5 * config.label_smoothing
            # the margin's floor is above 0, because a root of zero has no gradient
            shifted = (output.sigmoid() - MARGIN).clamp(min=1e-8)
            wrong = shifted ** (config.focal or HARD) * -torch.log1p(-shifted)
            return truth * nn.functional.softplus(-output) + (1.0 - truth) * wrong
        emphasis = torch.tensor(self.emphasis, dtype=torch.float32, device=output.device)
        return yes_or_no(output, truth, emphasis, config.focal, config.label_smoothing)

    def loss(self, output: Tensor, labels: Tensor) -> Tensor:
        missing = labels.isnan()
        losses = self._cell_losses(output.float(), torch.where(missing, 0.0, labels))
        return torch.where(missing, 0.0, losses).sum() / (~missing).sum().clamp(min=1)

    def predict(self, output: Tensor) -> NDArray[np.float32]:
        """(batch, K) -> (batch, K) probabilities, without the weights of the loss."""
        plain = output.detach().float().cpu() - torch.from_numpy(np.log(self.emphasis)).float()
        probability: NDArray[np.float32] = plain.sigmoid().numpy()
        return probability

    def calibrate(self, prediction: NDArray[Any], labels: Labels) -> None:
        """Choose the thresholds on these VALIDATION rows, as `choose_thresholds` says; without a positive label they stay.

        Args:
            prediction: (rows, K) probabilities.
            labels: (rows, K), NaN where missing.
        """
        present = ~np.isnan(labels) & ~np.isnan(prediction)
        macro = self.primary == "macro_f1"
        chosen = choose_thresholds(prediction, labels > 0.5, present, near=START, macro=macro)
        if chosen is not None:
            self.thresholds = chosen
        reached = (prediction > self.thresholds)[present].any() or not present.any()
        self.trouble = "" if reached else self._never_called(len(labels), float(self.thresholds.min()))

    def _called(self, prediction: NDArray[Any], labels: Labels) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
        """(rows, K) what is called and what is true, both False where a label is missing."""
        truth = labels > 0.5
        return (prediction > self.thresholds) & (truth | (labels <= 0.5)), truth

    @property
    def learnable(self) -> NDArray[np.bool_]:
        """(K,) which labels were positive in training at least once."""
        return np.asarray(self.positive > 0)

    def _score(self, prediction: NDArray[Any], labels: Labels) -> float | None:
        called, truth = self._called(prediction, labels)
        positive = np.count_nonzero(truth)
        return 2.0 * np.count_nonzero(called & truth) / (np.count_nonzero(called) + positive) if positive else None

    def _metric(self, name: str, prediction: NDArray[Any], labels: Labels) -> float | None:
        if name == "macro_f1":
            called, truth = (cells[:, self.learnable] for cells in self._called(prediction, labels))
            either = called.sum(axis=0) + truth.sum(axis=0)
            named = either > 0  # a label neither there nor called has no F1
            hits = (called & truth).sum(axis=0)
            return float((2.0 * hits[named] / either[named]).mean()) if truth.any() else None
        if name == "mean_average_precision":
            columns = np.flatnonzero(self.learnable & (labels > 0.5).any(axis=0))
            precisions = [average_precision(prediction[:, column], labels[:, column]) for column in columns]
            return float(np.mean(precisions)) if precisions else None
        return super()._metric(name, prediction, labels)

    def _others(self, prediction: Tensor, labels: Tensor) -> dict[str, float | None]:
        rows, truth = prediction.numpy(), labels.numpy()
        return {name: self._metric(name, rows, truth) for name in ("macro_f1", "mean_average_precision")}

    def _described(self, labels: Labels) -> str:
        count = (~np.isnan(labels)).sum(axis=0)
        share = np.divide((labels > 0.5).sum(axis=0), count, out=np.zeros(len(count)), where=count > 0)
        words = [
            f"{self.config.targets[label]} {share[label]:.1%}"
            for label in np.argsort(-share, kind="stable")
            if share[label]
        ]
        return (
            f"{share.sum():.3g} of {len(share)} labels a sample: {listed(words, 3)}" if words else "no positive label"
        )

    def warnings(self, part: str, labels: Labels) -> list[str]:
        never = [name for name, ever in zip(self.config.targets, self.learnable, strict=True) if not ever]
        seen = np.asarray((labels > 0.5).any(axis=0))
        occurring = [name for name, occurs in zip(self.config.targets, seen, strict=True) if occurs]
        strange = sorted(set(never) & set(occurring), key=never.index)
        if part == "train" and never:
            return [
                f"{len(never)} of {len(self.config.targets)} labels are never 1 in training: {listed(never)}. macro_f1 and "
                f"mean_average_precision leave them out."
            ]
        if strange:
            return [
                f"{part} has labels that are never 1 in training: {listed(strange)}. In micro_f1 each counts as a miss."
            ]
        return []

    def _column(self) -> str:
        return f"`targets` ({listed([f'`{name}`' for name in self.config.targets], 3)})"


def average_precision(score: NDArray[Any], labels: NDArray[Any]) -> float:
    """Precision at each distinct score from above, weighted by the recall gained there.

    Args:
        score: (rows,).
        labels: (rows,) 0 or 1, at least one 1; NaN where missing, which does not count.
    """
    present = ~np.isnan(labels)
    order = np.argsort(-score[present], kind="stable")
    ranked, hits = score[present][order], np.cumsum(labels[present][order] > 0.5)
    last = np.append(ranked[1:] != ranked[:-1], True)  # equal scores are taken together
    precision = hits[last] / (np.flatnonzero(last) + 1)
    return float((precision * np.diff(hits[last], prepend=0)).sum() / hits[-1])
