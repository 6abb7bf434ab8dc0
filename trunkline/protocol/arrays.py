"""Named arrays that cannot be changed, and what is known of them before they travel."""

import hashlib
import math
from collections.abc import Iterator, Mapping
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from trunkline.protocol.frozen import Frozen

# (regimes, channels) three times; (regimes, settings), in the settings' own units; (settings,), the width of each range
SCALER_ARRAYS = ("scaler.count", "scaler.mean", "scaler.variance", "scaler.centres", "scaler.widths")


class Arrays(Mapping[str, NDArray[Any]]):
    """An ordered, read-only map of parameter name -> array; one dtype and shape a name.

    The arrays are views marked read-only: who wants to change one makes a copy, so that a trunk handed to two sites
    can never be changed by one of them.
    """

    def __init__(self, arrays: Mapping[str, NDArray[Any]] | None = None) -> None:
        self._arrays: dict[str, NDArray[Any]] = {}
        for name, array in (arrays or {}).items():
            view = np.asarray(array).view()
            view.flags.writeable = False
            self._arrays[name] = view

    def __getitem__(self, name: str) -> NDArray[Any]:
        return self._arrays[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._arrays)

    def __len__(self) -> int:
        return len(self._arrays)

    def __repr__(self) -> str:
        return f"Arrays({len(self)} names, {self.nbytes} bytes)"

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays together, without names or framing."""
        return sum(array.nbytes for array in self._arrays.values())

    def only(self, names: Mapping[str, object] | set[str] | tuple[str, ...]) -> "Arrays":
        """The arrays of `names`, in the order they have here."""
        return Arrays({name: array for name, array in self.items() if name in names})

    def digest(self) -> str:
        """sha256 over names, dtypes, shapes and bytes in order: equal digests are byte-equal trunks."""
        total = hashlib.sha256()
        for name, array in self.items():
            total.update(f"{name}|{array.dtype.str}|{array.shape}|".encode())
            total.update(np.ascontiguousarray(array).tobytes())
        return total.hexdigest()


class ArraySpec(Frozen):
    """Name, shape and dtype of one array that may travel."""

    name: str = Field(max_length=256)
    shape: tuple[int, ...]
    dtype: Literal["float32", "float64", "float16"] = "float32"

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * np.dtype(self.dtype).itemsize


def specs_of(arrays: Arrays) -> tuple[ArraySpec, ...]:
    """The contract lines of `arrays`, in order."""
    return tuple(ArraySpec(name=name, shape=array.shape, dtype=array.dtype.name) for name, array in arrays.items())  # type: ignore[arg-type]


def seed_of(*parts: object) -> int:
    """A 63-bit seed from anything printable, the same on every machine: `seed_of(run_seed, site, round)`."""
    return int.from_bytes(hashlib.sha256("/".join(str(part) for part in parts).encode()).digest()[:8], "big") >> 1
