"""Packaging machines that ring: which alarms come in the next eight hours, at twenty machines around the world.

Tosato et al.: Alarm Logs in Packaging Industry (ALPI), IEEE DataPort 2020; the publisher's own windows and test rows.
One row is one window: the alarms of the last 1,720 minutes go in, those of the next 480 come out. The publisher cut the
log in passes, each an hour later than the one before it, and wrote one pass behind the other. Rows side by side are
therefore far apart in time, and rows a whole pass apart share nearly all of their alarms: a split by the order of the
file trains on what it validates on. `times` finds the true order.
"""

import math
import zipfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import polars as pl
from numpy.typing import NDArray

from trunkline.errors import DataError
from trunkline.simulations.factories.folder import (
    Files,
    Plant,
    Wish,
    as_it_comes,
    find_folder,
    parquet,
    toml,
    write_plants,
)

FILE = "alarms.npz"
MACHINES = 20
CODES = tuple(range(1, 154))  # 0 pads a window that is not full
WINDOW, HOUR = 1720.0, 60.0  # minutes a window sees; from one pass of windows to the next
PASSES = 29  # until the windows of the first pass are met again
LINK = 8  # alarms in a row that two windows must share before they count as one stretch of time
LATEST = 40  # alarms that may ring within the hour between two passes
VALIDATION = 0.15
GAP = 2  # window lengths left out before validation: a window reaches one further, and what it predicts into a second
WEEKS, DAYS = 64.0, 4.0  # window lengths after which a window of the past counts a third: eleven weeks, five days
UNKNOWN, ONE = 0.01, 1.0  # what a code does before anything is known of it, and how many windows that counts as
USUAL = 30.0  # windows that the weeks count as beside the last days: an hour lies between two, so a day or so
RARE = 1e-3  # a code is never taken to be rarer than this, nor more certain
ODDS = 4.0  # log-odds are divided by it, so that these inputs are about as large as the others
SEAM = 4.0  # window lengths of the training log that test rows know nothing of: the publisher's cut is not sharp
BLOCK = 4  # window lengths a block of test rows; about five days
OWN = [[f"{kind}{code:03d}" for code in CODES] for kind in "nrwd"]  # of each code: count, recency, weeks, days
SOURCE = (
    "Get `Alarm Logs in Packaging Industry (ALPI)` from IEEE DataPort, as alarms.npz, and give its folder with --data."
)
Codes = NDArray[np.uint8]
Floats = NDArray[np.float64]


def write(out: Path, wish: Wish) -> list[Path]:
    """Site folders machine-00 .. machine-19, all with the same inputs and targets in the same order.

    Raises:
        ConfigError: `plants` or `groups` was asked for.
        DataError: the file is absent or is not the published set.
    """
    as_it_comes(wish, "alarms", MACHINES)
    path = find_folder(wish, "packaging_alarms", FILE, SOURCE) / FILE
    parts = {part: _read(path, part) for part in ("train", "test")}
    return write_plants(out, [_plant(machine, parts) for machine in range(MACHINES)])


def _read(path: Path, part: str) -> tuple[Codes, NDArray[np.bool_], NDArray[np.int64]]:
    """Codes of the windows (rows, 109), codes to come (rows, 153) and the machine of each row, in the file's order."""
    try:
        with path.open("rb") as raw, np.load(raw, allow_pickle=False) as file:
            x, packed, machine = (file[f"{name}_{part}"] for name in ("x", "y_multilabel", "stratify"))
    except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
        raise DataError(f"{path}: not the published windows ({type(error).__name__}: {error}). {SOURCE}") from None
    if x.ndim != 2 or len(packed) != len(x) or len(machine) != len(x) or not len(x) or x.max() > CODES[-1]:
        raise DataError(f"{path}: `x_{part}` should hold codes 0 to {CODES[-1]}, a row a window. {SOURCE}")
    to_come = np.unpackbits(packed, axis=1)[:, 1 : len(CODES) + 1].astype(bool)
    return x, to_come, machine.astype(np.int64)


