"""Which sites of a cohort may be asked now: sites have hours, which came with their offers, and may be paused by their plant."""

import re
from collections.abc import Mapping
from contextlib import suppress
from datetime import UTC, datetime, timedelta

from trunkline.protocol import opening_hours as hours
from trunkline.runtime.events import Note, OnEvent
from trunkline.server.rounds.cohort import Member
from trunkline.server.rounds.messaging import Transport, pause

PAUSED_RETRY_S = 60.0  # until a site is asked again that is paused and gave no time
SOON_S = 15.0  # the same for one whose hours have begun by the clock of the server and not by its own
NAP_S = 5.0  # between two looks while all sites are away
LAST_WAIT = timedelta(hours=24)  # how long the scores at the end of a run wait for sites that are away
LONGEST = timedelta(days=400)  # the latest return that is believed
HOURS, PAUSED = "its hours", "a pause there"
UNTIL = re.compile(r"(?:closed|paused) until (\S{16,40})")


class Availability:
    """The members of one run that are away, as far as their hours and their own replies say.

    Args:
        on_event: takes a Note for each absence, and one when it is over.
    """

    def __init__(self, on_event: OnEvent) -> None:
        self.on_event = on_event
        self._until: dict[str, tuple[datetime, str]] = {}  # site -> when it is asked again, and the cause
        self._reported: set[str] = set()
        self._waiting = False

    def away(self, member: Member) -> datetime | None:
        """Until when a site is not to be asked; None: it may be."""
        absence = self._until.get(member.site)
        if absence is None and member.offer.hours is None:
            return None  # as all 10^5 of a simulation
        moment = hours.now()
        if absence is not None and moment < absence[0]:
            return absence[0]
        self._until.pop(member.site, None)
        if member.offer.hours is None:
            return None
        opens = hours.calendar_of(member.offer.hours).closed_until(moment)
        if opens is not None:
            self._until[member.site] = opens, HOURS
        return opens

    def is_away(self, member: Member) -> bool:
        """Whether a site is closed or paused."""
        return self.away(member) is not None

    def available(self, members: Mapping[str, Member]) -> dict[str, Member]:
        """Those of `members` that may be asked now. The absence of the others is reported, unless all are away: see `wait`."""
        present = {site: member for site, member in members.items() if not self.is_away(member)}
        if present:
            for site in sorted(members.keys() - present.keys()):
                self._report_absence(members[site])
        return present

    def note_presence(self, member: Member) -> None:
        """A site has answered: if it was away, it is back."""
        self._waiting = False
        if member.site in self._reported:
            self._reported.discard(member.site)
            self._note(f"{member.site} is back, at {self._in_words(member, hours.now())}.")

    def note_absence(self, member: Member, reason: str) -> None:
        """A site was asked and answers that it is away. Of its own words only a time is shown."""
        moment = hours.now()
        paused = "closed until" not in reason
        opens, cause = moment + hours.span(PAUSED_RETRY_S), PAUSED if paused else HOURS
        if match := UNTIL.search(reason):
            with suppress(ValueError, TypeError, OverflowError):  # no moment, none with a zone, none of this age
                # a plant's clock that is behind the server's must not make a storm of questions
                opens = min(max(datetime.fromisoformat(match[1]), moment + hours.span(SOON_S)), moment + LONGEST)
        self._until[member.site] = opens.astimezone(UTC), cause
        self._report_absence(member)

    def wait(
        self,
        members: Mapping[str, Member],
        transport: Transport,
        subject: str = "The run",
        limit: datetime | None = None,
    ) -> bool:
        """While all of `members` are away: sleep until the first comes back, a few seconds at most; reported once.

        Args:
            subject: of the sentence that reports it.
            limit: when it is not worth waiting any more.

        Returns:
            False: no site comes back before `limit`; this is reported too.
        """
        opens = {site: until for site, member in members.items() if (until := self.away(member)) is not None}
        if len(opens) < len(members) or not opens:
            return True
        first = min(opens, key=lambda site: (opens[site], site))
        when = self._in_words(members[first], opens[first])
        if limit is not None and opens[first] > limit:
            self._note(
                f"{subject} waits no longer for {', '.join(sorted(opens))}: {first} is the first to be back, at {when}."
            )
            return False
        if not self._waiting:
            self._waiting = True
            everybody = f"all {len(opens)} sites are away" if len(opens) > 1 else f"{first} is away"
            self._reported |= opens.keys()
            self._note(
                f"{subject} waits: {everybody}, and {first} is the first to be back, at {when} ({self._until[first][1]})."
            )
        left = max(0.05, hours.lasts(opens[first] - hours.now()))
        pause(transport, min(NAP_S, left), min(NAP_S, left))
        return True

    def _report_absence(self, member: Member) -> None:
        if member.site in self._reported:
            return
        self._reported.add(member.site)
        until, cause = self._until[member.site]
        text = f"{member.site} is closed until {self._in_words(member, until)} ({cause}); rounds go on without it."
        if cause == PAUSED:
            text = f"{member.site} is paused by request at the plant; rounds go on without it, and it is asked again."
        self._note(text)

    def _note(self, text: str) -> None:
        self.on_event(Note(text))

    @staticmethod
    def _in_words(member: Member, moment: datetime) -> str:
        """By the plant's clock where its offer says which zone that is."""
        plant = member.offer.hours
        return hours.calendar_of(plant).in_words(moment) if plant is not None else f"{moment:%a %Y-%m-%d %H:%M %Z}"
