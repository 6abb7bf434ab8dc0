"""A run on disk: its name, its checkpoints with the records and the cohort, and how it is taken up again."""

import json
import secrets
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from numpy.typing import NDArray
from pydantic import ValidationError

from trunkline.config.renames import current
from trunkline.config.run import RunConfig
from trunkline.errors import ConfigError
from trunkline.runtime.storage import write_atomic
from trunkline.server.reporting.records import Refusal, RoundRecord
from trunkline.server.rounds.checkpoint import Checkpoint
from trunkline.server.rounds.disk_wait import DiskWait
from trunkline.strategies import StrategyState

KEY_FILE = "run.json"  # in a run's folder: the name the sites know it by


@dataclass(frozen=True)
class SavedRun:
    """A checkpoint, as a run goes on from it.

    Args:
        silent: sites that missed the last round.
        cohort: the members as plain values, and `arrays` their arrays; empty where they join anew.
    """

    state: StrategyState
    records: list[RoundRecord]
    silent: set[str]
    cohort: Mapping[str, Any]
    arrays: Mapping[str, NDArray[Any]]


class RunPersistence:
    """The files of one run.

    Args:
        out: the run's folder.
        key: names the run in the sites' vaults; None: made of the run's name and the time.
        disk_wait: waits while the disk is full.
        note: takes a sentence when a damaged checkpoint is passed over.
    """

    def __init__(
        self, out: Path, config: RunConfig, key: str | None, disk_wait: DiskWait, note: Callable[[str], None]
    ) -> None:
        self.out = out
        self.config = config
        self.key = key or f"{config.name}-{time.strftime('%Y%m%d-%H%M%S')}"
        self.disk_wait = disk_wait
        self.checkpoint = Checkpoint(out, note=note)
        self._digest = json.dumps(config.model_dump(mode="json"), sort_keys=True)
        self._seconds = 0.0  # of this run before it was resumed
        self._began = time.monotonic()

    @property
    def seconds(self) -> float:
        """Wall time of the run, over all its resumptions."""
        return self._seconds + time.monotonic() - self._began

    def keep_key(self, *, new: bool) -> None:
        """Put the run's key on disk before any site is asked.

        The sites know the run by its key. A server that is killed before its first checkpoint must not come back as another
        run.
        """
        path = self.out / KEY_FILE
        if not new:
            try:
                self.key = str(json.loads(path.read_bytes())["key"])
                return
            except (OSError, ValueError, KeyError, TypeError):
                pass  # none, or damaged: the checkpoint has it too, if there is one
        else:
            self.key = f"{self.key}-{secrets.token_hex(2)}"  # two runs of one name may begin in the same second
        self.disk_wait(lambda: write_atomic(path, json.dumps({"key": self.key}).encode()))

    def save(
        self, state: StrategyState, records: list[RoundRecord], silent: set[str], cohort: Mapping[str, Any],
        arrays: Mapping[str, NDArray[Any]],
    ) -> None:  # fmt: skip
        """A checkpoint of the run, as `restore` gives it back."""
        meta = {
            "key": self.key,
            "cohort": cohort,
            "config": self._digest,
            "records": [asdict(record) for record in records],
            "silent": sorted(silent),
            "seconds": self.seconds,
        }
        self.disk_wait(lambda: self.checkpoint.save(state, meta, arrays))

    def restore(self) -> SavedRun | None:
        """The newest intact checkpoint, whose key becomes this run's; None when no round was ever saved.

        Raises:
            ConfigError: it was made with another run.toml.
        """
        loaded = self.checkpoint.load()
        if loaded is None:
            return None
        state, meta = loaded
        if meta["config"] != self._digest:
            before, today = _with_defaults(json.loads(meta["config"])), json.loads(self._digest)
            changed = ", ".join(key for key in {**today, **before} if before.get(key) != today.get(key))
            if changed:
                raise ConfigError(
                    f"{self.checkpoint.shelf.folder}: this run was started with another run.toml (different: {changed}). "
                    "Resume with the settings it was started with, or give another --out."
                )
        self.key = meta["key"]
        self._seconds, self._began = meta["seconds"], time.monotonic()
        records = [
            RoundRecord(**{**record, "refused": [Refusal(**refusal) for refusal in record["refused"]]})
            for record in meta["records"]
        ]
        return SavedRun(state, records, set(meta.get("silent", ())), meta.get("cohort") or {}, meta["beside"])


def _with_defaults(config: dict[str, Any]) -> dict[str, Any]:
    """The settings of an older checkpoint, with the settings that are newer at their defaults."""
    try:
        return dict(RunConfig.model_validate(current(RunConfig, config)).model_dump(mode="json"))
    except ValidationError:
        return config
