"""What a world gives each simulated site: hours, time zone, speed, links, drift, attacks."""

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
class SiteDraw:
    """What the world's draw gave one site.

    Args:
        zone: hours that its clock is ahead of the run's.
        speed: factor on the time that training takes; 1 is the world's `row_seconds`.
        up: us a byte from the site to the server.
        down: us a byte from the server to the site.
        drifts: whether its inputs drift.
        byzantine: whether it sends an attack in the place of its update.
    """

    site: str
    hours: Hours
    zone: float
    speed: float
    up: float
    down: float
    drifts: bool
    byzantine: bool


def draw_sites(run: RunConfig, sites: Sequence[str]) -> list[SiteDraw]:
    """The world's draw of each site, in the order of `sites`. Shares are exact: a quarter of 20 sites is 5 of them.

    Raises:
        ConfigError: a Byzantine site is named that is none of `sites`.
    """
    world = run.world
    if unknown := [name for name in world.byzantine_sites if name not in sites]:
        raise ConfigError(
            f"[world] byzantine_sites names {unknown[0]!r}; the sites are {', '.join(sorted(sites))}. Correct the list."
        )
    calendars = _deal(run.seed, "calendar", sites, [calendar.share for calendar in world.calendars])
    speeds = _deal(run.seed, "speed", sites, [share for share, _ in world.speeds])
    links = _deal(run.seed, "link", sites, [share for share, _ in world.links])
    byzantine = _deal(run.seed, "hostile", sites, [world.byzantine_share])
    drifting = _deal(run.seed, "drift", sites, [world.drift_share if world.drift_week else 0.0])
    hours: dict[tuple[int | None, float], Hours] = {}  # one object for all sites with the same calendar and zone
    draws = []
    for site in sites:
        calendar = calendars.get(site)
        zone = world.zones[int(chance(run.seed, site, "zone") * len(world.zones))] if world.zones else 0.0
        if (calendar, zone) not in hours:
            days = None if calendar is None else world.calendars[calendar]
            hours[calendar, zone] = Hours(days, world.start_hour + zone)
        link = _spread(run.seed, site, "link", world.link_spread) * (
            world.links[links[site]][1] if site in links else 1
        )
        draws.append(
            SiteDraw(
                site=site,
                hours=hours[calendar, zone],
                zone=zone,
                speed=_spread(run.seed, site, "speed", world.speed_spread)
                * (world.speeds[speeds[site]][1] if site in speeds else 1),
                up=SECOND / (MEGABYTE * world.up_mb_s * link) if world.up_mb_s else 0.0,
                down=SECOND / (MEGABYTE * world.down_mb_s * link) if world.down_mb_s else 0.0,
                drifts=site in drifting,
                byzantine=site in world.byzantine_sites or site in byzantine,
            )
        )
    return draws


def _deal(seed: int, purpose: str, sites: Sequence[str], shares: Sequence[float]) -> dict[str, int]:
    """Site -> index of the share that it was dealt; sites beyond the shares are left out."""
    order = sorted(sites, key=lambda site: (seed_of(seed, "world", site, purpose), site))
    ends = [round(end * len(sites)) for end in itertools.accumulate(shares)]
    return {
        site: index
        for index, (begin, end) in enumerate(zip([0, *ends], ends, strict=False))
        for site in order[begin:end]
    }


def chance(seed: int, *event: object) -> float:
    """A number from 0 to below 1 that belongs to `event`: the same whenever it is asked for."""
    return (seed_of(seed, "world", *event) >> 10) / 2.0**53


def _spread(seed: int, site: str, purpose: str, sigma: float) -> float:
    """A log-normal factor around 1."""
    return math.exp(sigma * float(np.random.default_rng(seed_of(seed, "world", site, purpose)).standard_normal()))


def rows_seen(plan: LocalPlan, rows: int) -> int:
    """Training rows that pass through the federated model in a round; twice where a personal one trains beside it."""
    batch = rows if plan.optimizer == "lbfgs" else min(plan.batch_size, rows)
    return steps_of(plan, rows) * batch * (2 if plan.personal else 1) if rows else 0
