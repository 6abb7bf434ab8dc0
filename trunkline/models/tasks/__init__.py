"""Task kinds: one file each, and one line here."""

from collections.abc import Mapping

from trunkline.config.tasks import TaskConfig
from trunkline.errors import ConfigError, nearest
from trunkline.models.tasks.anomaly import Anomaly
from trunkline.models.tasks.binary import Binary
from trunkline.models.tasks.forecast import Forecast
from trunkline.models.tasks.multiclass import Multiclass
from trunkline.models.tasks.multilabel import Multilabel
from trunkline.models.tasks.ordinal import Ordinal
from trunkline.models.tasks.regression import Regression
from trunkline.models.tasks.task import Metric, Task
from trunkline.protocol.contract import TaskDescription

TASKS: dict[str, type[Task]] = {
    "regression": Regression,
    "binary": Binary,
    "multiclass": Multiclass,
    "ordinal": Ordinal,
    "multilabel": Multilabel,
    "forecast": Forecast,
    "anomaly": Anomaly,
}


def make_task(name: str, config: TaskConfig) -> Task:
    """The task of `[tasks.name]` in site.toml.

    Raises:
        ConfigError: its kind is not installed, or its table cannot be meant.
    """
    if config.kind not in TASKS:
        raise ConfigError(
            f"[tasks.{name}]: unknown kind {config.kind!r}{nearest(config.kind, TASKS)} Known: {', '.join(TASKS)}."
        )
    return TASKS[config.kind](name, config)


def describe_tasks(tasks: Mapping[str, TaskConfig]) -> dict[str, TaskDescription]:
    """What offers and scorecards may report about the tasks of a site.toml."""
    built = {name: make_task(name, config) for name, config in tasks.items()}
    return {
        name: TaskDescription(task.card, frozenset(task.METRICS) | set(task.metrics)) for name, task in built.items()
    }


__all__ = ["TASKS", "Metric", "Task", "describe_tasks", "make_task"]
