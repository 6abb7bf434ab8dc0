"""Operating regimes: the few settings a machine is run at, found on training rows, so that each is scaled by itself.

A turbofan at sea level and at 42,000 feet has two different normals; one z-score over both would see altitude and
nothing else. C-MAPSS FD002 and FD004 have six exact regimes, FD001 and FD003 one (Saxena et al. 2008).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

GAP = 0.05  # share of a setting's range that separates two levels
USUAL = 10.0  # of 100 random values some gap is five times the median one; ten times comes from levels
SHARE, ROWS = 0.005, 10  # a level or regime below either has too few rows for a mean and joins its neighbour
Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Regimes:
    """Which combinations of setting levels occurred in training.

    Args:
        settings: the `regime` columns of site.toml; empty means one regime.
        cuts: per setting, the ascending values between its levels.
        combinations: the regimes, each a level per setting; `known` in a file.
        centres: per regime and setting, its mean in training, in shares of the setting's range.
        spans: per setting, (lowest training value, range).
    """

    settings: tuple[str, ...] = ()
    cuts: tuple[tuple[float, ...], ...] = ()
    combinations: tuple[tuple[int, ...], ...] = ((),)
    centres: tuple[tuple[float, ...], ...] = ((),)
    spans: tuple[tuple[float, float], ...] = ()

    def __len__(self) -> int:
        return len(self.combinations)

    @classmethod
    def find(cls, names: tuple[str, ...], rows: Floats) -> "Regimes":
        """The regimes of training rows (rows, settings); no value may be missing."""
        if not names or not len(rows):
            return cls()
        cuts = tuple(tuple(_cuts(rows[:, index])) for index in range(len(names)))
        low, high = rows.min(axis=0), rows.max(axis=0)
        span = np.where(high > low, high - low, 1.0)
        levels = _levels(cuts, rows)
        combinations, code, count = np.unique(levels, axis=0, return_inverse=True, return_counts=True)
        share = (rows - low) / span
        total = np.stack([np.bincount(code.ravel(), weights=share[:, index]) for index in range(len(names))], axis=1)
        enough = (count >= ROWS) & (count >= SHARE * len(rows))
        enough |= count == count.max()
        return cls(
            settings=names,
            cuts=cuts,
            combinations=tuple(tuple(int(level) for level in combination) for combination in combinations[enough]),
            centres=tuple(
                tuple(float(value) for value in combination) for combination in (total / count[:, None])[enough]
            ),
            spans=tuple((float(start), float(width)) for start, width in zip(low, span, strict=True)),
        )

    def of(self, rows: Floats) -> NDArray[np.int64]:
        """Regime number of each row of (rows, settings); a combination never seen counts as the nearest one that was."""
        if len(self) == 1:
            return np.zeros(len(rows), dtype=np.int64)
        spans = np.array(self.spans)
        levels = _levels(self.cuts, rows)
        seen, code = np.unique(levels, axis=0, return_inverse=True)
        code_of = {combination: index for index, combination in enumerate(self.combinations)}
        regime = np.array(
            [code_of.get(tuple(int(level) for level in combination), -1) for combination in seen], dtype=np.int64
        )[code.ravel()]
        if len(strange := np.flatnonzero(regime < 0)):
            share = (rows[strange] - spans[:, 0]) / spans[:, 1]
            distance = ((share[:, None, :] - np.array(self.centres)[None]) ** 2).sum(axis=2)  # (strange, regimes)
            regime[strange] = distance.argmin(axis=1)
        return regime

    def to_dict(self) -> dict[str, Any]:
        return {
            "settings": self.settings,
            "cuts": self.cuts,
            "known": self.combinations,
            "centres": self.centres,
            "spans": self.spans,
        }

    @classmethod
    def from_dict(cls, state: Mapping[str, Any]) -> "Regimes":
        deep = {key: tuple(tuple(entry) for entry in state[key]) for key in ("cuts", "known", "centres", "spans")}
        return cls(
            settings=tuple(state["settings"]), cuts=deep["cuts"], combinations=deep["known"], centres=deep["centres"],
            spans=deep["spans"],
        )  # fmt: skip


def _levels(cuts: tuple[tuple[float, ...], ...], rows: Floats) -> NDArray[np.int64]:
    return np.stack([np.searchsorted(np.array(cut), rows[:, index]) for index, cut in enumerate(cuts)], axis=1).astype(
        np.int64
    )


def _cuts(values: Floats) -> list[float]:
    """Where one setting separates into levels: gaps wider than 5 % of its range, unless they are only its resolution.

    A noisy sensor written with four decimals takes a dozen evenly spaced values, each gap far above 5 %. Those are
    no levels: a gap between non-integers must also be ten times the usual one, except among a handful of uneven values.
    """
    distinct, counts = np.unique(values, return_counts=True)
    gaps = np.diff(distinct)
    if not len(gaps):
        return []
    wide = gaps > GAP * (distinct[-1] - distinct[0])
    integers = bool(np.all(distinct == np.round(distinct)))  # recipe numbers: every step is meant
    even = len(distinct) >= 5 and gaps.max() < 1.5 * gaps.min()
    if not integers and (even or len(distinct) > 8):
        wide &= gaps > USUAL * np.median(gaps)
    edges = np.flatnonzero(wide)
    low = distinct[np.concatenate([[0], edges + 1])].tolist()
    high = distinct[np.concatenate([edges, [len(distinct) - 1]])].tolist()
    size = np.add.reduceat(counts, np.concatenate([[0], edges + 1])).tolist()
    while len(size) > 1 and (min(size) < ROWS or min(size) < SHARE * len(values)):
        small = size.index(min(size))
        left = low[small] - high[small - 1] if small else np.inf
        right = low[small + 1] - high[small] if small + 1 < len(size) else np.inf
        keep = small - 1 if left <= right else small  # merge `keep` and the one after it
        high[keep], size[keep] = high[keep + 1], size[keep] + size[keep + 1]
        del low[keep + 1], high[keep + 1], size[keep + 1]
    return [(above + below) / 2.0 for above, below in zip(low[1:], high[:-1], strict=True)]
