"""How good the models are on rows nobody trained on, with an interval over what belongs together."""

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy
from numpy.typing import NDArray

from trunkline.client.data import WindowSet
from trunkline.client.gate import choose
from trunkline.client.site import Site
from trunkline.client.training import Resident, outputs_of, total_loss
from trunkline.exchange import TaskRow, seed_of
from trunkline.models.labels import known as is_known
from trunkline.models.tasks.task import Task
from trunkline.models.trunk import TrunkModel
from trunkline.storage import write_atomic

RESAMPLES = 1000  # of the bootstrap; the ends of a 95 % interval then rest on 25 resamples each


@dataclass(frozen=True)
class Curve:
    """A model's validation loss and each task's primary metric, for one point of the learning curves."""

    loss: float
    metrics: dict[str, float]


def curve(model: TrunkModel, data: Resident, tasks: dict[str, Task]) -> Curve:
    outputs = outputs_of(model, data, tasks)
    labels = {name: column.cpu() for name, column in data.labels.items()}
    metrics: dict[str, float] = {}
    for name, task in tasks.items():
        value = task.score(task.predict(outputs[name]), labels[name].numpy())
        if value is not None and np.isfinite(value):
            metrics[name] = value
    return Curve(float(total_loss(outputs, labels, tasks)), metrics)


def paired_bootstrap(
    federated: "Scored", local: "Scored", labels: NDArray[np.float32], groups: NDArray[np.int32], seed: int
) -> tuple[float, float] | None:
    """95 % interval of (federated minus local) of the primary metric, resampling whole test groups (Efron 1979).

    Rows of one engine or coil are not independent, so groups are drawn, not rows; both models are scored on the same draw.

    Returns:
        None below two labelled groups: there is nothing to resample.
    """
    known = np.flatnonzero(is_known(labels))
    codes, member = np.unique(groups[known], return_inverse=True)
    if len(codes) < 2:
        return None
    by_group = np.split(known[np.argsort(member, kind="stable")], np.cumsum(np.bincount(member))[:-1])
    draw = np.random.default_rng(seed)
    differences = []
    for _ in range(RESAMPLES):
        rows = np.concatenate([by_group[one] for one in draw.integers(0, len(codes), len(codes))])
        one = federated.task.score(federated.prediction[rows], labels[rows])
        other = local.task.score(local.prediction[rows], labels[rows])
        if one is not None and other is not None:  # a draw without a single failure has no F1
            differences.append(one - other)
    if len(differences) < RESAMPLES // 2:
        return None
    low, high = np.quantile(differences, [0.025, 0.975])
    return float(low), float(high)


@dataclass(frozen=True)
class Scored:
    """One model on one task: what it predicts on the test rows, and how it did on validation.

    `task` is a copy of the site's, calibrated for this model: two models decide at two thresholds.
    """

    task: Task
    prediction: NDArray[Any]
    on_validation: float | None


def score_site(
    site: Site, federated: TrunkModel, local: TrunkModel | None, *, seed: int, run: str
) -> tuple[TaskRow, ...]:
    """The site's rows of the worth-it report; its row-level predictions stay in its state folder.

    Args:
        federated: the final trunk with the site's own stem and heads.
        local: the twin that trained alone, or None when the run wanted no baseline.
        seed: of the bootstrap.
    """
    models = {"federated": federated} | ({"local": local} if local is not None else {})
    validation = {who: outputs_of(model, site.resident("validation"), site.data.tasks) for who, model in models.items()}
    test = {who: outputs_of(model, site.resident("test"), site.data.tasks) for who, model in models.items()}
    rows = []
    for name, task in site.data.tasks.items():
        scored: dict[str, Scored] = {}
        for who in models:
            own, labels = copy.copy(task), site.data.validation.labels[name]
            known = own.predict(validation[who][name])
            own.calibrate(known, labels)
            scored[who] = Scored(own, own.predict(test[who][name]), own.score(known, labels))
        rows.append(_row(site, task, scored, seed))
        _keep_predictions(site.state / "evaluation" / run / f"{name}.safetensors", site.data.test.labels[name], scored)
    return tuple(rows)


def _row(site: Site, task: Task, scored: dict[str, Scored], seed: int) -> TaskRow:
    data, name = site.data, task.name
    truth, groups = data.test.labels[name], data.test.groups
    measured = {who: one.task.measure(one.prediction, truth) for who, one in scored.items()}
    federated, local = scored["federated"], scored.get("local")
    interval = paired_bootstrap(federated, local, truth, groups, seed_of(seed, site.name, name)) if local else None
    primary = task.card.metric
    others = sorted({metric for one in measured.values() for metric in one} - {primary})
    return TaskRow(
        **task.card.model_dump(),
        n_train=_labelled(data.train, name),
        n_validation=_labelled(data.validation, name),
        n_test=_labelled(data.test, name),
        n_groups=len(np.unique(groups[is_known(truth)])),
        local=measured["local"][primary] if local else None,
        federated=measured["federated"][primary],
        chosen=choose(task, local.on_validation if local else None, federated.on_validation),
        interval=interval,
        more={metric: {who: one.get(metric) for who, one in measured.items()} for metric in others},
    )


def _labelled(windows: WindowSet, task: str) -> int:
    return int(is_known(windows.labels[task]).sum())


def _keep_predictions(path: Path, truth: NDArray[Any], scored: dict[str, Scored]) -> None:
    """Row-level results for the plant's own plots. They are data: they lie beside the vault and no message has a type for them."""
    tensors = {
        "truth": np.ascontiguousarray(truth),
        **{who: np.ascontiguousarray(one.prediction, dtype=np.float32) for who, one in scored.items()},
    }
    write_atomic(path, safetensors.numpy.save(tensors))
