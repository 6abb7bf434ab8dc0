"""Rows that belong together on both sides of the split: the leak that makes a figure too good, found without knowing the plant.

A rig that holds each condition for ten cycles gives ten near copies of one sample. Split cycle by cycle, nine of them
train what the tenth tests: on a real rig a valve's condition was then told with .99 accuracy, where whole runs of
cycles set aside give .66. Two marks betray it, both of which must be seen:

* By group: groups that follow each other share all labels in far longer runs than chance would give, the split cuts those
  runs, and a group is more like its neighbour than like others with the very same labels.
* By time: each group has one label throughout and lies on several sides, so that a model may know the group again and say
  its label.

Neither is proof, so both are warnings: a plant with one run per fault has nothing better than a split in time.
"""

import re

import numpy as np
import polars as pl
from numpy.typing import NDArray

from trunkline.client.data.layout import Layout
from trunkline.client.data.notes import Findings, counted
from trunkline.client.data.split import PARTS, Split
from trunkline.config.site import SiteConfig
from trunkline.config.tasks import CLASSED
from trunkline.models.labels import Labels

FEWEST = 20  # groups; below it a run of equal labels is no pattern
RUN = 5.0  # groups a run holds on average, at least
RATIO = 0.5  # of the number of runs that a random order would give, at most
PAIRS = 2000  # neighbours looked at, at most
SIGMAS = 4.0  # by which "nearer to its neighbour than to its like" leaves a coin toss behind
STEADY = 0.9  # share of the groups that have one label throughout
KINDS = (*CLASSED, "regression", "multilabel")  # kinds whose label says what state a row is in

Codes = NDArray[np.int64]
Floats = NDArray[np.float64]


def warn_of_leakage(
    config: SiteConfig,
    layout: Layout,
    split: Split,
    test_from: int,
    values: NDArray[np.float32],
    labels: dict[str, Labels],
    findings: Findings,
) -> None:
    """Warn where the split lets the test see what it was trained on.

    Args:
        layout: of all rows, dealt to parts by `split`.
        own: table rows before this one come from `files`; only they were split.
        values: (rows, channels) scaled inputs in the order of `layout`.
        labels: task -> (rows,) or (rows, k) in file order, before `labelled_groups` took any away.
    """
    mine = np.flatnonzero(layout.rows < test_from)
    columns = [labels[name] for name in labels if config.tasks[name].kind in KINDS]
    if config.data.group is None or not columns or not len(mine):
        return
    groups, member = np.unique(layout.group[mine], return_inverse=True)
    code, steady = _labels_of(columns, layout.rows[mine], member, len(groups))
    if steady.mean() < STEADY or len(np.unique(code)) < 2:
        return
    part = layout.part[mine]
    if split.by == "time":
        _in_time(config.data.group, code, member, part, findings)
    elif len(groups) >= FEWEST:
        first = np.full(len(groups), test_from)
        np.minimum.at(first, member, layout.rows[mine])
        side = np.zeros(len(groups), dtype=np.int8)
        side[member] = part
        names = [layout.names[group] for group in groups]
        for order in _orders(first, layout.order[mine], member, names):
            if runs := _runs(code[order]):
                centre = _centres(values[mine], member, len(groups))[order]
                if _torn(config.data.group, runs, code[order], side[order], centre, findings):
                    return


def _labels_of(labels: list[Labels], rows: Codes, member: Codes, groups: int) -> tuple[Codes, NDArray[np.bool_]]:
    """(groups,) code of each group's labels of all tasks together, and whether they are the same in all its rows."""
    columns = np.concatenate([column[rows].reshape(len(rows), -1) for column in labels], axis=1)
    table = pl.DataFrame(columns).fill_nan(None).with_columns(group=pl.Series(member))
    ends = table.group_by("group").agg(
        pl.exclude("group").min().name.suffix("<"), pl.exclude("group").max().name.suffix(">")
    )
    ends = ends.sort("group").drop("group").fill_null(-1e38)  # nobody's label: a code of its own
    low, high = (ends.select(pl.col(f"^.*{mark}$")).to_numpy() for mark in "<>")
    code = np.unique(low, axis=0, return_inverse=True)[1].reshape(groups)
    return code.astype(np.int64), (low == high).all(axis=1)


