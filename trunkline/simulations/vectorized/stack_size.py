"""How many sites one stack takes: which size is fastest depends on network and machine, so sizes are tried."""

import math
import time
from collections.abc import Callable
from typing import TypeVar

SIZES = (64, 128, 256, 32, 8, 1)
TRIES = 3  # stacks of each size in the trial: one to warm up, and the better of the others counts
Result = TypeVar("Result")


class StackSize:
    """The trial of sizes, and then the fastest.

    Args:
        most: sites that a stack may take.
        clock: seconds; on a CPU the thread's own, so that what else runs on the machine decides nothing.
    """

    def __init__(self, most: int, clock: Callable[[], float] = time.perf_counter) -> None:
        self.most, self.clock = most, clock
        self.trial = [size for size in SIZES if size <= most]  # sizes still to be tried
        self.tries = 0  # of the first of them
        self.seconds: dict[int, float] = {}  # size -> of a site in a stack of so many

    def next(self, left: int, limit: int) -> int:
        """How many sites the next stack takes: a size on trial as far as there are sites for it, or the fastest.

        Args:
            left: sites that wait in this round.
            limit: sites there are at all.
        """
        while self.trial and self.trial[0] > limit:
            self.trial.pop(0)
        if self.trial and (self.trial[0] <= left or not self.seconds):
            return self.trial[0]
        return min(self.seconds, key=lambda size: self.seconds[size]) if self.seconds else min(left, self.most)

    def timed(self, size: int, train: Callable[[], Result]) -> Result:
        """`train()` of a stack of `size` sites; while sizes are tried, with a clock beside it."""
        if not self.trial or size != self.trial[0]:
            return train()
        began = self.clock()
        result = train()  # its changes are on the CPU: a GPU has finished too
        self.tries += 1
        if self.tries > 1:
            self.seconds[size] = min(self.seconds.get(size, math.inf), (self.clock() - began) / size)
        if self.tries == TRIES:
            self.trial.pop(0)
            self.tries = 0
            best = min(self.seconds, key=lambda tried: self.seconds[tried])
            # where more were slower, still more will be, and likewise fewer
            larger, smaller = (any(tried > best for tried in self.seconds), any(tried < best for tried in self.seconds))
            self.trial = [waiting for waiting in self.trial if not (larger if waiting > best else smaller)]
        return result
