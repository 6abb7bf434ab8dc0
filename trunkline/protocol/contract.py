"""The terms of a run, and the contract that a reply is checked against."""

import hashlib
import json
from collections.abc import Mapping
from itertools import combinations
from typing import Any, Literal, NamedTuple

from pydantic import Field

from trunkline.errors import ContractError
from trunkline.protocol.arrays import Arrays, ArraySpec
from trunkline.protocol.frozen import Frozen
from trunkline.protocol.plan import TASK_NAME


class TaskCard(Frozen):
    """What a site reports about one of its tasks: never a label, only its kind and how it is measured."""

    task: str = Field(pattern=TASK_NAME)
    kind: str = Field(max_length=32)
    metric: str = Field(max_length=32, description="the primary metric")
    unit: str = Field(max_length=32)
    better: Literal["lower", "higher"]


class TaskDescription(NamedTuple):
    """What a site may report about one of its tasks.

    Args:
        metrics: names of the metrics that its results may have.
    """

    card: TaskCard
    metrics: frozenset[str]


ROUND_METRICS = ("train_loss", "validation_loss", "local_validation_loss")  # of every Update, besides the curves
FIT_METRIC = "validation_loss"  # all that the answer to a FitQuery holds


def terms_digest(terms: Mapping[str, Any]) -> str:
    """sha256 of what `RoundRequest.terms` gave."""
    return hashlib.sha256(json.dumps(terms, sort_keys=True).encode()).hexdigest()


def changed_terms(agreed: Mapping[str, Any], now: Mapping[str, Any], path: str = "") -> list[str]:
    """Each key path at which two terms differ, in words: `plan.steps` was 20, is 40."""
    changes: list[str] = []
    for key in dict.fromkeys((*agreed, *now)):
        was, is_ = agreed.get(key), now.get(key)
        if isinstance(was, Mapping) and isinstance(is_, Mapping):
            changes += changed_terms(was, is_, f"{path}{key}.")
        elif was != is_:
            changes.append(f"`{path}{key}` was {json.dumps(was)[:80]}, is {json.dumps(is_)[:80]}")
    return changes


class Contract(Frozen):
    """The allow-list of one site in one run, checked before it sends and before the server admits."""

    arrays: tuple[ArraySpec, ...]
    metrics: tuple[str, ...]

    def digest(self) -> str:
        return hashlib.sha256(self.model_dump_json().encode()).hexdigest()

    def check(self, arrays: Arrays, metrics: Mapping[str, float]) -> None:
        """Raise ContractError naming the first array or metric this contract does not allow."""
        allowed = {spec.name: spec for spec in self.arrays}
        if extra := [name for name in arrays if name not in allowed]:
            raise ContractError(
                f"`{extra[0]}` is not in this run's contract ({len(extra)} such arrays); only what the run lends may travel"
            )
        if missing := [name for name in allowed if name not in arrays]:
            raise ContractError(
                f"`{missing[0]}` is missing ({len(missing)} such arrays); a reply carries every lent array"
            )
        for name, array in arrays.items():
            spec = allowed[name]
            if array.shape != spec.shape:
                raise ContractError(f"`{name}` has shape {array.shape}; this run's trunk has {spec.shape}")
            if array.dtype.name != spec.dtype:
                raise ContractError(f"`{name}` has dtype {array.dtype.name}; this run's trunk has {spec.dtype}")
        if extra := [name for name in metrics if name not in self.metrics]:
            raise ContractError(
                f"metric `{extra[0]}` is not in this run's contract; allowed: {', '.join(self.metrics) or 'none'}"
            )


FIT_CONTRACT = Contract(arrays=(), metrics=(FIT_METRIC,))  # of every answer to a FitQuery, whatever the site lends


def conflict_name(task: str, other: str) -> str:
    """The round metric that holds the cosine of two tasks' gradients at the trunk's output."""
    first, second = sorted((task, other))
    return f"conflict.{first}.{second}"


def metric_names(tasks: tuple[TaskCard, ...]) -> tuple[str, ...]:
    """The numbers a site with these tasks may report each round: losses, two validation curves a task, one cosine a pair."""
    curves = [f"{card.task}.{model}" for card in tasks for model in ("federated", "local")]
    cosines = [conflict_name(task, later) for task, later in combinations(sorted(card.task for card in tasks), 2)]
    return (*ROUND_METRICS, *curves, *cosines)
