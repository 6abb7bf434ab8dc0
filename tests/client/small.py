"""A site of drawn table rows, in memory: what tests of the training loop need and no more."""

from collections.abc import Mapping

import numpy as np
import torch

from trunkline.client.training.device_dataset import DeviceDataset
from trunkline.config.tasks import TaskConfig
from trunkline.models.tasks import Task, make_task
from trunkline.models.trunk import TrunkModel, build_model
from trunkline.protocol.plan import TrunkSpec

torch.set_num_threads(1)
SPEC = TrunkSpec(backbone="mlp", width=32)  # at 8, its norms see two channels and know only which is larger


def resident(labels: Mapping[str, np.ndarray], *, window: int | None = None, channels: int = 4) -> DeviceDataset:
    """Drawn inputs beside the given labels; the first of them follows from the inputs, if it is asked for by name."""
    rows = len(next(iter(labels.values())))
    values = np.random.default_rng(1).normal(size=(rows, channels)).astype(np.float32)
    return DeviceDataset(
        values=torch.from_numpy(values),
        categorical=torch.zeros(rows, 0, dtype=torch.int64),
        first=torch.zeros(rows, dtype=torch.int64),
        ends=torch.arange(rows),
        window=window,
        labels={name: torch.from_numpy(np.asarray(label, np.float32)) for name, label in labels.items()},
    )


def learnable(rows: int = 200, channels: int = 4) -> dict[str, np.ndarray]:
    """Labels that follow from what `resident` draws: a measurement, another of it, and a rare event."""
    values = np.random.default_rng(1).normal(size=(rows, channels))
    return {
        "wear": 10.0 + 3.0 * values[:, 0] + values[:, 1],
        "heat": np.tanh(values[:, 2]) - values[:, 0],
        "failing": (values[:, 1] + values[:, 3] > 1.5).astype(float),
    }


def tasks_for(labels: Mapping[str, np.ndarray], **weights: float) -> dict[str, Task]:
    """Fitted tasks: binary where all labels are 0 or 1, else regression."""
    tasks = {}
    for name, label in labels.items():
        known = label[~np.isnan(label)]
        kind = "binary" if set(np.unique(known)) <= {0.0, 1.0} else "regression"
        tasks[name] = make_task(name, TaskConfig(kind=kind, target=name, loss=None, weight=weights.get(name, 1.0)))
        tasks[name].fit(np.asarray(label, np.float32))
    return tasks


def model_for(tasks: Mapping[str, Task], *, spec: TrunkSpec = SPEC, window: int | None = None) -> TrunkModel:
    return build_model(spec, window=window, channels=4, categories=(), tasks=tasks, seed=0)
