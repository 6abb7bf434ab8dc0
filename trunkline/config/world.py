"""`[world]` of run.toml: a simulated world of sites, networks and attacks."""

from typing import Literal, Self

from pydantic import Field, model_validator

from trunkline.protocol.frozen import Frozen
from trunkline.protocol.opening_hours import WeekHours

Shares = tuple[tuple[float, float], ...]  # of (share of the sites, factor)


class CalendarConfig(WeekHours):
    """`[[world.calendars]]`: when a share of the sites can be reached and may train, in their own local time."""

    share: float = Field(gt=0.0, le=1.0)


class WorldConfig(Frozen):
    """`[world]`: simulation only; sites that come and go, are slow, lose replies or attack, on a virtual clock."""

    calendars: tuple[CalendarConfig, ...] = Field(default=(), description="sites without one are always there")
    zones: tuple[float, ...] = Field(default=(), description="hours ahead of the run's clock; each site draws one")
    start_hour: float = Field(default=0.0, ge=0.0, lt=168.0, description="of the week, when the run starts")
    round_hours: float = Field(
        default=0.0, ge=0.0, le=8760.0, description="from the start of one round to the next, at least"
    )
    row_seconds: float = Field(default=0.0, ge=0.0, le=3600.0, description="to train on one row once, at speed 1")
    speeds: Shares = Field(default=(), description="share of the sites and their speed; the others have 1")
    speed_spread: float = Field(default=0.0, ge=0.0, le=3.0, description="sigma of a log-normal factor on each speed")
    up_mb_s: float | None = Field(default=None, gt=0.0, description="megabytes a second; absent: no time at all")
    down_mb_s: float | None = Field(default=None, gt=0.0)
    links: Shares = Field(default=(), description="share of the sites and a factor on both their bandwidths")
    link_spread: float = Field(default=0.0, ge=0.0, le=3.0, description="sigma of a log-normal factor on both")
    drop_out: float = Field(default=0.0, ge=0.0, lt=1.0, description="chance that a site is not heard of in a round")
    reply_loss: float = Field(default=0.0, ge=0.0, lt=1.0, description="chance that a reply gets lost")
    labels_start: float = Field(
        default=1.0, gt=0.0, le=1.0, description="share of the labelled training rows that is there at the start"
    )
    labels_hours: float = Field(
        default=0.0, ge=0.0, le=87600.0, description="over which the other rows come in, evenly, in their order"
    )
    label_delay_hours: float = Field(default=0.0, ge=0.0, le=87600.0, description="from a row to its label")
    drift_week: float = Field(
        default=0.0,
        ge=0.0,
        le=10.0,
        description="by how much scaled inputs move in a week, each site's in its own direction",
    )
    drift_share: float = Field(default=1.0, gt=0.0, le=1.0, description="of the sites that drift")
    byzantine_share: float = Field(default=0.0, ge=0.0, le=1.0)
    byzantine_sites: tuple[str, ...] = Field(default=(), description="by name, instead of a share")
    attack: Literal["sign-flip", "scale", "random"] = Field(
        default="sign-flip", description="what Byzantine sites send"
    )

    @model_validator(mode="after")
    def _can_be_meant(self) -> Self:
        shares = {
            "calendars": [(calendar.share, 1.0) for calendar in self.calendars],
            "speeds": self.speeds,
            "links": self.links,
        }
        for key, pairs in shares.items():
            if any(not 0.0 < share <= 1.0 or factor <= 0.0 for share, factor in pairs):
                raise ValueError(f"`{key}` are pairs of a share, above 0 and at most 1, and a factor above 0")
            if (total := sum(share for share, _ in pairs)) > 1.0 + 1e-9:
                raise ValueError(f"the shares of `{key}` sum to {total:g}; lower them to 1 or less")
        if wide := [zone for zone in self.zones if abs(zone) > 14.0]:
            raise ValueError(f"`zones` holds {wide[0]:g}: hours ahead of the run's clock, from -14 to 14")
        if self.labels_start < 1.0 and not (self.labels_hours or self.label_delay_hours):
            raise ValueError(
                "`labels_start` leaves labels out: say by `labels_hours` or `label_delay_hours` when they come"
            )
        if self.labels_start == 1.0 and (self.labels_hours or self.label_delay_hours):
            raise ValueError(
                "`labels_hours` and `label_delay_hours` change nothing while `labels_start` is 1: lower it"
            )
        if self.drift_share < 1.0 and not self.drift_week:
            raise ValueError("`drift_share` changes nothing without `drift_week`: set it")
        if self.byzantine_share and self.byzantine_sites:
            raise ValueError(
                "`byzantine_share` and `byzantine_sites` both choose the Byzantine sites; drop one of the two"
            )
        for keys, needs in ((("speeds", "speed_spread"), ("row_seconds",)), (("zones",), ("calendars",)),
                            (("links", "link_spread"), ("up_mb_s", "down_mb_s"))):  # fmt: skip
            idle = [key for key in keys if getattr(self, key)]
            if idle and not any(getattr(self, need) for need in needs):
                raise ValueError(
                    f"`{idle[0]}` changes nothing without {' or '.join(map('`{}`'.format, needs))}: set it"
                )
        return self
