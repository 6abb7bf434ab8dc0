"""What workers of the tests of Ray do instead of training."""

import os
import time
from pathlib import Path
from typing import Any

import numpy as np
from flwr.app import Context, Message

from trunkline.flower.records import open_records, to_records
from trunkline.simulations.ray.site_host import SiteHost


class NoOp:
    """Answers an array of `SIZE` float32 and who it was."""

    SIZE = 1000

    def __init__(self, where: str) -> None:
        self.where = where
        self.array = np.arange(self.SIZE, dtype=np.float32)

    def open(self, context: Context) -> tuple[str | None, float]:
        return None, 0.0

    def answer(self, message: Message, context: Context) -> Message:
        arrays, _, _ = open_records(message.content)
        total = float(sum(array.sum() for array in arrays.values()))
        return Message(to_records({"w": self.array}, self.where, {"total": total}), reply_to=message)


class Showing(NoOp):
    """Says which GPUs its process may see."""

    def __init__(self, where: str) -> None:
        super().__init__(os.environ.get("CUDA_VISIBLE_DEVICES", ""))


class Bulky(NoOp):
    SIZE = 1 << 20  # 4 MiB


class Deadly(SiteHost):
    """A real host with which the site kiln-02's training ends the process, as the kernel does when memory runs out."""

    def answer(self, message: Message, context: Context) -> Message:
        if message.metadata.message_type == "train" and Path(str(context.node_config["site"])).name == VICTIM:
            os._exit(1)
        return super().answer(message, context)


class Slow(SiteHost):
    """A real host whose sites take a second to train, far longer than their rows take to read."""

    def answer(self, message: Message, context: Context) -> Message:
        if message.metadata.message_type == "train":
            time.sleep(1.0)
        return super().answer(message, context)

    def open(self, context: Context) -> tuple[str | None, float]:
        return super().open(context)[0], 0.01  # however busy the machine of a test


VICTIM = "kiln-02"


def totals(content: Any) -> tuple[str, float]:
    """Who answered, and the sum of what it was asked."""
    _, where, metrics = open_records(content)
    return where, metrics["total"]
