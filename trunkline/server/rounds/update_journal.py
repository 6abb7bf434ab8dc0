"""The round in progress on disk: every admitted update, so that a server that was killed does not ask for it again.

The reply is stored as it came. It goes through admission again when it is read back, and counts only as the answer to
the same question: the same request, with the same arrays.
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

Content = tuple[dict[str, NDArray[Any]], str, dict[str, float]]  # arrays, header, metrics, as `open_records` gives them


class UpdateJournal:
    """Below `out`/journal: a folder a site, the reply of its newest round in it.

    Args:
        out: folder of the run.
        note: takes a sentence when a reply cannot be stored, or a stored one is damaged.
    """

    def __init__(self, out: Path, note: Callable[[str], None] = lambda text: None) -> None:
        self.folder = out / "journal"
        self.note = note
        self._full = False

    def keep(self, round: int, site: str, question: str, content: Content) -> None:
        """Store a reply. On a full disk it is not stored, and a server that is killed now asks the site again."""
        arrays, header, metrics = content
        meta = {"question": question, "header": header, "metrics": dict(metrics), "names": list(arrays)}
        try:
            self._shelf(site).put(round, dict(arrays), meta)
            self._full = False
        except StorageError as error:
            if not self._full:
                self.note(f"{error} Until then a restart of the server asks the sites of this round again.")
            self._full = True

    def find(self, round: int, site: str, question: str) -> Content | None:
        """The reply of `site` in `round`, if it answers this question and is intact."""
        shelf = self._shelf(site)
        if round not in shelf.rounds():
            return None
        try:
            tensors, meta = shelf.get(round)
            stored: Any = meta
            if stored["question"] != question:
                return None
            arrays = {name: np.asarray(tensors[name]) for name in stored["names"]}
            return arrays, str(stored["header"]), {name: float(value) for name, value in stored["metrics"].items()}
        except (StorageError, KeyError, TypeError, ValueError) as error:
            self.note(f"{shelf.path(round)}: set aside, {site} is asked again ({error}).")
            return None

    def clear(self) -> None:
        """Delete the journal: the run has its last trunk."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _shelf(self, site: str) -> Shelf:
        return Shelf(self.folder / site, keep=1, tell=self.note)


def question_of(request: TrainRequest, served: Arrays) -> str:
    """Digest of a request with its arrays."""
    return hashlib.sha256(f"{request.model_dump_json()}|{served.digest()}".encode()).hexdigest()


def update_digest(content: Content) -> str:
    """Digest of a reply, for the list of those that were counted.

    Args:
        content: its arrays (sha256 over names, shapes, types and bytes), header and metrics.
    """
    arrays, header, metrics = content
    numbers = ",".join(f"{name}={value!r}" for name, value in sorted(metrics.items()))
    return hashlib.sha256(f"{Arrays(arrays).digest()}|{header}|{numbers}".encode()).hexdigest()
