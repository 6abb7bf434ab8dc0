"""Watches over a plant's membership while its daemon runs: renews the certificate in time, and says what is wrong in words.

Flower's SuperNode ends without a word when it is turned away, and retries for ever when a handshake fails; this asks the
centre how things stand and tells the plant's IT what it heard.
"""

import logging
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from trunkline.client.identity import Identity
from trunkline.client.join import hello, renew
from trunkline.errors import TrunklineError
from trunkline.keys import due, expiry_warning, read_certificate, skew_warning

ASK_S = 60.0  # between two looks while all is well
AGAIN_S = 10.0  # and while it is not

logger = logging.getLogger("trunkline.keeper")


class Keeper:
    """Call `tick` often; the work is done in a thread of its own, because a network may take its time.

    Args:
        server: host:port of the centre.
        tell: takes a sentence, each once until it changes.
        wake: called when there is another certificate, which what failed for the former one may have waited for.
    """

    def __init__(
        self,
        state: Path,
        server: str,
        tell: Callable[[str], None],
        wake: Callable[[], None] = lambda: None,
        ask_s: float = ASK_S,
    ) -> None:
        self.wake = wake
        self.state = state
        self.server = server
        self.tell = tell
        self.ask_s = ask_s
        self.found: dict[str, Any] = {"link": "not asked yet", "warnings": []}
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
        warnings: list[str] = []
        identity = Identity.of(self.state)
        well = False
        try:
            certificate = read_certificate(identity.certificate)
            said, theirs = hello(self.state, self.server)
            well = True
            link = f"the centre at {self.server} knows this site as {said.site}"
            warnings.append(skew_warning(theirs))
            if due(certificate):
                certificate = renew(self.state, self.server)
                logger.info("renewed the certificate; it is valid until %s", certificate.not_valid_after_utc)
        except TrunklineError as error:
            link = str(error)
        try:
            certificate = read_certificate(identity.certificate)
            remedy = "It is renewed as soon as the centre can be reached."
            warnings.append(expiry_warning(certificate, "this site's certificate", remedy))
            authority = identity.read_authority()
            if authority is not None:
                warnings.append(
                    expiry_warning(authority, "the federation's authority", "Ask the operator what comes after.")
                )
        except TrunklineError as error:
            warnings.append(str(error))
        self.found = {"link": link, "warnings": [one for one in warnings if one]}
        self._due = time.monotonic() + (self.ask_s if well else min(AGAIN_S, self.ask_s))

    def _certificate_mark(self) -> int:
        try:
            return Identity.of(self.state).certificate.stat().st_mtime_ns
        except OSError:
            return 0
