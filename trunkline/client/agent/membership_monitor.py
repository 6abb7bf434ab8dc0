"""Watches over a plant's membership while its daemon runs: renews the certificate in time, and says what is wrong in words.

Flower's SuperNode ends without a word when it is turned away, and retries for ever when a handshake fails; this asks the
centre how things stand and tells the plant's IT what it heard.
"""

import threading
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from trunkline.client.agent.join import hello, renew
from trunkline.client.state.identity import Identity
from trunkline.errors import TrunklineError
from trunkline.runtime.incidents import Incidents
from trunkline.security.keys import expiry_warning, needs_renewal, read_certificate, skew_warning

ASK_S = 60.0  # between two looks while all is well
AGAIN_S = 10.0  # and while it is not
OVER = {
    "clock": "the clock here and the centre's agree again",
    "certificate": "this site's certificate is good again",
    "authority": "the federation's authority is good again",
}


class MembershipMonitor:
    """Call `tick` often; the work is done in a thread of its own, because a network may take its time.

    Args:
        server: host:port of the centre.
        tell: takes a sentence, each once until it changes.
        wake: called when there is another certificate, which what failed for the former one may have waited for.
        incidents: gets what went wrong and what was mended.

    Attributes:
        found: link (a sentence), connected, link_since (ISO 8601; of that), warnings (sentences).
        asked: whether the centre has been asked at all yet.
    """

    def __init__(
        self,
        state: Path,
        server: str,
        tell: Callable[[str], None],
        wake: Callable[[], None] = lambda: None,
        ask_s: float = ASK_S,
        incidents: Incidents | None = None,
    ) -> None:
        self.incidents = incidents
        self.asked = False
        self.wake = wake
        self.state = state
        self.server = server
        self.tell = tell
        self.ask_s = ask_s
        self.found: dict[str, Any] = {"link": "not asked yet", "connected": False, "link_since": _now(), "warnings": []}
        self._warned: dict[str, str] = {}  # subject -> sentence
        self._noted: set[str] = set()
        self._lost: set[str] = set()  # what was said of the link since it was lost
        self._due = 0.0
        self._thread: threading.Thread | None = None
        self._said: tuple[str, ...] = ()
        self._mark = 0

    def tick(self) -> bool:
        """Start a look when it is time, or when there is a new certificate; True when what was found has changed."""
        if self._thread is not None:
            if self._thread.is_alive():
                return False
            self._thread = None
            self.asked = True
            self._record()
            said = (self.found["link"], *self.found["warnings"])
            if said == self._said:
                return False
            for sentence in said:
                if sentence not in self._said:
                    self.tell(sentence)
            self._said = said
            return True
        mark = self._certificate_mark()
        if time.monotonic() >= self._due or mark != self._mark:
            if self._mark and mark != self._mark:
                self.wake()
            self._mark = mark
            self._thread = threading.Thread(target=self._look, name="keeper", daemon=True)
            self._thread.start()
        return False

    def hurry(self) -> None:
        """Something has just gone wrong that the centre may have the reason for: look at the next tick."""
        self._due = 0.0

    def _look(self) -> None:
        warnings: dict[str, str] = {}
        identity = Identity.of(self.state)
        well = False
        try:
            certificate = read_certificate(identity.certificate)
            said, theirs = hello(self.state, self.server)
            well = True
            link = f"the centre at {self.server} knows this site as {said.site}"
            warnings["clock"] = skew_warning(theirs)
            if needs_renewal(certificate):
                certificate = renew(self.state, self.server)
                if self.incidents is not None:
                    until = f"{certificate.not_valid_after_utc:%Y-%m-%d %H:%M UTC}"
                    self.incidents.note("note", f"renewed the certificate; it is valid until {until}")
        except (TrunklineError, OSError) as error:
            link = str(error)
        try:
            certificate = read_certificate(identity.certificate)
            remedy = "It is renewed as soon as the centre can be reached."
            warnings["certificate"] = expiry_warning(certificate, "this site's certificate", remedy)
            authority = identity.read_authority()
            if authority is not None:
                warnings["authority"] = expiry_warning(
                    authority, "the federation's authority", "Ask the operator what comes after."
                )
        except (TrunklineError, OSError) as error:
            warnings["certificate"] = str(error)
        since = self.found["link_since"] if well == self.found["connected"] else _now()
        self._warned = {about: one for about, one in warnings.items() if one}
        self.found = {"link": link, "connected": well, "link_since": since, "warnings": list(self._warned.values())}
        self._due = time.monotonic() + (self.ask_s if well else min(AGAIN_S, self.ask_s))

    def _record(self) -> None:
        """What the last look has changed, for the incidents: a loss once a cause, a warning once while it lasts."""
        if self.incidents is None:
            return
        link = self.found["link"]
        if self.found["connected"]:
            self._lost.clear()
            self.incidents.note("recovery", f"the link is back: {link}", about="link")
        elif link not in self._lost:
            self._lost.add(link)
            remedy = "It is tried again by itself; a round that waits for this site is asked again then."
            self.incidents.note(
                "failure", f"no link to the centre at {self.server}: {link}", remedy=remedy, about="link"
            )
        for about, over in OVER.items():
            if (sentence := self._warned.get(about)) is None:
                self.incidents.note("recovery", over, about=about)
            elif about not in self._noted:
                self.incidents.note("failure", sentence, about=about)
        self._noted = set(self._warned)

    def _certificate_mark(self) -> int:
        try:
            return Identity.of(self.state).certificate.stat().st_mtime_ns
        except OSError:
            return 0


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
