"""Table columns -> the matrix a model reads: cleaned, scaled by regime, filled, in the order of the channels."""

from collections.abc import Sequence
from typing import Literal

import numpy as np
import polars as pl
from numpy.typing import NDArray

from trunkline.client.data.layout import Layout
from trunkline.client.data.notes import Findings, counted, some
from trunkline.client.data.preprocess import clean
from trunkline.client.data.preprocess.reference import MARK, reference
from trunkline.client.data.preprocess.regimes import Regimes
from trunkline.client.data.preprocess.scale import Scaler, moments, scale
from trunkline.client.data.preprocess.shrinkage import PooledPrior, groups_seen, match_pooled
from trunkline.client.data.read import Table
from trunkline.config.site import SiteConfig
from trunkline.release import PooledScale

AGE = "age"
MANY_REGIMES = 50
Floats = NDArray[np.float64]
Rows = NDArray[np.int64]


def read_inputs(
    table: Table, config: SiteConfig, layout: Layout, findings: Findings, scales: Sequence[PooledScale] = ()
) -> tuple[NDArray[np.float32], Scaler, list[clean.ChannelStatistics]]:
    """The scaled, filled input matrix (rows, channels), how it was scaled, and what the channels looked like before.

    Args:
        scales: statistics of a federation to shrink towards where there are few groups; see `shrinkage.py`.
    """
    rules, training = config.data.clean, layout.training
    names = [name for name in config.data.channels if name in table.frame.columns]
    regimes, regime = _regimes(table, config, layout, findings)
    groups = groups_seen(layout.group[training], regime[training], len(regimes)) if scales else np.zeros(0)
    prior = match_pooled(scales, regimes, groups) if config.data.scale == "zscore" else None
    references = [name + MARK for name in names] if config.data.reference else []
    inputs = [*names, *references, *([AGE] if config.data.age else [])]
    values = np.empty((len(layout.rows), len(inputs)), dtype=np.float32, order="F")
    shape = (len(regimes), len(inputs))
    count, mean, std = np.zeros(shape, dtype=np.int64), np.zeros(shape), np.zeros(shape)
    report: list[clean.ChannelStatistics] = []
    still: list[str] = []  # channels that never move in training, kept because site.toml says so
    # without windows and without `order` rows are not neighbours in time: there is nothing to carry forward
    unordered = config.data.window is None and config.data.order is None
    for index, name in enumerate(names):
        raw = table.frame[name].to_numpy()[layout.rows]
        raw, impossible = clean.possible(raw, rules.valid.get(name))
        raw, outlying = clean.outliers(raw, training, regime, rules)
        report.append(clean.statistics(name, raw, impossible, outlying))
        count[:, index], mean[:, index], std[:, index] = moments(raw[training], regime[training], len(regimes))
        if config.data.scale == "none":
            mean[:, index], std[:, index] = 0.0, 1.0
        constant = "keep" if prior and prior.knows(name) else rules.constant  # it moves at others, and may on test rows
        if prior is not None:
            mean[:, index], std[:, index] = prior.shrink(name, count[:, index], mean[:, index], std[:, index])
        if not _judge(name, raw[training], report[-1], constant, findings):
            still.append(name)
        scaled = scale(raw, mean[:, index], std[:, index], regime)
        policy = rules.channels.get(name, rules.missing)
        silent = clean.fill(
            scaled,
            layout.first,
            layout.last,
            layout.order,
            "keep" if unordered and policy in ("forward", "linear") else policy,
        )
        if report[-1].missing and report[-1].minimum is not None:
            left = f"; {silent:,} stay missing and count as a silent sensor" if silent else ""
            findings.info(name, f"{report[-1].missing:.2%} of the values are missing; filled by {policy!r}{left}.")
        values[:, index] = scaled
    if still and rules.constant == "keep":
        constants = f"{counted(len(still), 'channel')} never {'moves' if len(still) == 1 else 'move'} in training: {some(still)}."
        findings.warn(
            "channels", constants, "Kept, as `[data.clean] constant` says; nothing can be learnt from them here."
        )
    if config.data.reference:
        reference_columns = slice(len(names), 2 * len(names))
        values[:, reference_columns] = reference(values[:, : len(names)], layout, config.data.reference)
        count[:, reference_columns], std[:, reference_columns] = (
            count[:, : len(names)],
            1.0,
        )  # made of what is scaled already
    if config.data.age:
        values[:, -1] = _age(layout, std, count, prior, findings)
    return np.ascontiguousarray(values), Scaler(tuple(inputs), regimes, count, mean, std), report


