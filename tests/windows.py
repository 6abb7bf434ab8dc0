"""The samples of a WindowSet as arrays, through the gather that training and scoring use."""

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from trunkline.client.data import WindowSet
from trunkline.client.training.device_dataset import DeviceDataset


def batch_of(samples: WindowSet, index: Any = slice(None)) -> NDArray[np.float32]:
    """The samples at `index` (positions, a mask or a slice): (b, channels, window), or (b, channels) for rows."""
    positions = torch.from_numpy(np.arange(len(samples))[index])
    x, _ = DeviceDataset.of(samples, torch.device("cpu")).batch(positions)
    batch: NDArray[np.float32] = x.numpy()
    return batch