def times(x: Codes) -> Floats:
    """When each window began, in window lengths (1,720 minutes) since the first, for the windows of one machine.

    A window and the one an hour later share a stretch of alarms: the end of the one is the start of the other. Such pairs
    join the windows to spells within which every time is known to the minute. Within a pass the next row is at least one
    window length later, which puts the spells in order; lengths without any row are not counted. A row that shares
    nothing with others, at the very end of a pass or start of the next, may land on the other side of that bound.

    Args:
        x: (rows, 109) codes in the file's order, 0 behind the last alarm.
    """
    count = len(x)
    spell, minute = _spells(count, _pairs(x))
    alone = np.bincount(spell, minlength=count)[spell] == 1
    if alone.mean() > 0.75:  # nothing to hold on to: passes of equal length
        return np.arange(count, dtype=np.float64) % (count / PASSES)
    begin: dict[int, float] = {}  # of a spell, in minutes since the first window
    begin_minute = np.zeros(count)
    lead = int(np.argmin(alone))  # rows of a pass that stand before the first of a spell
    waiting: list[int] = []  # rows alone, since the last one of a spell
    last = -WINDOW
    for row in range(count):
        if alone[row]:
            waiting.append(row)
            continue
        # a spell met for the first time begins where the rows before it end
        first = begin.setdefault(int(spell[row]), last + WINDOW * (1 + len(waiting)) - minute[row])
        begin_minute[row] = first + minute[row]
        # where time falls back a pass has ended, and the next begins with as many rows alone as the first did
        ahead = 0 if begin_minute[row] > last else min(lead, len(waiting))
        behind = len(waiting) - ahead
        begin_minute[waiting[:behind]] = last + WINDOW * np.arange(1, behind + 1)
        begin_minute[waiting[behind:]] = begin_minute[row] - WINDOW * np.arange(ahead, 0, -1)
        waiting, last = [], begin_minute[row]
    begin_minute[waiting] = last + WINDOW * np.arange(1, len(waiting) + 1)
    return np.asarray((begin_minute - begin_minute.min()) / WINDOW, dtype=np.float64)


def _pairs(x: Codes) -> list[tuple[int, int, float]]:
    """(row, later row, minutes between them) of windows that share a stretch, up to three hours apart; surest first.

    A row of the next pass began 60 minutes later. The last pass began 28 x 60 minutes after the first, so the next window
    of the first pass follows it by 40.
    """
    count, length = len(x), (x > 0).sum(axis=1)
    wide = np.zeros((count, x.shape[1] + LINK), dtype=np.uint8)
    wide[:, : x.shape[1]] = x
    # LINK codes from each place on, as one number: (rows, LATEST + 1)
    stretch = np.lib.stride_tricks.sliding_window_view(wide[:, : LATEST + LINK], LINK, axis=1)
    key = np.ascontiguousarray(stretch).view(np.uint64)[..., 0]
    begins = np.arange(key.shape[1])
    whole = count / PASSES  # rows of a pass, some more or less
    pairs = []
    for passes in (1, 2, 3, 1 - PASSES, 2 - PASSES, 3 - PASSES):
        middle = passes * whole + (passes < 0)
        minutes = passes * HOUR + (WINDOW if passes < 0 else 0.0)
        best: dict[int, tuple[int, int]] = {}
        for step in range(math.floor(middle - 0.35 * whole) - 1, math.ceil(middle + 0.35 * whole) + 2):
            if step * passes <= 0 or abs(step) >= count:
                continue
            earlier = slice(0, count - step) if step > 0 else slice(-step, count)
            later = slice(step, count) if step > 0 else slice(0, count + step)
            same = (key[earlier] == key[later, :1]) & (begins <= length[earlier, None] - LINK)
            for index, skipped in zip(*np.nonzero(same), strict=True):
                row = int(index) + earlier.start
                other, left = row + step, int(length[row] - skipped)
                longest = max(best.get(row, (0, 0))[0], 0.6 * length[row])
                if longest < left <= length[other] and np.array_equal(x[row, skipped:][:left], x[other, :left]):
                    best[row] = (left, other)
        pairs += [(row, other, minutes) for row, (_, other) in best.items()]
    return pairs


