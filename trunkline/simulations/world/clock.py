"""Virtual time, and the hours at which a simulated plant is available."""

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
        self.now = 0  # us
        self._first = first

    def monotonic(self) -> float:
        return self.now / SECOND

    def pause(self, seconds: float, most: float) -> None:
        self.sleep(most)

    def sleep(self, seconds: float, /) -> None:
        """Advance at once to the next event, and by `seconds` at most."""
        # rounded up and at least 1 us: a sleep until a deadline must end behind it, or the loop would sleep for ever
        self.now = max(self.now, self._first(self.now + max(1, math.ceil(seconds * SECOND))))


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

    def online(self, time: int) -> bool:
        index = bisect_right(self._starts, time % WEEK) - 1
        return index >= 0 and time % WEEK < self._open[index][1]

    def opens(self, time: int) -> int:
        """The first time after `time` at which an hour of work begins."""
        index = bisect_right(self._starts, time % WEEK)
        begin = time - time % WEEK
        return begin + (self._starts[index] if index < len(self._starts) else WEEK + self._starts[0])

    def spend(self, time: int, work: int) -> int:
        """When `work` us of these hours have passed since `time`: what a shift does not finish waits for the next."""
        if work <= 0 or self.always:
            return time + max(work, 0)
        time += (work - 1) // self._week * WEEK
        work -= (work - 1) // self._week * self._week
        while True:
            if not self.online(time):
                time = self.opens(time)
            index = bisect_right(self._starts, time % WEEK) - 1
            left = self._open[index][1] - time % WEEK
            if work <= left:
                return time + work
            time, work = time + left, work - left
