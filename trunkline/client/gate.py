"""Which model a site should really use: decided on validation data only, task by task."""

from typing import Literal

from trunkline.models.tasks.task import Task


def choose(task: Task, local: float | None, federated: float | None) -> Literal["local", "federated"]:
    """The better validation metric wins; a tie, or no validation labels at all, goes to the federated model.

    With nothing to choose by, the federated model is the safer one: it has seen more plants.
    """
    if local is None or federated is None:
        return "federated"
    lower = task.card.better == "lower"
    return "local" if (local < federated if lower else local > federated) else "federated"