def _age(
    layout: Layout, std: Floats, count: Rows, prior: PooledPrior | None, findings: Findings
) -> NDArray[np.float32]:
    """(rows,) time since each group's first row, in training standard deviations; fills the last column of `std` and `count`."""
    start = np.full(len(layout.names), np.inf)
    np.minimum.at(start, layout.group, layout.order)
    age = layout.order - start[layout.group]
    std[:, -1], count[:, -1] = float(age[layout.training].std()), int(layout.training.sum())
    if prior is not None:  # one figure for all regimes, as the age has none
        std[:, -1] = prior.shrink(AGE, count[:, -1], np.zeros(len(std)), std[:, -1])[1].mean()
    if not std[0, -1]:
        findings.problem("site.toml", "`age = true`, but every training row has the same age.", "Set `age = false`.")
    return scale(age, np.zeros(1), std[:1, -1], np.zeros(len(age), dtype=np.int64))


def _judge(
    name: str,
    training: Floats,
    seen: clean.ChannelStatistics,
    constant: Literal["refuse", "keep"],
    findings: Findings,
) -> bool:
    """Problems and notes of one channel, from its training values and its statistics; False where it never moves."""
    values = training[~np.isnan(training)]
    if seen.impossible:
        findings.warn(
            name,
            f"{counted(seen.impossible, 'impossible value')} (infinite or outside its valid range) treated as missing.",
        )
    if seen.outliers:
        findings.info(
            name,
            f"{counted(seen.outliers, 'outlier')} by `robust_z`.",
            'Look at them; `outliers = "clip"` under [data.clean] would pull them in.',
        )
    if len(values) and values.min() < values.max():
        return True
    if constant == "refuse":
        complaint = (
            f"`{name}` is constant: {values[0]:g} in all {len(values):,} training values."
            if len(values)
            else f"`{name}` has no value in any training row."
        )
        findings.problem(f"channel {name}", complaint, f"Take `{name}` out of `channels`.")
    return False


def _regimes(table: Table, config: SiteConfig, layout: Layout, findings: Findings) -> tuple[Regimes, Rows]:
    """The operating regimes of the training rows, and the regime of every row."""
    names = tuple(name for name in config.data.regime if name in table.frame.columns)
    settings = np.empty((len(layout.rows), len(names)))
    for index, name in enumerate(names):
        column, _ = clean.possible(table.frame[name].to_numpy()[layout.rows], None)
        if missing := int(np.isnan(column).sum()):
            training = column[layout.training]
            middle = float(np.nanmedian(training)) if not np.isnan(training).all() else 0.0
            findings.warn(name, f"{counted(missing, 'row')} without this setting; the last one of the group is taken.")
            gap, left, _ = clean.neighbours(np.isnan(column), layout.first, layout.last)
            column = column.copy()
            column[gap] = column[left]
            column = np.where(np.isnan(column), middle, column)
        settings[:, index] = column
    regimes = Regimes.find(names, settings[layout.training])
    for name, cuts in zip(regimes.settings, regimes.cuts, strict=True):
        if not cuts:
            findings.info(name, "has no separate levels in training; it splits nothing into regimes.")
    if len(regimes) > MANY_REGIMES:
        findings.warn(
            "regime",
            f"{len(regimes)} regimes were found.",
            "Few rows are left to each; is `regime` a setting or a measurement?",
        )
    return regimes, regimes.of(settings)


def read_categories(table: Table, config: SiteConfig, layout: Layout) -> tuple[Rows, tuple[tuple[str, ...], ...]]:
    """(rows, k) codes and the names behind them; values that training does not know, and missing ones, are 0."""
    columns, category_names = [], []
    for name in config.data.categorical:
        if name not in table.frame.columns:
            continue
        column = table.frame[name].cast(pl.String)[layout.rows]
        names = column.filter(pl.Series(layout.training)).drop_nulls().unique().sort().to_list()
        columns.append(
            column.replace_strict(names, list(range(1, len(names) + 1)), default=0, return_dtype=pl.Int64)
            .fill_null(0)
            .to_numpy()
        )
        category_names.append(tuple(names))
    codes = np.stack(columns, axis=1) if columns else np.zeros((len(layout.rows), 0), dtype=np.int64)
    return np.ascontiguousarray(codes), tuple(category_names)
