"""A log that a caller cannot fill by repeating what is refused."""

import time
from collections.abc import Callable


class LogThrottle:
    """Passes lines on, except those that repeat within a pause; these are counted.

    Args:
        emit: gets the lines that are passed on.
        cap: causes that are remembered; the oldest is forgotten first.
        clock: seconds, monotonic.
    """

    def __init__(
        self, emit: Callable[[str], object], cap: int = 10_000, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.emit, self.cap, self.clock = emit, cap, clock
        self._last: dict[tuple[str, str], tuple[float, int]] = {}  # (subject, kind) -> time of its line, repeats since

    def log(self, subject: str, kind: str, text: str, pause_s: float) -> None:
        """Pass a line on, unless there was one of this kind about `subject` within `pause_s`; then count it."""
        now = self.clock()
        last, repeats = self._last.get((subject, kind), (now - pause_s, 0))
        if now - last < pause_s:
            self._last[subject, kind] = (last, repeats + 1)
            return
        if len(self._last) >= self.cap:
            self._last.pop(next(iter(self._last)))
        self._last[subject, kind] = (now, 0)
        self.emit(text + (f" (and {repeats:,} times more since the last such line)" if repeats else ""))

    def flush(self, older_s: float) -> None:
        """Report the counts that no further line would report, and forget what is older."""
        now = self.clock()
        for (subject, kind), (last, repeats) in list(self._last.items()):
            if now - last >= older_s:
                del self._last[subject, kind]
                if repeats:
                    self.emit(f"{subject}: {kind}: {repeats:,} times more")
