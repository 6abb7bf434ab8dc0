"""When a plant may train, by the clock on its own wall: shifts, free days, closures; and what that clock says now.

What is open is what the wall clock shows: where clocks are put back, an hour that comes twice is open twice, and where they
are put forward, an hour that never comes is not made up for.
"""

import os
from datetime import UTC, datetime, timedelta
from functools import lru_cache
from typing import Literal, Self, get_args
from zoneinfo import ZoneInfo, available_timezones

from pydantic import Field, field_validator, model_validator

from trunkline.errors import ConfigError, nearest
from trunkline.protocol.frozen import Frozen

Day = Literal["mon", "tue", "wed", "thu", "fri", "sat", "sun"]
DAYS: tuple[Day, ...] = get_args(Day)
LONGEST_CLOSURE = timedelta(days=366)
CLOSURE = "%Y-%m-%d %H:%M"  # how the two ends of a closure are written


class WeekHours(Frozen):
    """Hours that are the same every week, by the clock on the wall."""

    hours: tuple[tuple[float, float], ...] = Field(
        default=((0.0, 24.0),),
        min_length=1,
        max_length=48,
        description="from and to; [22, 6] ends in the morning after",
    )
    days: tuple[Day, ...] = Field(default=DAYS, min_length=1, max_length=7, description="on which `hours` begin")

    @model_validator(mode="after")
    def _hours_of_a_day(self) -> Self:
        for begin, end in self.hours:
            if not (0.0 <= begin < 24.0 and 0.0 <= end <= 24.0) or begin == end:
                raise ValueError(
                    f"`hours` holds [{begin:g}, {end:g}]: two different hours of a day from 0 to 24; all day is [0, 24]"
                )
        return self


class PlantHours(WeekHours):
    """`[hours]` of site.toml: when a plant may train and be asked to. Part of its Offer, so that no round waits for it
    at other times; `trunkline/protocol/opening_hours.py` reckons with it."""

    zone: str = Field(max_length=64, description="time zone of the plant's clock, by its IANA name")
    closed: tuple[str, ...] = Field(
        default=(), max_length=100, description='besides: "2026-12-24 06:00 to 2026-12-27 06:00", by the same clock'
    )

    @field_validator("zone")
    @classmethod
    def _known(cls, zone: str) -> str:
        zone_of(zone)
        return zone

    @field_validator("closed")
    @classmethod
    def _from_to(cls, closed: tuple[str, ...]) -> tuple[str, ...]:
        for one in closed:
            closure_of(one)
        return closed


@lru_cache(maxsize=64)
def zone_of(name: str) -> ZoneInfo:
    """The time zone of an IANA name.

    Raises:
        ValueError: there is none of this name; the text says so, and what to write.
    """
    try:
        return ZoneInfo(name)
    except (KeyError, ValueError, OSError):
        close = nearest(name, available_timezones())
        raise ValueError(
            f"no time zone is called {name!r}{close} Write its IANA name, such as 'Europe/Berlin' or 'UTC'"
        ) from None


def closure_of(text: str) -> tuple[datetime, datetime]:
    """Begin and end of one entry of `closed`, by the clock on the plant's wall, without a zone.

    Raises:
        ValueError: it is anything else; the text says what, and how to write it.
    """
    begin, to, end = text.partition(" to ")
    try:
        span = datetime.strptime(begin, CLOSURE), datetime.strptime(end, CLOSURE)
    except ValueError:
        span = None
    # what strptime takes and strftime would not write (one digit for two, say) is not taken: one span, one way to say it
    if span is None or not to or text != f"{span[0]:{CLOSURE}} to {span[1]:{CLOSURE}}":
        raise ValueError(f"{text[:64]!r} is no closure; write it as '2026-12-24 06:00 to 2026-12-27 06:00'")
    if not span[0] < span[1] <= span[0] + LONGEST_CLOSURE:
        raise ValueError(
            f"{text!r} ends before it begins, or lasts more than {LONGEST_CLOSURE.days} days; correct one of the two"
        )
    return span


CLOCK = "TRUNKLINE_CLOCK"  # for tests only: "2026-11-23T00:00:00+00:00 x144" lets a day pass in ten minutes
DAY = timedelta(days=1)
SECOND = timedelta(seconds=1)