def _spells(count: int, pairs: list[tuple[int, int, float]]) -> tuple[NDArray[np.int64], Floats]:
    """The spell of each row, and its minutes since the spell's own zero. A pair that contradicts those before it is dropped."""
    parent, minute = list(range(count)), [0.0] * count  # union-find; minutes after the parent

    def root(row: int) -> tuple[int, float]:
        after, path = 0.0, []
        while parent[row] != row:
            path.append(row)
            after += minute[row]
            row = parent[row]
        remaining = after
        for step in path:  # every row on the path now hangs on the root itself
            parent[step], minute[step], remaining = row, remaining, remaining - minute[step]
        return row, after

    for row, other, between in pairs:
        (top, first), (below, second) = root(row), root(other)
        if top != below:
            parent[below], minute[below] = top, first + between - second
    roots = [root(row) for row in range(count)]
    return np.array([top for top, _ in roots]), np.array([after for _, after in roots])


def inputs_of(x: Codes) -> pl.DataFrame:
    """(rows, 306): log(1 + count) of every code, and 1 / (1 + alarms since its last); both 0 where it did not ring."""
    rows, length = len(x), (x > 0).sum(axis=1)
    count = np.zeros((rows, len(CODES) + 1), dtype=np.float32)
    recent = np.zeros_like(count)
    every = np.arange(rows)
    for position in range(x.shape[1]):  # from the oldest alarm to the newest, so that the newest of a code stays
        present = position < length
        code = x[:, position][present]
        count[every[present], code] += 1.0
        recent[every[present], code] = 1.0 / (length[present] - position)
    columns = {f"n{code:03d}": np.log1p(count[:, code]) for code in CODES}
    return pl.DataFrame(columns | {f"r{code:03d}": recent[:, code] for code in CODES})


@dataclass(frozen=True)
class Past:
    """How often each code rang in windows of the past (153,), older ones counting less, and what they count together."""

    rang: Floats
    windows: float


NOTHING = Past(np.zeros(len(CODES)), 0.0)


def history(x: Codes, when: Floats, before: Past = NOTHING) -> tuple[pl.DataFrame, Past]:
    """(rows, 306): log-odds of each code in the last weeks `w...` and days `d...`, as the machine's own log has them when a
    window begins; and what is to be handed on to later rows.

    What rings at a machine changes over the weeks, and a window reaches back a day. Known are the windows that ended before
    this one began, each counting less the longer it is ago. The days start from what is usual in the weeks.

    Args:
        x: (rows, 109) codes, in order of time.
        when: (rows,) when each window began, in window lengths, ascending.
        before: the weeks before the first row.
    """
    rang = np.zeros((len(x), len(CODES) + 1))
    rang[np.arange(len(x))[:, None], x] = 1.0
    rang = rang[:, 1:]
    weeks, weeks_count = _fading(rang, when, WEEKS, before)
    days, days_count = _fading(rang, when, DAYS, NOTHING)
    usual = (weeks + ONE * UNKNOWN) / (weeks_count + ONE)
    lately = (days + USUAL * usual) / (days_count + USUAL)
    columns: dict[str, NDArray[np.float32]] = {}
    for name, rate in (("w", usual), ("d", lately)):
        rate = np.clip(rate, RARE, 1.0 - RARE)
        odds = (np.log(rate / (1.0 - rate)) / ODDS).astype(np.float32)
        columns |= {f"{name}{code:03d}": odds[:, index] for index, code in enumerate(CODES)}
    if not len(x):
        return pl.DataFrame(columns), before
    end = when[-1] - SEAM
    fade = np.where(when <= end, np.exp((when - end) / WEEKS), 0.0)
    old = math.exp(min(0.0, when[0] - end) / WEEKS)
    return pl.DataFrame(columns), Past(fade @ rang + old * before.rang, float(fade.sum()) + old * before.windows)


def _fading(rang: Floats, when: Floats, span: float, before: Past) -> tuple[Floats, Floats]:
    """(rows, 153) and (rows, 1): sums over the windows that ended before each began, by exp(-how long ago / span)."""
    sums, counts = np.zeros(rang.shape), np.zeros((len(rang), 1))
    seen, count, last, ended = before.rang, before.windows, 0.0, 0
    for row, now in enumerate(when):
        fade = math.exp((last - now) / span)
        seen, count, last = seen * fade, count * fade, float(now)
        while ended < row and when[ended] <= now - 1.0:
            fresh = math.exp((when[ended] + 1.0 - now) / span)
            seen, count, ended = seen + fresh * rang[ended], count + fresh, ended + 1
        sums[row], counts[row] = seen, count
    return sums, counts


