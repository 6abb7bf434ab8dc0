"""State <-> file. A resumed run equals an undisturbed one: everything a round depends on is in here."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from trunkline.errors import ForeignState
from trunkline.protocol.arrays import Arrays
from trunkline.runtime.storage import Shelf
from trunkline.strategies import StrategyState


class Checkpoint:
    """The newest rounds of one run, under `out`/checkpoint.

    Args:
        out: folder of the run.
        note: takes a sentence when a damaged checkpoint is passed over.
    """

    def __init__(self, out: Path, note: Callable[[str], None] = lambda text: None) -> None:
        self.shelf = Shelf(out / "checkpoint", keep=3, tell=note, kind="checkpoint")

    def save(self, state: StrategyState, meta: dict[str, Any], extra: Mapping[str, NDArray[Any]] = {}) -> None:
        """Keep a round of the run whose key is `meta["key"]`.

        Args:
            extra: further arrays, by their names; `load` puts them into the meta as "beside".

        Raises:
            StorageError: it cannot be written (a full disk, say); the checkpoint before it stays.
            ForeignState: checkpoints of another run are here; they stay.
        """
        self.shelf.owner = str(meta.get("key", ""))
        tensors = {f"trunk/{name}": array for name, array in state.trunk.items()}
        for moment, arrays in state.moments.items():
            tensors |= {f"moment/{moment}/{name}": array for name, array in arrays.items()}
        tensors |= {f"beside/{name}": array for name, array in extra.items()}
        # names in order: safetensors sorts, and share() has an order of its own that digests depend on
        names = {
            "trunk": list(state.trunk),
            "moments": {moment: list(arrays) for moment, arrays in state.moments.items()},
        }
        self.shelf.put(state.round, tensors, {"names": names, "notes": state.notes, **meta})

    def load(self) -> tuple[StrategyState, dict[str, Any]] | None:
        """The newest intact state, or None when no round was ever saved.

        Raises:
            StorageError: as `Shelf.newest`. ForeignState: the files here are of two runs, or of a newer Trunkline.
        """
        if len(runs := self.shelf.owners()) > 1:
            raise ForeignState(
                f"{self.shelf.folder}: holds checkpoints of {len(runs)} runs ({', '.join(map(repr, sorted(runs)))}), so the one "
                "to go on with is unknown. Nothing was changed. Move those of the others away."
            )
        newest = self.shelf.newest()
        if newest is None:
            return None
        round, tensors, meta = newest
        names: Any = meta["names"]
        trunk = Arrays({name: tensors[f"trunk/{name}"] for name in names["trunk"]})
        moments = {
            moment: Arrays({name: tensors[f"moment/{moment}/{name}"] for name in order})
            for moment, order in names["moments"].items()
        }
        notes: Any = meta.get("notes", {})
        extra = {name.removeprefix("beside/"): array for name, array in tensors.items() if name.startswith("beside/")}
        return StrategyState(trunk, moments, round, notes), {**meta, "beside": extra}
