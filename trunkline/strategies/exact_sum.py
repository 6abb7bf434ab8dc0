"""Sums of floating-point numbers without rounding until the end: the same bits in any order."""

import math
import threading
from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trunkline.errors import ContractError

AT_ONCE = 1 << 15  # numbers that are split at a time: with all that is made of them, a megabyte of a core's own cache
SHORT = 4096  # numbers of a row; several of fewer are split at a time, because a call costs more than they do


class ExactSum:
    """A sum of arrays that does not depend on the order of its terms, in memory that does not grow with them.

    Each term is split into a whole number and a remainder in units of 2^-52, both int64; integers add without rounding,
    so any order (and any grouping) gives the same bits. The idea is that of reproducible summation in fixed bins (Demmel
    and Nguyen 2015, doi:10.1109/TC.2014.2345391); two bins do here because admitted updates are bounded.

    Raises:
        ContractError: a term is not finite, or the largest numbers of all terms together reach 2^51, beyond which a whole
            number does not fit; what intake admits stays below it up to some 2 million sites at their bounds.
    """

    FINE = 52
    CARRY_EVERY = 1024  # terms: each adds at most 2^51 to `fine`, which holds 2^63
    # A float64 in [2^52, 2^53) units has its integer in its own bits. So a term plus 1.5 * 2^52 units is that term, rounded
    # to whole units, in bits that add as int64; what the 1.5 * 2^52 itself brings along is taken out by `_count`
    WHOLE, REST = np.float64(1.5 * 2.0**52), np.float64(1.5)
    LIMIT = 2.0**51

    def __init__(self, shape: tuple[int, ...]) -> None:
        self.coarse: NDArray[np.int64] = np.zeros(shape, np.int64)
        self.fine: NDArray[np.int64] = np.zeros(shape, np.int64)
        self._wholes, self._rests = 0, 0  # terms that `coarse` and `fine` hold with WHOLE and REST in them
        self._merged = 0  # sums that were added since `_carry`, each with less than 2^52 units in `fine`
        self._reach = 0.0  # no number of the sum is beyond it

    def add(self, term: NDArray[np.floating[Any]], weight: float = 1.0) -> None:
        """Add `weight` times `term`; the product is rounded once, in float64."""
        row = np.asarray(term).reshape(1, -1)
        if row.size:
            largest = float(max(row.max(), -row.min())) * abs(weight)
            self._extend_reach(largest)
            self._split(row, np.array([weight], np.float64), largest)

    def add_rows(
        self, rows: NDArray[np.floating[Any]], weights: NDArray[np.float64], largest: NDArray[np.float32] | None = None
    ) -> None:
        """Add each of `rows` times its weight: the same bits as one `add` a row.

        Shape:
            (n, ...) and (n,); `largest`, where it is known already, (n,) as `largest_of` gives it.
        """
        if not rows.size:
            return
        flat = rows.reshape(len(rows), -1)
        terms = (largest_of(rows) if largest is None else largest).astype(np.float64) * np.abs(weights)
        self._extend_reach(float(terms.sum()))
        for start in range(0, len(flat), self.CARRY_EVERY):
            group = slice(start, start + self.CARRY_EVERY)
            self._split(flat[group], weights[group], float(terms.max()))

    def _split(self, rows: NDArray[np.floating[Any]], weights: NDArray[np.float64], largest: float) -> None:
        """Add at most CARRY_EVERY rows, (n, k); no product with its weight is beyond `largest`."""
        if self._rests + 2 * self._merged + len(rows) > self.CARRY_EVERY:
            self._carry()
        whole_too = not largest < 0.499  # less is all remainder, whichever way its product was rounded
        self._rests += len(rows)
        self._wholes += len(rows) if whole_too else 0
        coarse, fine = self.coarse.reshape(-1), self.fine.reshape(-1)
        wide = min(rows.shape[1], AT_ONCE)
        few = max(1, AT_ONCE // wide) if wide < SHORT else 1  # whole rows one by one, unless they are short
        remainders, wholes = _scratch()
        for first in range(0, rows.shape[1], wide):
            columns = slice(first, first + wide)
            for start in range(0, len(rows), few):
                part = rows[start : start + few, columns]
                remainder, whole = (buffer[: part.size].reshape(part.shape) for buffer in (remainders, wholes))
                np.copyto(remainder, part)
                remainder *= weights[start : start + few, None] if len(part) > 1 else weights[start]
                if whole_too:
                    np.add(remainder, self.WHOLE, out=whole)
                    coarse[columns] += _total(whole.view(np.int64))
                    whole -= self.WHOLE
                    remainder -= whole  # exact: the two are within a factor of two, or `whole` is 0
                remainder += self.REST
                fine[columns] += _total(remainder.view(np.int64))

    def merge(self, other: "ExactSum") -> None:
        """Add what another sum holds: the same bits as if its terms had been added here."""
        self._extend_reach(other._reach)
        if self._rests + 2 * self._merged + 2 > self.CARRY_EVERY:
            self._carry()
        self._merged += 1
        coarse, fine = self.coarse.reshape(-1), self.fine.reshape(-1)
        for chunk, units, remainder in other._count():
            coarse[chunk] += units
            fine[chunk] += remainder

    def _extend_reach(self, largest: float) -> None:
        if not self._reach + largest < self.LIMIT:  # also for NaN, which both ends of an array that holds it are
            raise ContractError("a term of the sum is not finite, or the terms together are beyond 2^51")
        self._reach += largest

    def _count(self) -> Iterator[tuple[slice, NDArray[np.int64], NDArray[np.int64]]]:
        """A chunk of the array at a time, its whole numbers and units of 2^-52: equal for equal values, in whatever order summed.

        The units are in [0, 2^52). Nothing is changed: what came from another process may be read-only.
        """
        whole_bits, rest_bits = _bits(self.WHOLE, self._wholes), _bits(self.REST, self._rests)
        coarse, fine = self.coarse.reshape(-1), self.fine.reshape(-1)
        for start in range(0, len(fine), AT_ONCE):
            chunk = slice(start, start + AT_ONCE)
            units = fine[chunk] - rest_bits
            carry = units >> self.FINE
            yield chunk, coarse[chunk] - whole_bits + carry, units - (carry << self.FINE)

    def _carry(self) -> None:
        coarse, fine = self.coarse.reshape(-1), self.fine.reshape(-1)
        for chunk, units, remainder in self._count():
            coarse[chunk], fine[chunk] = units, remainder
        self._wholes, self._rests, self._merged = 0, 0, 0

    def value(self) -> NDArray[np.float64]:
        return self.over(1.0, np.dtype(np.float64))

    def over(self, divisor: float, dtype: "np.dtype[Any]") -> NDArray[Any]:
        """The sum divided by `divisor` in float64, as `dtype`, with no copy of it in between."""
        quotient = np.empty(self.fine.shape, dtype)
        flat = quotient.reshape(-1)
        for chunk, units, remainder in self._count():
            flat[chunk] = (units + remainder * 2.0**-self.FINE) / divisor
        return quotient


_thread_local = threading.local()


def _scratch() -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Two times AT_ONCE numbers, the same ones for every call of a thread: new ones would be paged in anew each time."""
    if not hasattr(_thread_local, "scratch"):
        _thread_local.scratch = np.empty(AT_ONCE), np.empty(AT_ONCE)
    scratch: tuple[NDArray[np.float64], NDArray[np.float64]] = _thread_local.scratch
    return scratch


def _bits(constant: np.float64, times: int) -> np.int64:
    """What `times` that number brings along where its bits are added up as int64, which wraps."""
    return np.uint64(times * int(constant.view(np.int64)) % 2**64).astype(np.int64)


class ExactNumber:
    """An exact sum of single numbers: Python's integers count units of 2^-62."""

    BITS = 62  # after the point

    def __init__(self) -> None:
        self.units = 0

    def add(self, term: float) -> None:
        if not abs(term) < 2.0**52:
            raise ContractError(f"a term of the sum is {term}; expected a number below 2^52")
        self.units += round(math.ldexp(term, self.BITS))

    def merge(self, other: "ExactNumber") -> None:
        self.units += other.units

    def value(self) -> float:
        return self.units / (1 << self.BITS)


def _total(units: NDArray[np.int64]) -> NDArray[np.int64]:
    """(n, k) -> (k,)."""
    total: NDArray[np.int64] = units[0] if len(units) == 1 else units.sum(axis=0)
    return total


def largest_of(rows: NDArray[np.float32]) -> NDArray[np.float32]:
    """(n, ...) -> (n,) the largest number of each, without its sign; NaN where one is NaN."""
    flat = rows.reshape(len(rows), -1)
    largest: NDArray[np.float32] = np.maximum(flat.max(axis=1, initial=0.0), -flat.min(axis=1, initial=0.0))
    return largest
