"""The public Python API. The command line calls the same functions, so both behave alike.

Nothing heavy is imported until a function is called.
"""

from trunkline.api.calls import adapt, check_site, read_run, read_site, simulate
from trunkline.api.results import Adaptation, SimulationResult, SiteCheck
from trunkline.errors import TrunklineError

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
