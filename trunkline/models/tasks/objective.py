"""The second third of a task: its head, its loss, and what a person reads of the head's outputs."""

import copy
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import ClassVar, NamedTuple, Self

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn

from trunkline.config.tasks import TaskConfig
from trunkline.models.labels import Labels

BETA = 0.999  # of the effective number of samples; not 0.9999, because overlapping windows repeat each other


class Samples(NamedTuple):
    """What a task may know of the inputs it will meet, apart from their values.

    Args:
        channels: inputs in order.
        window: rows a sample; None where a sample is one row.
        clock: whether `order` is a time, in seconds; otherwise it only counts or ranks.
        scale: (mean, standard deviation) that each channel was scaled by; empty where that depends on a regime.
    """

    channels: tuple[str, ...]
    window: int | None = None
    clock: bool = False
    scale: tuple[tuple[float, float], ...] = ()


class Objective(ABC):
    """What a task learns: head and loss, with what both take from the training samples."""

    config: TaskConfig

    @property
    @abstractmethod
    def outputs(self) -> int:
        """Numbers the head gives a sample."""

    def bind_inputs(self, samples: Samples) -> None:
        """Take note of the inputs, before `labels_for_samples` and `head`; only a task that reads its own input does."""
        return

    @abstractmethod
    def fit(self, labels: Labels) -> None:
        """Learn scale or class counts from the TRAINING labels, (n,) or (n, k), NaN where missing.

        Raises:
            DataError: no label at all, or all of one class.
        """

    def fit_inputs(self, newest: NDArray[np.float32], labels: Labels) -> None:
        """Learn from the inputs of the TRAINING samples, after `fit`; for a task that combines its outputs with them.

        Args:
            newest: (n, channels) the last row of each sample, scaled, NaN where missing.
            labels: (n,) or (n, k), as `fit` had them.
        """
        return

    def head(self, width: int) -> nn.Module:
        """The private last layer, (batch, width) -> (batch, outputs): linear, for it learns from the fewest labels.

        Nothing that was learnt from labels may show in it: where a run lends the head, the server sees its first values.
        """
        return nn.Linear(width, self.outputs)

    def init_head(self, head: nn.Module) -> None:
        """Move a new head that stays at the plant to where this site's training labels say that training should begin."""
        return

    @property
    def combines_inputs(self) -> bool:
        """Whether `combine_with_inputs` changes anything: whether the loss needs the sample itself beside its embedding."""
        return type(self).combine_with_inputs is not Objective.combine_with_inputs

    def combine_with_inputs(self, output: Tensor, x: Tensor) -> Tensor:
        """What the head gave for the samples `x`, made ready for `loss` and `predict`.

        Only a task with a way past the network needs `x` (reconstruction, skip channels); others take the output as it is.

        Shape:
            output (batch, outputs), x (batch, channels, time) or (batch, columns) -> (batch, anything).
        """
        return output

    @abstractmethod
    def loss(self, output: Tensor, labels: Tensor) -> Tensor:
        """Mean loss over the labels that are present; exactly 0, with zero gradient, where none is.

        Shape:
            output (batch, outputs) as `combine_with_inputs` gave it, labels (batch,) or (batch, k), NaN where missing -> ().
        """

    loss_weights: Tensor | None = None  # (classes,) in `loss`, where `with_numbers` gave them

    def loss_numbers(self) -> dict[str, Tensor] | None:
        """What `loss` reads that was learnt from this site's labels, by name; None where it cannot be lifted out.

        Sites whose tasks differ in nothing else can be trained in one go: `with_numbers` gives the task of each.
        """
        return None

    def with_numbers(self, numbers: Mapping[str, Tensor]) -> Self:
        """A copy whose `loss` reads these instead of its own."""
        other = copy.copy(self)
        other.__dict__.update(numbers)
        return other

    @abstractmethod
    def predict(self, output: Tensor) -> NDArray[np.float32]:
        """Head outputs (batch, outputs) -> what a person reads: values, or probabilities, a row for each sample."""

    fits_outputs: ClassVar[bool] = False  # whether `fit_outputs` wants the trained model's outputs on training samples

    def fit_outputs(self, output: Tensor, labels: Labels) -> None:
        """Learn what one trained model's outputs look like on TRAINING samples, before `predict`; see `calibrate`.

        Args:
            output: (n, outputs) as `combine_with_inputs` gave it.
            labels: (n,) or (n, k), NaN where missing.
        """
        return


def effective_number(counts: NDArray[np.float64]) -> NDArray[np.float64]:
    """How much `counts` (classes,) samples are worth when samples repeat each other (Cui et al. 2019, arXiv:1901.05555)."""
    worth: NDArray[np.float64] = (1.0 - BETA ** np.maximum(counts, 1.0)) / (1.0 - BETA)
    return worth
