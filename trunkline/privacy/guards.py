"""Privacy mechanisms: what one of them does at the site and what at the server, side by side.

A guard is applied to an update between training and contract, and again, as its counterpart, where the centre admits it.
Sites apply the guards of a run in order, the server in reverse. What a run's guards are travels in its orders, so that a
plant's policy can demand one; see `GuardSettings`.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from trunkline.errors import ContractError
from trunkline.protocol.arrays import Arrays
from trunkline.protocol.plan import GuardSettings

TOLERANCE = 1e-5  # relative: how far beyond the bound a norm may be when another machine adds it up in another order


class Guard(Protocol):
    """One mechanism, at both ends."""

    def name(self) -> str:
        """With its parameters, as a plant reads it: `clip(10)`."""
        ...

    def at_site(self, delta: Arrays) -> Arrays:
        """What may leave in place of `delta`."""
        ...

    def at_server(self, delta: Arrays) -> Arrays:
        """What is added up in place of what came.

        Raises:
            ContractError: what came cannot have passed `at_site`.
        """
        ...


def norm_of(delta: Arrays) -> float:
    """The L2 norm over all arrays together, in float64."""
    flat = (array.ravel().astype(np.float64) for array in delta.values())
    return math.sqrt(sum(float(np.dot(one, one)) for one in flat))


@dataclass(frozen=True)
class Clip:
    """Scale a whole update to at most an L2 norm, so that no site can pull the mean further than the others may.

    The bound of differentially private training too (McMahan et al. 2018, arXiv:1710.06963), which adds noise to it; by
    itself it promises nothing about what an update tells of the rows behind it.

    Args:
        norm: the bound, over all lent arrays together.
    """

    norm: float

    def name(self) -> str:
        return f"clip({self.norm:g})"

    def at_site(self, delta: Arrays) -> Arrays:
        """Clipping twice is clipping once, to the bit. An update with NaN or infinity stays as it is: the server names it."""
        found = norm_of(delta)
        # rounding may leave the scaled norm a hair above the bound, which would be clipped again: aim a hair below
        short = 2.0 * max((float(np.finfo(array.dtype).eps) for array in delta.values()), default=0.0)
        while math.isfinite(found) and found > self.norm:
            factor = max(0.0, 1.0 - short) * (self.norm / found)
            # in float64: float16 cannot hold the factor of a large update
            delta = Arrays(
                {name: (array.astype(np.float64) * factor).astype(array.dtype) for name, array in delta.items()}
            )
            found = norm_of(delta)
            short *= 2.0  # the smallest numbers of a dtype do not get smaller by a factor near 1
        return delta

    def at_server(self, delta: Arrays) -> Arrays:
        found = norm_of(delta)
        if found > self.norm * (1.0 + TOLERANCE):
            raise ContractError(
                f"its change has the L2 norm {found:.6g}; this run's guard {self.name()} lets {self.norm:g} pass. "
                "The site's Trunkline did not clip: update it"
            )
        return delta


def guards_of(settings: GuardSettings) -> tuple[Guard, ...]:
    """The guards of a run, in the order in which a site applies them."""
    return (Clip(settings.clip_norm),) if settings.clip_norm is not None else ()


def names(settings: GuardSettings) -> tuple[str, ...]:
    """The guards of a run in words, such as ("clip(10)",)."""
    return tuple(guard.name() for guard in guards_of(settings))


def at_site(guards: Sequence[Guard], delta: Arrays) -> Arrays:
    for guard in guards:
        delta = guard.at_site(delta)
    return delta


def at_server(guards: Sequence[Guard], delta: Arrays) -> Arrays:
    for guard in reversed(guards):
        delta = guard.at_server(delta)
    return delta
