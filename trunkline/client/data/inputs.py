"""Table columns -> the matrix a model reads: cleaned, scaled by regime, filled, in the order of the channels."""

import numpy as np
import polars as pl
from numpy.typing import NDArray

from trunkline.client.data import clean
from trunkline.client.data.layout import Layout
from trunkline.client.data.notes import Findings, counted
from trunkline.client.data.read import Table
from trunkline.client.data.regimes import Regimes
from trunkline.client.data.scale import Scaler, moments, scale
from trunkline.config import SiteConfig

AGE = "age"
MANY_REGIMES = 50
Floats = NDArray[np.float64]
Rows = NDArray[np.int64]


def read_inputs(
    table: Table, config: SiteConfig, layout: Layout, findings: Findings
) -> tuple[NDArray[np.float32], Scaler, list[clean.ChannelStatistics]]:
    """The scaled, filled input matrix (rows, channels), how it was scaled, and what the channels looked like before."""
    rules, training = config.data.clean, layout.training
    names = [name for name in config.data.channels if name in table.frame.columns]
    regimes, regime = _regimes(table, config, layout, findings)
    inputs = [*names, AGE] if config.data.age else names
    values = np.empty((len(layout.rows), len(inputs)), dtype=np.float32, order="F")
    shape = (len(regimes), len(inputs))
    count, mean, std = np.zeros(shape, dtype=np.int64), np.zeros(shape), np.zeros(shape)
    report: list[clean.ChannelStatistics] = []
    # without windows and without `order` rows are not neighbours in time: there is nothing to carry forward
    unordered = config.data.window is None and config.data.order is None
    for place, name in enumerate(names):
        raw = table.frame[name].to_numpy()[layout.rows]
        raw, impossible = clean.possible(raw, rules.valid.get(name))
        raw, outlying = clean.outliers(raw, training, regime, rules)
        report.append(clean.statistics(name, raw, impossible, outlying))
        count[:, place], mean[:, place], std[:, place] = moments(raw[training], regime[training], len(regimes))
        _judge(name, raw[training], report[-1], findings)
        scaled = scale(raw, mean[:, place], std[:, place], regime)
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
        values[:, place] = scaled
    if config.data.age:
        values[:, -1] = _age(layout, std, count, findings)
    return np.ascontiguousarray(values), Scaler(tuple(inputs), regimes, count, mean, std), report


def _age(layout: Layout, std: Floats, count: Rows, findings: Findings) -> NDArray[np.float32]:
    """(rows,) time since each group's first row, in training standard deviations; fills the last column of `std` and `count`."""
    start = np.full(len(layout.names), np.inf)
    np.minimum.at(start, layout.group, layout.order)
    age = layout.order - start[layout.group]
    std[:, -1], count[:, -1] = float(age[layout.training].std()), int(layout.training.sum())
    if not std[0, -1]:
        findings.problem("site.toml", "`age = true`, but every training row has the same age.", "Set `age = false`.")
    return scale(age, np.zeros(1), std[:1, -1], np.zeros(len(age), dtype=np.int64))


def _judge(name: str, training: Floats, seen: clean.ChannelStatistics, findings: Findings) -> None:
    """Problems and notes of one channel, from its training values and its statistics."""
    known = training[~np.isnan(training)]
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
    if not len(known):
        findings.problem(
            f"channel {name}", f"`{name}` has no value in any training row.", f"Take `{name}` out of `channels`."
        )
    elif known.min() == known.max():
        findings.problem(
            f"channel {name}",
            f"`{name}` is constant: {known[0]:g} in all {len(known):,} training values.",
            f"Take `{name}` out of `channels`.",
        )


def _regimes(table: Table, config: SiteConfig, layout: Layout, findings: Findings) -> tuple[Regimes, Rows]:
    """The operating regimes of the training rows, and the regime of every row."""
    names = tuple(name for name in config.data.regime if name in table.frame.columns)
    settings = np.empty((len(layout.rows), len(names)))
    for place, name in enumerate(names):
        column, _ = clean.possible(table.frame[name].to_numpy()[layout.rows], None)
        if missing := int(np.isnan(column).sum()):
            known = column[layout.training]
            middle = float(np.nanmedian(known)) if not np.isnan(known).all() else 0.0
            findings.warn(name, f"{counted(missing, 'row')} without this setting; the last one of the group is taken.")
            gap, left, _ = clean.neighbours(np.isnan(column), layout.first, layout.last)
            column = column.copy()
            column[gap] = column[left]
            column = np.where(np.isnan(column), middle, column)
        settings[:, place] = column
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
    columns, known = [], []
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
        known.append(tuple(names))
    codes = np.stack(columns, axis=1) if columns else np.zeros((len(layout.rows), 0), dtype=np.int64)
    return np.ascontiguousarray(codes), tuple(known)