class Calendar:
    """What `[hours]` of a site.toml means at a moment. Every moment here is a datetime with a zone.

    Args:
        hours: of the plant.
    """

    def __init__(self, hours: PlantHours) -> None:
        self.zone = zone_of(hours.zone)
        self._days = frozenset(DAYS.index(day) for day in hours.days)
        self._spans = [(timedelta(hours=begin), timedelta(hours=end)) for begin, end in hours.hours]
        self._closed = [closure_of(one) for one in hours.closed]
        self._edges = sorted({edge for span in self._spans for edge in span} | {DAY})

    def open(self, at: datetime) -> bool:
        """Whether the plant may train at this moment."""
        wall = at.astimezone(self.zone).replace(tzinfo=None)
        if any(begin <= wall < end for begin, end in self._closed):
            return False
        into = wall - _midnight(wall)
        today, before = wall.weekday() in self._days, (wall.weekday() - 1) % 7 in self._days
        for begin, end in self._spans:
            if today and begin <= into < (end if end > begin else DAY):
                return True
            if end < begin and before and into < end:  # yesterday's, into the morning
                return True
        return False

    def closed_until(self, at: datetime) -> datetime | None:
        """When the plant opens next (UTC); None: it is open."""
        at = at.astimezone(UTC)
        if self.open(at):
            return None
        while not self.open(at):
            at = self._next(at)
        return at

    def _next(self, at: datetime) -> datetime:
        """The first moment after `at` (UTC) at which the answer may be another."""
        local = at.astimezone(self.zone)
        wall = local.replace(tzinfo=None)
        edges = [_midnight(wall) + edge for edge in self._edges]
        edges += [edge for span in self._closed for edge in span]
        if ends := [end for begin, end in self._closed if begin <= wall < end]:
            edges = ends  # nothing opens before that, however many shifts lie in between
        then = at + (min(edge for edge in edges if edge > wall) - wall)
        if then.astimezone(self.zone).utcoffset() == local.utcoffset():
            return then
        before = at  # the clocks are changed in between: at that moment, then, which is a whole second
        while then - before > SECOND:
            middle = before + (then - before) / 2
            same = middle.astimezone(self.zone).utcoffset() == local.utcoffset()
            before, then = (middle, then) if same else (before, middle)
        return then.replace(microsecond=0)

    def in_words(self, moment: datetime) -> str:
        """Such as `Mon 2026-11-23 06:00 CET`."""
        return f"{moment.astimezone(self.zone):%a %Y-%m-%d %H:%M %Z}"


def _midnight(wall: datetime) -> datetime:
    return wall.replace(hour=0, minute=0, second=0, microsecond=0)


@lru_cache(maxsize=4096)
def calendar_of(hours: PlantHours) -> Calendar:
    """The one Calendar of these hours."""
    return Calendar(hours)


def now() -> datetime:
    """What time it is for calendars, in UTC: the machine's, or that of a test's fast clock. Certificates, signatures and all
    else have the machine's own.

    Raises:
        ConfigError: TRUNKLINE_CLOCK is set to something else than a moment and a speed.
    """
    machine = datetime.now(UTC)
    start, speed = _clock(os.environ.get(CLOCK, ""))
    return machine if machine <= start else start + (machine - start) * speed


def lasts(span: timedelta) -> float:
    """Seconds of the machine that `span` of this clock takes, at its speed of now."""
    return span.total_seconds() / _speed()


def span(seconds: float) -> timedelta:
    """What passes on this clock, at its speed of now, while the machine's goes on by so many seconds."""
    return timedelta(seconds=seconds * _speed())


def _speed() -> float:
    start, speed = _clock(os.environ.get(CLOCK, ""))
    return speed if speed != 1.0 and datetime.now(UTC) > start else 1.0


@lru_cache(maxsize=4)
def _clock(text: str) -> tuple[datetime, float]:
    """The moment, on the machine's own clock, up to which this is that clock, and how many times faster it runs from then on;
    every process that has the same text agrees."""
    if not text:
        return datetime.max.replace(tzinfo=UTC), 1.0
    start, _, speed = text.partition(" x")
    try:
        moment, times = datetime.fromisoformat(start), float(speed)
    except ValueError:
        moment, times = None, 0.0
    if moment is None or moment.tzinfo is None or not 1.0 <= times <= 1e6:
        raise ConfigError(
            f"{CLOCK}={text!r}: expected a moment with its zone and a speed from 1, such as "
            "'2026-11-23T00:00:00+00:00 x144'. It is for tests only: unset it at a plant."
        )
    return moment, times
