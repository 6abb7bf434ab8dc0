"""The round in progress on disk: every admitted update, so that a centre that was killed does not ask for it again.

What is kept is the reply as it came. It goes through intake again when it is read back, and counts only as the answer to
the very question that was asked: the same order, with the same arrays.
"""

import hashlib
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trunkline.errors import StorageError
from trunkline.protocol.arrays import Arrays
from trunkline.protocol.messages import TrainRequest
from trunkline.runtime.storage import Shelf

Came = tuple[
    dict[str, NDArray[Any]], str, dict[str, float]
]  # arrays, header, metrics: what `flower.open_records` gives


class Journal:
    """Below `out`/journal: a folder a site, the reply of its newest round in it.

    Args:
        out: folder of the run.
        tell: called with a sentence when a reply cannot be kept, or what was kept is damaged.
    """

    def __init__(self, out: Path, tell: Callable[[str], None] = lambda text: None) -> None:
        self.folder = out / "journal"
        self.tell = tell
        self._full = False

    def keep(self, round: int, site: str, question: str, came: Came) -> None:
        """Write a reply down. A full disk costs nothing but that the site is asked again should the centre die now."""
        arrays, header, metrics = came
        meta = {"question": question, "header": header, "metrics": dict(metrics), "names": list(arrays)}
        try:
            self._shelf(site).put(round, dict(arrays), meta)
            self._full = False
        except StorageError as error:
            if not self._full:
                self.tell(f"{error} Until then a restart of the centre asks the sites of this round again.")
            self._full = True

    def find(self, round: int, site: str, question: str) -> Came | None:
        """The reply of `site` in `round`, if it answers this question and is intact."""
        shelf = self._shelf(site)
        if round not in shelf.rounds():
            return None
        try:
            tensors, meta = shelf.get(round)
            kept: Any = meta
            if kept["question"] != question:
                return None
            arrays = {name: np.asarray(tensors[name]) for name in kept["names"]}
            return arrays, str(kept["header"]), {name: float(value) for name, value in kept["metrics"].items()}
        except (StorageError, KeyError, TypeError, ValueError) as error:
            self.tell(f"{shelf.path(round)}: set aside, {site} is asked again ({error}).")
            return None

    def clear(self) -> None:
        """Forget it all: the run has its last trunk."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _shelf(self, site: str) -> Shelf:
        return Shelf(self.folder / site, keep=1, tell=self.tell)


def question_of(request: TrainRequest, served: Arrays) -> str:
    """Digest of what a site was asked."""
    return hashlib.sha256(f"{request.model_dump_json()}|{served.digest()}".encode()).hexdigest()


def update_digest(came: Came) -> str:
    """Digest of what a site answered, for the list of what was counted.

    Args:
        came: its arrays (sha256 over names, shapes, types and bytes), header and metrics.
    """
    arrays, header, metrics = came
    numbers = ",".join(f"{name}={value!r}" for name, value in sorted(metrics.items()))
    return hashlib.sha256(f"{Arrays(arrays).digest()}|{header}|{numbers}".encode()).hexdigest()