def _in_time(column: str, code: Codes, member: Codes, part: NDArray[np.int8], findings: Findings) -> None:
    sides = np.zeros((len(code), len(PARTS)), dtype=bool)
    sides[member, part] = True
    torn = sides.sum(axis=1) > 1
    if len(code) > 1 and torn.mean() > 0.5:
        findings.warn(
            f"group `{column}`",
            f'each group has the same labels in all its rows, and `by = "time"` puts {counted(int(torn.sum()), "group")} '
            "on more than one side: a model that knows a group again knows its label.",
            "Where several groups share a label, split by group; where there is one group a label, read the figures as "
            "how well these very machines are told apart.",
        )


def _orders(first: Codes, order: Floats, member: Codes, names: list[str]) -> list[Codes]:
    """The orders in which groups may have come about: of the file, of a clock that runs through them, of their numbers."""
    orders = [np.argsort(first, kind="stable")]
    low, high = np.full(len(first), np.inf), np.full(len(first), -np.inf)
    np.minimum.at(low, member, order)
    np.maximum.at(high, member, order)
    by_clock = np.argsort(low, kind="stable")
    if (low[by_clock[1:]] > high[by_clock[:-1]]).all():
        orders.append(by_clock)
    numbers = [re.search(r"\d+(?!.*\d)", name) for name in names]
    if all(numbers):
        orders.append(np.argsort([int(match[0]) for match in numbers if match], kind="stable"))
    return orders


def _centres(values: NDArray[np.float32], member: Codes, groups: int) -> Floats:
    """(groups, channels) mean of each group's scaled inputs; a silent channel counts as its mean."""
    total = [np.bincount(member, np.nan_to_num(channel), minlength=groups) for channel in values.T]
    return np.stack(total, axis=1) / np.bincount(member, minlength=groups)[:, None]


def _runs(code: Codes) -> int:
    """How many runs of equal labels groups in this order make; 0 where the runs are short, or what chance would give."""
    groups, runs = len(code), 1 + int((code[1:] != code[:-1]).sum())
    of_class = np.bincount(code)
    by_chance = 1 + (groups - 1) * (1 - (of_class * (of_class - 1)).sum() / (groups * (groups - 1)))
    return runs if groups / runs >= RUN and runs <= RATIO * by_chance else 0


def _torn(column: str, runs: int, code: Codes, side: NDArray[np.int8], centre: Floats, findings: Findings) -> bool:
    """Whether the split parts neighbours that are more alike than their labels ask for; warned of if so."""
    groups = len(code)
    torn = np.flatnonzero((code[1:] == code[:-1]) & (side[1:] != side[:-1]))
    draw = np.random.default_rng(0)  # any seed: a coin toss a pair
    nearer = further = 0
    for left in torn[:: 1 + len(torn) // PAIRS].tolist():
        alike = np.flatnonzero(code == code[left])
        alike = alike[np.abs(alike - left) > 1]
        if len(alike):
            other = centre[draw.choice(alike)]
            near, far = (
                float(np.square(centre[left] - centre_of_pair).sum()) for centre_of_pair in (centre[left + 1], other)
            )
            nearer, further = nearer + (near < far), further + (near > far)
    if nearer - further < SIGMAS * np.sqrt(nearer + further) or not nearer:
        return False
    findings.warn(
        f"group `{column}`",
        f"rows that belong together are on both sides of the split. The {groups:,} groups follow each other in {runs:,} runs "
        f"of equal labels ({groups / runs:.0f} groups a run), {len(torn):,} neighbours of one run lie on different sides, "
        "and neighbours are more alike than others with the same labels. The figures will flatter the model.",
        f"`{column}` looks too fine: give each run (batch, set-up, condition) a name in a column and make that the `group`.",
    )
    return True