def _plant(machine: int, parts: dict[str, tuple[Codes, NDArray[np.bool_], NDArray[np.int64]]]) -> Plant:
    name = f"machine-{machine:02d}"

    def files() -> Files:
        tables, past = {}, NOTHING
        for part in ("train", "test"):  # in the order of time
            x, to_come, machines = parts[part]
            mine = machines == machine
            tables[part], past = _table(x[mine], to_come[mine], times(x[mine]), past)
        train, kept = _with_gap(tables["train"])
        when = pl.col("when")
        block = pl.format("test-{}", (when // BLOCK).cast(pl.Int32).cast(pl.String).str.zfill(3))
        test = tables["test"].with_columns(group=block).drop("when")
        about = _site_toml(name, train, test, len(tables["train"]) - len(train), kept)
        train = train.with_columns(group=pl.lit("train")).drop("when")
        return {"train.parquet": parquet(train), "test.parquet": parquet(test), "site.toml": about}

    return Plant(name, files)


def _table(x: Codes, to_come: NDArray[np.bool_], when: Floats, before: Past) -> tuple[pl.DataFrame, Past]:
    """`order` and `when`, the inputs and the targets, in the order of time; and the log to be handed on."""
    order = np.argsort(when, kind="stable")
    targets = {f"y{code:03d}": to_come[order, index].astype(np.int8) for index, code in enumerate(CODES)}
    clock = pl.DataFrame({"order": np.arange(len(x)), "when": when[order]})
    log_odds, past = history(x[order], when[order], before)
    return clock.hstack(inputs_of(x[order])).hstack(log_odds).hstack(pl.DataFrame(targets)), past


def _with_gap(rows: pl.DataFrame) -> tuple[pl.DataFrame, int]:
    """`rows` without those too close before the last 15 %, and how many of the rest are for training."""
    when = rows["when"].to_numpy()
    cut = when[min(len(when) - 1, round((1.0 - VALIDATION) * len(when)))]
    gap = min(GAP, 0.25 * cut)  # a machine of a few window lengths cannot afford more
    training = when < cut - gap
    if not training.any():  # all of it rang within one window length
        training = np.arange(len(when)) < round((1.0 - VALIDATION) * len(when))
        return rows, int(training.sum())
    return rows.filter(training | (when >= cut)), int(training.sum())


def _site_toml(name: str, train: pl.DataFrame, test: pl.DataFrame, dropped: int, kept: int) -> bytes:
    table = {
        "name": name,
        "data": {
            "files": "train.parquet",
            "test_files": "test.parquet",
            "group": "group",
            "order": "order",
            "channels": [name for names in OWN for name in names],
            # counts mean the same at every machine, and most codes never ring at most machines: a stem that all lend
            # needs them as they are, each column at its place
            "scale": "none",
            "clean": {"constant": "keep", "outliers": "keep"},
            "split": {"by": "time", "validation": 1.0 - kept / len(train)},
        },
        # judged over all cells together, where a frequent code counts as often as it rings: rare ones get no extra weight
        "tasks": {
            "alarms": {
                "kind": "multilabel",
                "targets": [f"y{code:03d}" for code in CODES],
                "skip_channels": OWN,
                "class_weights": "none",
            }
        },
    }
    about = (
        f"Packaging machine {name[-2:]} of ALPI: {len(train)} windows to learn from, {len(test)} of the publisher's to test.\n"
        "n...: log(1 + how often a code rang in the last 1,720 minutes); r...: 1 / (1 + alarms since it last did);\n"
        "w..., d...: log-odds of a code in the log of the last eleven weeks and five days before the window, divided by 4;\n"
        "y...: whether it rings in the next 480 minutes. 153 codes, the same at every machine; 0 is padding.\n"
        "The windows overlap and the publisher's rows are not in the order of time; here they are. The last rows\n"
        f"validate; {dropped} windows that reach into them were left out. Test rows are grouped by {BLOCK} window lengths."
    )
    return toml(table, about)
