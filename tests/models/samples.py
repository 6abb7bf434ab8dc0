"""Small sites for the model tests."""

import numpy as np
import torch
from torch import Tensor

from trunkline.config.tasks import TaskConfig
from trunkline.models.backbones import BACKBONES
from trunkline.models.tasks import Task, make_task
from trunkline.models.trunk import TrunkModel, build_model
from trunkline.protocol.plan import TrunkSpec

torch.set_num_threads(1)

# every kind, and within a kind every loss or head of its own
CONFIGS = {
    "rul": TaskConfig(kind="regression", target="rul", unit="cycles", cap=125.0),
    "wear": TaskConfig(kind="regression", target="wear", unit="mm", loss="mse"),
    "late": TaskConfig(kind="regression", target="late", unit="h", loss="pinball", quantile=0.9),
    "failing": TaskConfig(kind="binary", target="failing"),
    "load": TaskConfig(kind="forecast", target="load", unit="kWh", horizons=(1, 4), season=4),
    "leak": TaskConfig(kind="anomaly", target="leak", latent=3),
    "fault": TaskConfig(kind="multiclass", target="fault", classes=("none", "fan", "hpc")),
    "stage": TaskConfig(kind="multiclass", target="stage", classes=("new", "worn", "old", "dead"), ordinal=True),
    "rare": TaskConfig(kind="binary", target="rare", class_weights="none", focal=2.0, label_smoothing=0.1),
    "hard": TaskConfig(kind="multiclass", target="hard", classes=("a", "b", "c"), focal=0.5, label_smoothing=0.1),
    "right": TaskConfig(kind="multiclass", target="right", classes=("a", "b"), class_weights="none", metric="accuracy"),
    "grade": TaskConfig(kind="ordinal", target="grade", classes=("3", "20", "100")),
    "alarms": TaskConfig(kind="multilabel", targets=("jam", "heat", "door")),
    "modes": TaskConfig(kind="multilabel", targets=("jam", "heat", "door"), loss="asymmetric", metric="macro_f1"),
}


def labels_of(task: Task, rows: int, seed: int = 0) -> np.ndarray:
    """Drawn labels that `task` could have, every class among them."""
    draw = np.random.default_rng(seed)
    if task.kind == "regression":
        return draw.uniform(0, 200, rows).astype(np.float32)
    if task.kind == "forecast":  # what comes, and what came a season before it
        return draw.uniform(0, 200, (rows, 2 * len(task.config.horizons))).astype(np.float32)
    if task.kind == "anomaly":  # flag, whether the window holds one, group, time in it
        flag, row = draw.permutation(np.arange(rows) % 3 == 0), np.arange(rows)
        return np.stack([flag, flag, row // 10, row % 10], axis=1).astype(np.float32)
    if task.kind == "multilabel":  # every second, third, fourth sample, each shuffled
        every = np.arange(rows)[:, None] % np.arange(2, 2 + task.outputs) == 0
        return draw.permuted(every, axis=0).astype(np.float32)
    classes = 2 if task.kind == "binary" else len(task.config.classes or ())
    return draw.permutation(np.arange(rows) % classes).astype(np.float32)


def unlabelled(task: Task, rows: int) -> np.ndarray:
    """The same, all of them missing."""
    return np.full_like(labels_of(task, rows), np.nan)


def tasks_of(*names: str) -> dict[str, Task]:
    """Fitted tasks, by default one of each."""
    tasks = {name: make_task(name, CONFIGS[name]) for name in names or CONFIGS}
    for task in tasks.values():
        task.fit(labels_of(task, 60))
    return tasks


def site(spec: TrunkSpec, *, channels: int = 3, tasks: dict[str, Task] | None = None, seed: int = 0) -> TrunkModel:
    """A site whose samples are what the backbone reads."""
    rows = BACKBONES[spec.backbone].reads == "rows"
    return build_model(
        spec,
        window=None if rows else 16,
        channels=channels,
        categories=(4, 2) if rows and spec.columns is None else (),
        tasks=tasks_of("rul", "fault") if tasks is None else tasks,
        seed=seed,
    )


def batch(spec: TrunkSpec, size: int = 5, channels: int = 3, time: int = 16, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Inputs for `site(spec)`."""
    draw = torch.Generator().manual_seed(seed)
    if BACKBONES[spec.backbone].reads == "rows":
        codes = torch.stack([torch.randint(count, (size,), generator=draw) for count in (4, 2)], dim=1)
        if spec.columns is not None:  # a code is no number
            codes = codes[:, :0]
        return torch.randn(size, channels, generator=draw), codes
    return torch.randn(size, channels, time, generator=draw), torch.zeros(size, 0, dtype=torch.int64)


def spec_of(backbone: str, norm: str = "group", size: str = "small", *, channels: int = 3, **more: object) -> TrunkSpec:
    """A trunk for `site(..., channels=channels)`: only a backbone without stem has to be told how many there are."""
    columns = channels if backbone == "linear" else None
    return TrunkSpec(backbone=backbone, norm=norm, size=size, columns=columns, **more)  # type: ignore[arg-type]
