"""The task that the executor has claimed, on disk, so that the next process can answer for it."""

import json
import logging
from pathlib import Path
from typing import Any

from trunkline.errors import StorageError
from trunkline.runtime.storage import write_atomic

logger = logging.getLogger("trunkline.executor")


class TaskJournal:
    """One file with the claimed task; without it, Flower would let a killed worker's task expire after a minute.

    Three stages: claimed (token only), begun (with the envelope, enough for an error reply), answered.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def write(self, token: str, kind: str, envelope: dict[str, Any] | None = None, answered: bool = False) -> None:
        record = {"token": token, "type": kind, "envelope": envelope, "answered": answered}
        write_atomic(self.path, json.dumps(record).encode())

    def read(self) -> dict[str, Any] | None:
        try:
            record = json.loads(self.path.read_bytes())
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as error:
            logger.warning("the journal cannot be read (%s) and is deleted", error)
            self.clear()
            return None
        return record if isinstance(record, dict) and isinstance(record.get("token"), str) else None

    def clear(self) -> None:
        try:
            self.path.unlink(missing_ok=True)
        except OSError as error:
            raise StorageError(f"{self.path}: cannot be removed ({error.strerror}).") from error
