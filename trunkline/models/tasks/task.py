"""What every task kind promises: how its labels are read, what it learns, how its predictions are measured."""

from abc import abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar

from torch import nn

from trunkline.config.tasks import TaskConfig
from trunkline.errors import ConfigError, StorageError
from trunkline.models.labels import Labels, known
from trunkline.models.tasks.label_reader import LabelReader, listed, numbers, shares
from trunkline.models.tasks.metrics import Metric, Metrics
from trunkline.models.tasks.objective import BETA, Objective, Samples, effective_number
from trunkline.protocol.contract import TaskCard

__all__ = ["BETA", "Labels", "Metric", "Samples", "Task", "effective_number", "known", "listed", "numbers", "shares"]


class Task(LabelReader, Objective, Metrics):
    """One thing to predict at one site: `[tasks.NAME]` of its site.toml.

    A task is used in this order: `read` its label column (all rows of the site), `bind_inputs`, bring labels to samples by
    `labels_for_samples`, `fit` on the training labels, `fit_inputs` on the training samples, then `head`, `loss`, `predict`,
    `measure` as often as wanted. `state` is what `fit` and `fit_inputs` learnt, for the vault.

    Args:
        name: also the name of its head.
        config: its table in site.toml.

    Raises:
        ConfigError: the table cannot be meant, or the name cannot be a head's.
    """

    kind: ClassVar[str]

    def __init__(self, name: str, config: TaskConfig) -> None:
        if hasattr(nn.ModuleDict(), name):  # heads live in one, and its own attributes would be shadowed
            raise ConfigError(
                f"[tasks.{name}]: PyTorch uses the name {name!r} itself. Rename the table; `target` may stay."
            )
        self.name = name
        self.config = config
        self.trouble = ""
        self._choose_primary()

    @property
    def card(self) -> TaskCard:
        """What the site may say of this task."""
        metric = self.METRICS[self.primary]
        return TaskCard(
            task=self.name,
            kind=self.kind,
            metric=self.primary,
            unit=metric.unit or self.config.unit,
            better=metric.better,
        )

    @abstractmethod
    def state(self) -> dict[str, object]:
        """What `read` and `fit` learnt, ready for JSON."""

    @abstractmethod
    def load_state(self, state: Mapping[str, Any]) -> None:
        """Take over what `state` gave.

        Raises:
            StorageError: it is the state of another kind of task.
        """

    def _loaded(self, state: Mapping[str, Any]) -> Mapping[str, Any]:
        if state.get("kind") != self.kind:
            raise StorageError(
                f"Task {self.name!r} is of kind {self.kind!r}; what was stored is of kind {state.get('kind')!r}. "
                f"Undo the change of `kind` in site.toml, or start a run of another name."
            )
        return state

    decision_keys: ClassVar[tuple[str, ...]] = ()  # keys of `state` that `calibrate` sets

    def decisions(self) -> dict[str, Any]:
        """What `calibrate` has chosen, ready for JSON."""
        state = self.state()
        return {key: state[key] for key in self.decision_keys}

    def take_decisions(self, decisions: Mapping[str, Any]) -> None:
        """Decide as `decisions` says, which another model of this task was calibrated for."""
        self.load_state({**self.state(), **decisions})
