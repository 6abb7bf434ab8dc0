"""Who of a cohort may be asked now: sites have hours, which came with their offers, and may be paused by somebody there."""

import re
from collections.abc import Callable, Mapping
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from typing import Any

from flwr.serverapp import Grid

from trunkline.protocol import opening_hours as hours
from trunkline.server.rounds.cohort import Member
from trunkline.server.rounds.messaging import pause

Tell = Callable[[dict[str, Any]], None]
AGAIN_S = 60.0  # until a site is asked again that is paused and did not say for how long
SOON_S = 15.0  # the same for one whose hours have begun by the clock of the centre and not by its own
NAP_S = 5.0  # between two looks while everybody is away
LAST_WAIT = timedelta(hours=24)  # how long the scores at the end of a run wait for who is away
LONGEST = timedelta(days=400)  # whatever a site says
HOURS, PAUSED = "its hours", "a pause there"
UNTIL = re.compile(r"(?:closed|paused) until (\S{16,40})")


class Presence:
    """The members of one run that are away, as far as their hours and they themselves say.

    Args:
        tell: takes progress events; each absence is told once, and once that it is over.
    """

    def __init__(self, tell: Tell) -> None:
        self.tell = tell
        self._until: dict[str, tuple[datetime, str]] = {}  # site -> when it is asked again, and what keeps it
        self._told: set[str] = set()
        self._waiting = False

    def away(self, member: Member) -> datetime | None:
        """Until when a site is not to be asked; None: it may be."""
        known = self._until.get(member.site)
        if known is None and member.offer.hours is None:
            return None  # as all 10^5 of a simulation
        at = hours.now()
        if known is not None and at < known[0]:
            return known[0]
        self._until.pop(member.site, None)
        if member.offer.hours is None:
            return None
        opens = hours.calendar_of(member.offer.hours).closed_until(at)
        if opens is not None:
            self._until[member.site] = opens, HOURS
        return opens

    def there(self, members: Mapping[str, Member]) -> dict[str, Member]:
        """Those of `members` that may be asked now. The others are told, unless all are away: see `wait`."""
        here = {site: member for site, member in members.items() if self.away(member) is None}
        if here:
            for site in sorted(members.keys() - here.keys()):
                self._tell_away(members[site])
        return here

    def heard(self, member: Member) -> None:
        """A site has answered: where it was away, it is back."""
        self._waiting = False
        if member.site in self._told:
            self._told.discard(member.site)
            self.tell({"event": "note", "text": f"{member.site} is back, at {self._in_words(member, hours.now())}."})

    def said(self, member: Member, reason: str) -> None:
        """A site was asked and says that it is away, in words of its own; nothing of them is shown but a time."""
        at = hours.now()
        paused = "closed until" not in reason
        opens, why = at + hours.span(AGAIN_S), PAUSED if paused else HOURS
        if found := UNTIL.search(reason):
            with suppress(ValueError, TypeError, OverflowError):  # no moment, none with a zone, none of this age
                # a clock there that is behind the centre's must not make a storm of questions
                opens = min(max(datetime.fromisoformat(found[1]), at + hours.span(SOON_S)), at + LONGEST)
        self._until[member.site] = opens.astimezone(UTC), why
        self._tell_away(member)

    def wait(
        self, members: Mapping[str, Member], grid: Grid, what: str = "The run", limit: datetime | None = None
    ) -> bool:
        """While all of `members` are away: sleep until the first comes back, a few seconds at most; told once.

        Args:
            limit: when it is not worth waiting any more.

        Returns:
            False: nobody comes back before `limit`; told too.
        """
        opens = {site: until for site, member in members.items() if (until := self.away(member)) is not None}
        if len(opens) < len(members) or not opens:
            return True
        first = min(opens, key=lambda site: (opens[site], site))
        if limit is not None and opens[first] > limit:
            text = f"{what} waits no longer for {', '.join(sorted(opens))}: {first} is the first to be back, at {self._in_words(members[first], opens[first])}."
            self.tell({"event": "note", "text": text})
            return False
        if not self._waiting:
            self._waiting = True
            everybody = f"all {len(opens)} sites are away" if len(opens) > 1 else f"{first} is away"
            when = self._in_words(members[first], opens[first])
            self._told |= opens.keys()
            self.tell(
                {
                    "event": "note",
                    "text": f"{what} waits: {everybody}, and {first} is the first to be back, at {when} ({self._until[first][1]}).",
                }
            )
        left = max(0.05, hours.lasts(opens[first] - hours.now()))
        pause(grid, min(NAP_S, left), min(NAP_S, left))
        return True

    def _tell_away(self, member: Member) -> None:
        if member.site in self._told:
            return
        self._told.add(member.site)
        until, why = self._until[member.site]
        text = f"{member.site} is closed until {self._in_words(member, until)} ({why}); rounds go on without it."
        if why == PAUSED:
            text = f"{member.site} is paused by request at the plant; rounds go on without it, and it is asked again."
        self.tell({"event": "note", "text": text})

    @staticmethod
    def _in_words(member: Member, moment: datetime) -> str:
        """By the plant's own clock where it says which that is."""
        own = member.offer.hours
        return hours.calendar_of(own).in_words(moment) if own is not None else f"{moment:%a %Y-%m-%d %H:%M %Z}"
