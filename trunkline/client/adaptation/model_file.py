"""An adapted model on disk: weights, how inputs are scaled, how tasks speak, all in one safetensors file."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from trunkline.client.data import Scaler, WindowSet
from trunkline.client.training.device_dataset import DeviceDataset
from trunkline.client.training.loop import outputs_of
from trunkline.config.renames import current
from trunkline.config.tasks import TaskConfig
from trunkline.errors import StorageError, TrunklineError
from trunkline.models.tasks import make_task
from trunkline.models.tasks.task import Task
from trunkline.models.trunk import TrunkModel, build_model
from trunkline.protocol.plan import TrunkSpec
from trunkline.release import read_tensors, write_tensors
from trunkline.runtime.storage import read_private
from trunkline.security.encryption import find_seal_of

FORMAT = 1
MODEL = "model.safetensors"
KEY = "trunkline-model"


@dataclass(frozen=True)
class StoredModel:
    """A model that is ready to predict at its site.

    Args:
        scaler: raw rows -> what `model` reads.
        window: rows a window, or None for single rows.
        card: everything else that the file says of the model, as plain values.
    """

    model: TrunkModel
    tasks: dict[str, Task]
    scaler: Scaler
    window: int | None
    card: dict[str, Any]

    def predict(self, samples: WindowSet) -> dict[str, NDArray[np.float32]]:
        """What each task predicts for the samples, by the forward pass that evaluation makes.

        Args:
            samples: n windows or rows of the site, scaled as its training rows, with their categorical codes; such as
                `open_data(folder).test`.

        Returns:
            task -> (n,) or (n, k), as its kind gives predictions.
        """
        data = DeviceDataset.of(samples, torch.device("cpu"))
        outputs = outputs_of(self.model, data, self.tasks)
        return {name: task.predict(outputs[name]) for name, task in self.tasks.items()}


def write_model(
    path: Path, model: TrunkModel, spec: TrunkSpec, tasks: dict[str, Task], scaler: Scaler, window: int | None,
    categories: tuple[tuple[str, ...], ...], seed: int, about: dict[str, Any],
) -> None:  # fmt: skip
    """Put a model at `path`; it belongs to the site, and nothing sends it anywhere. Below a sealed state it is encrypted.

    Args:
        tasks: settled for this model, where their kinds want that (`Task.fits_outputs`).

    Raises:
        StorageError: the file cannot be written. TrustError: the state is sealed and its key is not here.
    """
    card = {
        "format": FORMAT,
        "trunk": spec.model_dump(),
        "window": window,
        "categories": [list(names) for names in categories],
        "scaler": scaler.to_dict(),
        "seed": seed,
        "tasks": {name: {"config": task.config.model_dump(mode="json", exclude_unset=True), "state": task.state()} for name, task in tasks.items()},
        **about,
    }  # fmt: skip
    write_tensors(path, model.private(()), {KEY: json.dumps(card)}, *find_seal_of(path))


def read_model(path: Path) -> StoredModel:
    """What `write_model` put at `path`, on the CPU. An encrypted one opens where it was written, below its sealed state.

    Raises:
        StorageError: the file is absent, damaged, of another format, or another kind of file.
        TrustError: it is encrypted and its key is not here, or it is plain and should not be.
    """
    seal, about = find_seal_of(path)
    try:
        content = read_private(path, seal, about)
    except OSError:
        content = None  # the next line says what is wrong with it
    tensors, metadata = read_tensors(path, KEY, "a model of `trunkline adapt`", content)
    try:
        card = json.loads(metadata[KEY])
        if card["format"] != FORMAT:
            raise StorageError(
                f"{path}: format {card['format']}; this Trunkline reads {FORMAT}. Update the older of the two."
            )
        tasks = {}
        for name, entry in card["tasks"].items():
            tasks[name] = make_task(name, TaskConfig.model_validate(current(TaskConfig, entry["config"])))
            tasks[name].load_state(entry["state"])
        scaler = Scaler.from_dict(card["scaler"])
        model = build_model(
            TrunkSpec.model_validate(card["trunk"]), window=card["window"], channels=len(scaler.channels),
            categories=tuple(len(names) + 1 for names in card["categories"]), tasks=tasks, seed=card["seed"],
        )  # fmt: skip
        model.restore(tensors, ())
    except (ValueError, KeyError, TypeError, AttributeError, TrunklineError) as error:
        if isinstance(error, StorageError):
            raise
        raise StorageError(f"{path}: its card is damaged ({type(error).__name__}: {error}). Adapt again.") from None
    return StoredModel(model, tasks, scaler, card["window"], card)
