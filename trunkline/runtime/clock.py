"""Clocks that a round loop waits by: the machine's, or that of a simulated world."""

import time
from typing import Protocol


class Clock(Protocol):
    """Seconds that only go up, and a wait."""

    def monotonic(self) -> float: ...

    def pause(self, seconds: float, most: float) -> None:
        """Let time pass before the next look.

        Args:
            seconds: on the machine's clock.
            most: on a virtual clock, which goes on to the next event and by `most` seconds at most.
        """


class MachineClock:
    """The clock of this machine."""

    def monotonic(self) -> float:
        return time.monotonic()

    def pause(self, seconds: float, most: float) -> None:
        time.sleep(seconds)
