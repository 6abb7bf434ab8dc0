"""Trunkline: factories train one shared backbone together and keep everything else at the plant.

`import trunkline as tl` gives the functions below; docs/reference.md describes each. They are imported at their first
use, because torch and Ray take seconds and a program may never need them.
"""

import importlib
from typing import TYPE_CHECKING

__version__ = "0.1.0"

if TYPE_CHECKING:
    from trunkline.api import (
        Adaptation,
        SimulationResult,
        SiteCheck,
        TrunklineError,
        adapt,
        check_site,
        read_run,
        read_site,
        simulate,
    )
else:

    def __getattr__(name: str) -> object:
        if name not in __all__:
            raise AttributeError(f"module 'trunkline' has no attribute {name!r}")
        value = getattr(importlib.import_module("trunkline.api"), name)
        globals()[name] = value
        return value

    def __dir__() -> list[str]:
        return sorted({*globals(), *__all__})


__all__ = [
    "Adaptation",
    "SimulationResult",
    "SiteCheck",
    "TrunklineError",
    "adapt",
    "check_site",
    "read_run",
    "read_site",
    "simulate",
]
