"""What a site may say of its inputs' and labels' scale: counts, means and variances, never a row.

They travel once, with the Offer, where the run lends "scaler" and the site's own policy names it too.
"""

import numpy as np
from numpy.typing import NDArray

from trunkline.client.data.preprocess.scale import Scaler
from trunkline.client.data.site_data import SiteData
from trunkline.models.labels import known
from trunkline.models.tasks.task import Task
from trunkline.protocol.arrays import Arrays
from trunkline.protocol.messages import Inputs

FEWEST = 10  # values behind a mean that travels: the mean of one value is that value
Floats = NDArray[np.float64]


def names_of(data: SiteData) -> Inputs:
    """The names behind the columns of the stem and of the statistics."""
    return Inputs(channels=data.channels, settings=data.scaler.regimes.settings, window=data.config.data.window)


def lent_statistics(data: SiteData) -> Arrays:
    """`exchange.SCALER_ARRAYS` and one `scaler.label.<task>` (count, mean, variance) a task with a scale of its own.

    Figures of fewer than FEWEST values are left out: their count, mean and variance are 0. A site that takes its
    values as they are (`scale = "none"`) has no statistics of its inputs to give.
    """
    arrays: dict[str, Floats] = {}
    if data.config.data.scale == "zscore":
        arrays |= _of_inputs(data.scaler)
    for name, task in data.tasks.items():
        scale = label_scale(task)
        count = int(known(data.train.labels[name]).sum())
        if scale is not None and count >= FEWEST:
            arrays[f"scaler.label.{name}"] = np.array([count, scale[0], scale[1] ** 2])
    return Arrays(arrays)


def label_scale(task: Task) -> tuple[float, float] | None:
    """(mean, standard deviation) by which a task scales its label; None where it has none (classes)."""
    state = task.state()
    mean, std = state.get("mean"), state.get("std")
    return (mean, std) if isinstance(mean, float) and isinstance(std, float) else None


def set_label_scale(task: Task, mean: float, std: float) -> None:
    """Have `task` scale its label like others do, so that a head trained by them speaks in the same unit."""
    task.load_state({**task.state(), "mean": mean, "std": std})


def _of_inputs(scaler: Scaler) -> dict[str, Floats]:
    enough = scaler.count >= FEWEST
    low, width = (np.array([span[end] for span in scaler.regimes.spans], dtype=np.float64) for end in (0, 1))
    shares = np.array(scaler.regimes.centres, dtype=np.float64).reshape(len(scaler.regimes), len(width))
    return {
        "scaler.count": np.where(enough, scaler.count, 0).astype(np.float64),
        "scaler.mean": np.where(enough, scaler.mean, 0.0),
        "scaler.variance": np.where(enough, scaler.std**2, 0.0),
        "scaler.centres": low + shares * width,
        "scaler.widths": width,
    }
