"""The guard `clip`: a limit for the L2 norm of what a site sends in a round."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import numpy as np
from pydantic import Field, model_validator

from trunkline.errors import ContractError
from trunkline.privacy.guard import Demands
from trunkline.protocol.arrays import Arrays
from trunkline.protocol.frozen import Frozen

TOLERANCE = 1e-5  # relative: how far beyond the bound a norm may be when another machine adds it up in another order
BOUND = 10.0  # where a policy demands the guard and names no bound


class ClipSettings(Frozen):
    clip_norm: float | None = Field(
        default=None, gt=0.0, le=1e6, description="largest L2 norm of what a site sends in a round; absent: no limit"
    )


class ClipDemands(Demands):
    max_clip_norm: float | None = Field(default=None, gt=0.0, description="largest bound of a clip guard")

    @model_validator(mode="after")
    def _bound_of_a_guard(self) -> Self:
        if self.max_clip_norm is not None and Clip.NAME not in self.guards:
            raise ValueError("`max_clip_norm` is the bound of a guard that is not demanded: add `guards = ['clip']`")
        return self


@dataclass(frozen=True)
class Clip:
    """Scale a whole update to at most an L2 norm, so that no site can pull the mean further than the others may.

    The bound of differentially private training too (McMahan et al. 2018, arXiv:1710.06963), which adds noise to it. By
    itself it promises nothing about what an update reveals of the rows behind it.

    Args:
        norm: the bound, over all lent arrays together.
    """

    NAME: ClassVar[str] = "clip"
    Settings: ClassVar[type[Frozen]] = ClipSettings
    Demands: ClassVar[type[Demands]] = ClipDemands

    norm: float

    @classmethod
    def of(cls, settings: Mapping[str, Any]) -> "Clip | None":
        bound = settings.get("clip_norm")
        return cls(float(bound)) if bound is not None else None

    @classmethod
    def objection(cls, guard: "Clip | None", demands: ClipDemands) -> str:
        if cls.NAME in demands.guards and guard is None:
            return "its policy demands the guard `clip`; this run has none. Set [guards] clip_norm in the run"
        bound = demands.max_clip_norm
        if bound is not None and guard is not None and guard.norm > bound:
            return f"its policy demands the guard {cls(bound).words()} or tighter; this run has {guard.words()}"
        return ""

    @classmethod
    def meet(cls, demands: ClipDemands) -> dict[str, Any]:
        return {"clip_norm": demands.max_clip_norm or BOUND} if cls.NAME in demands.guards else {}

    def words(self) -> str:
        return f"clip({self.norm:g})"

    def parameters(self) -> dict[str, bool | int | float | str]:
        return {"norm": self.norm}

    def at_site(self, delta: Arrays) -> Arrays:
        """Clipping twice is clipping once, to the bit. NaN and infinity stay as they are: the server refuses them by name."""
        norm = norm_of(delta)
        # rounding may leave the scaled norm a hair above the bound, which would be clipped again: aim a hair below
        short = 2.0 * max((float(np.finfo(array.dtype).eps) for array in delta.values()), default=0.0)
        while math.isfinite(norm) and norm > self.norm:
            factor = max(0.0, 1.0 - short) * (self.norm / norm)
            # in float64: float16 cannot hold the factor of a large update
            delta = Arrays(
                {name: (array.astype(np.float64) * factor).astype(array.dtype) for name, array in delta.items()}
            )
            norm = norm_of(delta)
            short *= 2.0  # the smallest numbers of a dtype do not get smaller by a factor near 1
        return delta

    def at_server(self, delta: Arrays) -> Arrays:
        norm = norm_of(delta)
        if norm > self.norm * (1.0 + TOLERANCE):
            raise ContractError(
                f"its change has the L2 norm {norm:.6g}; this run's guard {self.words()} lets {self.norm:g} pass. "
                "The site's Trunkline did not clip: update it"
            )
        return delta

    def at_sum(self, total: Arrays, survivors: Sequence[str]) -> Arrays:
        """The mean of updates within the bound is within it too, so there is nothing to do."""
        return total


def norm_of(delta: Arrays) -> float:
    """The L2 norm over all arrays together, in float64."""
    flat = (array.ravel().astype(np.float64) for array in delta.values())
    return math.sqrt(sum(float(np.dot(values, values)) for values in flat))
