"""A log that nobody can fill by repeating what is refused."""

import time
from collections.abc import Callable


class Hush:
    """Lines of a log, where nobody can fill the disk by repeating what is refused."""

    def __init__(self, tell: Callable[[str], object], cap: int = 10_000) -> None:
        self.tell, self.cap = tell, cap
        self._said: dict[tuple[str, str], tuple[float, int]] = {}  # (who, kind) -> when, and how often it went unsaid

    def say(self, who: str, kind: str, text: str, pause_s: float) -> None:
        """A line, unless one of this kind about `who` was said within `pause_s`; then it is counted."""
        present = time.monotonic()
        last, unsaid = self._said.get((who, kind), (-pause_s, 0))
        if present - last < pause_s:
            self._said[who, kind] = (last, unsaid + 1)
            return
        if len(self._said) >= self.cap:
            self._said.pop(next(iter(self._said)))
        self._said[who, kind] = (present, 0)
        self.tell(text + (f" (and {unsaid:,} times more since the last such line)" if unsaid else ""))

    def flush(self, older_s: float) -> None:
        """Say the counts that no further line would, and forget."""
        present = time.monotonic()
        for (who, kind), (last, unsaid) in list(self._said.items()):
            if present - last >= older_s:
                del self._said[who, kind]
                if unsaid:
                    self.tell(f"{who}: {kind}: {unsaid:,} times more")
