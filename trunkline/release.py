"""A released trunk: one safetensors file with a card, made by the centre at the end of a run, taken home by a new plant.

The card lies in the file's own metadata, so that no trunk goes about without it. Nothing in it is a row: names, shapes
by way of the spec, and figures over at least ten values each.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

import numpy as np
import safetensors
import safetensors.numpy
from numpy.typing import NDArray
from pydantic import Field, ValidationError, model_validator

from trunkline.errors import StorageError
from trunkline.exchange import Arrays, Frozen, TaskCard, TrunkSpec
from trunkline.storage import Sealing, write_private

FORMAT = 1
RELEASE = "trunk.safetensors"  # in the folder of a run
COHORT_RELEASE = "trunk-{}.safetensors"  # beside it, where a run ended with several trunks
KEY = "trunkline"  # of the card in the file's metadata
Table = tuple[tuple[float, ...], ...]


class PooledScale(Frozen):
    """Count, mean and variance of the sites' inputs together, per operating regime and channel.

    Args:
        settings: the columns that tell regimes apart; sites with other settings have a PooledScale of their own.
        widths: (settings,) width of each setting's range at the site where it was widest, in the setting's unit.
        centres: (regimes, settings) in the settings' units.
        count, mean, variance: (regimes, channels); count 0 where no site had enough values.
    """

    settings: tuple[str, ...]
    widths: tuple[float, ...]
    centres: Table
    channels: tuple[str, ...]
    count: Table
    mean: Table
    variance: Table

    @model_validator(mode="after")
    def _one_shape(self) -> Self:
        regimes, settings, channels = len(self.centres), len(self.settings), len(self.channels)
        for table, columns in (
            (self.centres, settings),
            *((one, channels) for one in (self.count, self.mean, self.variance)),
        ):
            if len(table) != regimes or any(len(row) != columns for row in table):
                raise ValueError(f"a table of the scaler is not {regimes} regimes x {columns}")
        if len(self.widths) != settings:
            raise ValueError(f"{len(self.widths)} widths for {settings} settings")
        return self


class LabelScale(Frozen):
    """By what the sites scale one task's label: pooled mean and standard deviation over `count` labelled samples."""

    count: float = Field(gt=0.0)
    mean: float
    std: float = Field(gt=0.0)


class Card(Frozen):
    """What a released trunk is, in words and figures.

    Args:
        run, key: name of the run, and what the sites' vaults call it.
        seed: what parts that were not lent start from, as at the run's own sites.
        lend: what the run lent; the arrays say what of it there is.
        window: rows a window at the sites; None: they differ, did not say, or read single rows.
        sites: who took part.
        tasks: of the lent heads.
        channels: inputs of the lent stem in order; None: no stem was lent, or the sites call them differently.
        scales: statistics of the sites' inputs, if lent, one a set of settings.
        labels: task -> the scale of its label, if lent.
        versions: of Trunkline at the centre and at the sites.
    """

    format: int = FORMAT
    run: str
    key: str
    rounds: int
    seed: int
    strategy: str
    trunk: TrunkSpec
    lend: tuple[str, ...]
    window: int | None
    sites: tuple[str, ...]
    tasks: tuple[TaskCard, ...]
    channels: tuple[str, ...] | None
    scales: tuple[PooledScale, ...] = ()
    labels: dict[str, LabelScale] = Field(default={})
    versions: tuple[str, ...]


def write_release(path: Path, arrays: Arrays, card: Card) -> None:
    """Put arrays and card at `path`; equal arguments give equal bytes.

    Raises:
        StorageError: it cannot be written; what was there is untouched.
    """
    # one key of metadata: several would be written in whatever order a hash gives them
    about = {"card": card.model_dump(mode="json"), "names": list(arrays)}
    write_tensors(path, arrays, {KEY: json.dumps(about)})


def write_tensors(
    path: Path,
    arrays: Mapping[str, NDArray[Any]],
    metadata: dict[str, str],
    seal: Sealing | None = None,
    about: str = "",
) -> None:
    """A safetensors file, written so that a crash leaves the old one or the new one; with a seal encrypted as `about`."""
    tensors = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
    write_private(path, safetensors.numpy.save(tensors, metadata=metadata), seal, about, mode=0o644)


def read_tensors(
    path: Path, key: str, what: str, content: bytes | None = None
) -> tuple[dict[str, NDArray[Any]], dict[str, str]]:
    """Arrays and metadata of a safetensors file that anybody may have written or cut short.

    Args:
        key: of the metadata that makes it one of ours.
        what: the file should be, for errors.
        content: of the file, where it was decrypted already.

    Raises:
        StorageError: it is absent, damaged, or not `what`.
    """
    try:
        if content is not None:
            tensors = safetensors.numpy.load(content)
            head = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
            return tensors, _ours(path, head.get("__metadata__") or {}, key, what)
        with safetensors.safe_open(path, framework="numpy") as file:
            metadata = _ours(path, file.metadata() or {}, key, what)
            return {name: file.get_tensor(name) for name in file.keys()}, metadata  # noqa: SIM118  (no mapping)
    except FileNotFoundError:
        raise StorageError(f"{path}: no such file. A run writes `{RELEASE}` into its --out folder.") from None
    except (OSError, safetensors.SafetensorError, ValueError, TypeError) as error:
        raise StorageError(
            f"{path}: damaged, or not {what} ({type(error).__name__}: {error}). Copy it again from where it was made."
        ) from None


def _ours(path: Path, metadata: dict[str, str], key: str, what: str) -> dict[str, str]:
    if key not in metadata:
        raise StorageError(f"{path}: a safetensors file, but not {what}: its metadata has no `{key}`.")
    return metadata


def read_release(path: Path) -> tuple[Arrays, Card]:
    """A released trunk.

    Raises:
        StorageError: the file is absent, damaged, of another format, or no trunk at all; the text says which.
    """
    tensors, metadata = read_tensors(path, KEY, "a trunk of Trunkline")
    try:
        about = json.loads(metadata[KEY])
        table = about["card"]
        found = table.get("format")
        if found != FORMAT:
            raise StorageError(
                f"{path}: a trunk of format {found!r}; this Trunkline reads {FORMAT}. Update the older of the two."
            )
        card = Card.model_validate(table)
        names = about["names"]
        if sorted(names) != sorted(tensors):
            raise StorageError(f"{path}: damaged: its arrays are not the ones its card lists. Copy it again.")
        arrays = Arrays({name: tensors[name] for name in names})
    except (ValidationError, ValueError, KeyError, TypeError, AttributeError) as error:
        text = error.errors()[0]["msg"] if isinstance(error, ValidationError) else str(error)
        raise StorageError(f"{path}: its card is damaged ({text}). Copy it again from where it was made.") from None
    for name, array in arrays.items():
        if array.dtype != np.float32 or not np.isfinite(array).all():
            raise StorageError(
                f"{path}: `{name}` holds {array.dtype} with NaN or infinity, or no float32 at all. Do not use it."
            )
    if not any(name.startswith("trunk.") for name in arrays):
        raise StorageError(
            f"{path}: no array of it belongs to a trunk; its run lent {', '.join(card.lend) or 'nothing'}."
        )
    return arrays, card
