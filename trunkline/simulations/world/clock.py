"""Virtual time, and the hours at which a simulated plant is there."""

import itertools
import math
from bisect import bisect_right
from collections.abc import Callable

from trunkline.config.world import CalendarConfig
from trunkline.protocol.opening_hours import DAYS

# Virtual time is counted in whole microseconds: sums of them are exact, so an opening hour is never missed by rounding
SECOND = 1_000_000
HOUR = 3600 * SECOND
WEEK = 168 * HOUR


class VirtualClock:
    """The clock of a world, which starts at 0.

    Args:
        first: from a time (us) to that of the first event up to there, or that time itself.
    """

    def __init__(self, first: Callable[[int], int]) -> None:
        self.at = 0  # us
        self._first = first

    def monotonic(self) -> float:
        return self.at / SECOND

    def sleep(self, seconds: float, /) -> None:
        """Go on at once to the first thing that happens, and by `seconds` at most."""
        # rounded up and at least 1 us: who sleeps until a deadline must wake behind it, or would sleep for ever
        self.at = max(self.at, self._first(self.at + max(1, math.ceil(seconds * SECOND))))


class Hours:
    """When a site can be reached and works: the same every week of virtual time.

    Args:
        calendar: None: always.
        ahead: hours the site's own clock is ahead of Monday 0:00 when virtual time starts.
    """

    def __init__(self, calendar: CalendarConfig | None, ahead: float = 0.0) -> None:
        pieces: list[tuple[int, int]] = [(0, WEEK)] if calendar is None else []
        for day, (begin, end) in itertools.product(calendar.days, calendar.hours) if calendar else ():
            start = round((24 * DAYS.index(day) + begin - ahead) * HOUR) % WEEK
            stop = start + round((end - begin) * HOUR) % (24 * HOUR)
            stop = start + 24 * HOUR if stop == start else stop  # [0, 24]
            pieces += [(start, min(stop, WEEK))] + ([(0, stop - WEEK)] if stop > WEEK else [])
        self._open: list[tuple[int, int]] = []  # of a week, ascending, apart
        for start, stop in sorted(pieces):
            if self._open and start <= self._open[-1][1]:
                self._open[-1] = (self._open[-1][0], max(stop, self._open[-1][1]))
            else:
                self._open.append((start, stop))
        self._starts = [start for start, _ in self._open]
        self._week = sum(stop - start for start, stop in self._open)

    @property
    def always(self) -> bool:
        return self._week == WEEK

    def online(self, at: int) -> bool:
        place = bisect_right(self._starts, at % WEEK) - 1
        return place >= 0 and at % WEEK < self._open[place][1]

    def opens(self, at: int) -> int:
        """The first time after `at` at which an hour of work begins."""
        place = bisect_right(self._starts, at % WEEK)
        begin = at - at % WEEK
        return begin + (self._starts[place] if place < len(self._starts) else WEEK + self._starts[0])

    def spend(self, at: int, work: int) -> int:
        """When `work` us of these hours have passed since `at`: what a shift does not finish waits for the next."""
        if work <= 0 or self.always:
            return at + max(work, 0)
        at += (work - 1) // self._week * WEEK
        work -= (work - 1) // self._week * self._week
        while True:
            if not self.online(at):
                at = self.opens(at)
            place = bisect_right(self._starts, at % WEEK) - 1
            left = self._open[place][1] - at % WEEK
            if work <= left:
                return at + work
            at, work = at + left, work - left
