"""Watches a site's membership while its daemon runs: renews the certificate in time and reports every problem with its cause.

Flower's SuperNode ends without a cause when it is refused, and retries for ever when a handshake fails. The monitor asks
the server for the state of the membership, and reports it to the plant's IT.
"""

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from trunkline.client.agent.join import hello, renew
from trunkline.client.state.identity import Identity
from trunkline.errors import TrunklineError
from trunkline.runtime.incidents import Incidents
from trunkline.security.keys import expiry_warning, needs_renewal, read_certificate, skew_warning

RECOVERED = {
    "clock": "the clock of this machine and the server's agree again",
    "certificate": "this site's certificate is valid again",
    "authority": "the federation's authority is valid again",
}


@dataclass(frozen=True)
class Timing:
    """Waits of the monitor, in seconds."""

    ask_s: float = 60.0  # between two questions to the server while all is well
    retry_s: float = 10.0  # and while it is not


class MembershipMonitor:
    """Call `tick` often; the work is done in a thread of its own, because a network may take its time.

    Args:
        server: its address, host:port.
        emit: takes a sentence, each once until it changes.
        wake: called at a new certificate, so that connections that failed with the former one are tried again.
        incidents: gets failures and recoveries.

    Attributes:
        summary: link (a sentence), connected, link_since (ISO 8601), warnings (sentences).
        asked: whether the server has been asked at least once.
    """

    def __init__(
        self,
        state: Path,
        server: str,
        emit: Callable[[str], None],
        wake: Callable[[], None] = lambda: None,
        incidents: Incidents | None = None,
        timing: Timing = Timing(),
    ) -> None:
        self.incidents = incidents
        self.asked = False
        self.wake = wake
        self.state = state
        self.server = server
        self.emit = emit
        self.timing = timing
        self.summary: dict[str, Any] = {
            "link": "not asked yet",
            "connected": False,
            "link_since": _now(),
            "warnings": [],
        }
        self._warned: dict[str, str] = {}  # subject -> sentence
        self._noted: set[str] = set()
        self._lost: set[str] = set()  # sentences on the link that were reported since it was lost
        self._due = 0.0
        self._thread: threading.Thread | None = None
        self._reported: tuple[str, ...] = ()
        self._mark = 0

    def tick(self) -> bool:
        """Ask the server when it is time, or when there is a new certificate; True if the summary has changed."""
        if self._thread is not None:
            if self._thread.is_alive():
                return False
            self._thread = None
            self.asked = True
            self._record()
            sentences = (self.summary["link"], *self.summary["warnings"])
            if sentences == self._reported:
                return False
            for sentence in sentences:
                if sentence not in self._reported:
                    self.emit(sentence)
            self._reported = sentences
            return True
        mark = self._certificate_mark()
        if time.monotonic() >= self._due or mark != self._mark:
            if self._mark and mark != self._mark:
                self.wake()
            self._mark = mark
            self._thread = threading.Thread(target=self._look, name="membership-monitor", daemon=True)
            self._thread.start()
        return False

    def hurry(self) -> None:
        """Ask the server at the next tick: something failed, and the server may have the cause."""
        self._due = 0.0

    def _look(self) -> None:
        warnings: dict[str, str] = {}
        identity = Identity.of(self.state)
        connected = False
        try:
            certificate = read_certificate(identity.certificate)
            answer, server_time = hello(self.state, self.server)
            connected = True
            link = f"the server at {self.server} knows this site as {answer.site}"
            warnings["clock"] = skew_warning(server_time)
            if needs_renewal(certificate):
                certificate = renew(self.state, self.server)
                if self.incidents is not None:
                    until = f"{certificate.not_valid_after_utc:%Y-%m-%d %H:%M UTC}"
                    self.incidents.note("note", f"renewed the certificate; it is valid until {until}")
        except (TrunklineError, OSError) as error:
            link = str(error)
        try:
            certificate = read_certificate(identity.certificate)
            remedy = "It is renewed as soon as the server can be reached."
            warnings["certificate"] = expiry_warning(certificate, "this site's certificate", remedy)
            authority = identity.read_authority()
            if authority is not None:
                warnings["authority"] = expiry_warning(
                    authority, "the federation's authority", "Ask the operator for the federation that replaces it."
                )
        except (TrunklineError, OSError) as error:
            warnings["certificate"] = str(error)
        since = self.summary["link_since"] if connected == self.summary["connected"] else _now()
        self._warned = {about: warning for about, warning in warnings.items() if warning}
        self.summary = {
            "link": link,
            "connected": connected,
            "link_since": since,
            "warnings": list(self._warned.values()),
        }
        self._due = time.monotonic() + (self.timing.ask_s if connected else min(self.timing.retry_s, self.timing.ask_s))

    def _record(self) -> None:
        """Add the changes to the incidents: a lost link once per cause, a warning once while it lasts."""
        if self.incidents is None:
            return
        link = self.summary["link"]
        if self.summary["connected"]:
            self._lost.clear()
            self.incidents.note("recovery", f"the link is back: {link}", about="link")
        elif link not in self._lost:
            self._lost.add(link)
            remedy = "It is tried again by itself; the server then repeats its request."
            self.incidents.note(
                "failure", f"no link to the server at {self.server}: {link}", remedy=remedy, about="link"
            )
        for about, text in RECOVERED.items():
            if (sentence := self._warned.get(about)) is None:
                self.incidents.note("recovery", text, about=about)
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
