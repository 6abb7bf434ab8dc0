"""Where simulated sites lie, and what the world gives each of them."""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from trunkline.client.training.loop import steps_of
from trunkline.config.run import RunConfig
from trunkline.errors import ConfigError
from trunkline.protocol.arrays import seed_of
from trunkline.protocol.plan import LocalPlan
from trunkline.simulations.world.clock import SECOND, Hours

MEGABYTE = 1e6  # bytes


@dataclass(frozen=True)
class Place:
    """What the draw made of one site."""

    site: str
    hours: Hours
    zone: float
    speed: float
    up: float  # us a byte
    down: float
    drifts: bool
    hostile: bool


def draw_places(run: RunConfig, sites: Sequence[str]) -> list[Place]:
    """The world's sites, in the order of `sites`. Shares are dealt, not thrown: a quarter of 20 sites is 5 of them.

    Raises:
        ConfigError: a hostile site is named that is none of `sites`.
    """
    world = run.world
    if unknown := [name for name in world.byzantine_sites if name not in sites]:
        raise ConfigError(
            f"[world] byzantine_sites names {unknown[0]!r}; the sites are {', '.join(sorted(sites))}. Correct the list."
        )
    calendars = _deal(run.seed, "calendar", sites, [one.share for one in world.calendars])
    speeds = _deal(run.seed, "speed", sites, [share for share, _ in world.speeds])
    links = _deal(run.seed, "link", sites, [share for share, _ in world.links])
    liars = _deal(run.seed, "hostile", sites, [world.byzantine_share])
    drifting = _deal(run.seed, "drift", sites, [world.drift_share if world.drift_week else 0.0])
    known: dict[tuple[int | None, float], Hours] = {}
    places = []
    for site in sites:
        own = calendars.get(site)
        zone = world.zones[int(chance(run.seed, site, "zone") * len(world.zones))] if world.zones else 0.0
        if (own, zone) not in known:
            known[own, zone] = Hours(None if own is None else world.calendars[own], world.start_hour + zone)
        link = _spread(run.seed, site, "link", world.link_spread) * (
            world.links[links[site]][1] if site in links else 1
        )
        places.append(
            Place(
                site=site,
                hours=known[own, zone],
                zone=zone,
                speed=_spread(run.seed, site, "speed", world.speed_spread)
                * (world.speeds[speeds[site]][1] if site in speeds else 1),
                up=SECOND / (MEGABYTE * world.up_mb_s * link) if world.up_mb_s else 0.0,
                down=SECOND / (MEGABYTE * world.down_mb_s * link) if world.down_mb_s else 0.0,
                drifts=site in drifting,
                hostile=site in world.byzantine_sites or site in liars,
            )
        )
    return places


def _deal(seed: int, what: str, sites: Sequence[str], shares: Sequence[float]) -> dict[str, int]:
    """Site -> the place in `shares` it was dealt; who is left over is not in it."""
    order = sorted(sites, key=lambda site: (seed_of(seed, "world", site, what), site))
    ends = [round(end * len(sites)) for end in itertools.accumulate(shares)]
    return {
        site: number
        for number, (begin, end) in enumerate(zip([0, *ends], ends, strict=False))
        for site in order[begin:end]
    }


def chance(seed: int, *what: object) -> float:
    """A number from 0 to below 1 that belongs to `what`."""
    return (seed_of(seed, "world", *what) >> 10) / 2.0**53


def _spread(seed: int, site: str, what: str, sigma: float) -> float:
    return math.exp(sigma * float(np.random.default_rng(seed_of(seed, "world", site, what)).standard_normal()))


def rows_seen(plan: LocalPlan, rows: int) -> int:
    """Training rows that pass through the federated model in a round; twice where a personal one trains beside it."""
    each = rows if plan.optimizer == "lbfgs" else min(plan.batch_size, rows)
    return steps_of(plan, rows) * each * (2 if plan.personal else 1) if rows else 0
