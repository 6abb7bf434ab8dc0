"""A site folder -> scaled windows with labels, split without leaks. `survey` collects every problem, `open_data` refuses them."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from trunkline.client.data.inputs import AGE, read_categories, read_inputs
from trunkline.client.data.layout import Layout, keep_apart, lay_out_rows, read_groups, sort_rows
from trunkline.client.data.leakage import warn_of_leakage
from trunkline.client.data.notes import Findings, Note, counted, some
from trunkline.client.data.preprocess.clean import ChannelStatistics
from trunkline.client.data.preprocess.scale import Scaler
from trunkline.client.data.read import Table, read_table
from trunkline.client.data.split import PARTS, TEST, TRAIN, Split, write_split
from trunkline.client.data.windows import WindowSet, ends_of
from trunkline.config.site import SiteConfig, read_site
from trunkline.config.tasks import CLASSED
from trunkline.errors import ConfigError, DataError
from trunkline.models.labels import Labels, Places
from trunkline.release import PooledScale
from trunkline.runtime.storage import Sealing

if TYPE_CHECKING:
    from trunkline.models.tasks.task import Samples, Task

Rows = NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class SiteData:
    """What a site trains on. None of it leaves the plant.

    Args:
        train, validation, test: samples; no group (or, split by time, no row) is in two of them.
        tasks: name -> task, fitted on the training labels.
        channels: inputs in order: those of site.toml, then "age" where asked for.
        categories: how many codes each categorical column has, 0 = unknown included.
        category_names: per categorical column, the values of codes 1, 2, ...
        scaler: learnt from training rows.
        notes: what cleaning did and what deserves a look.
    """

    config: SiteConfig
    train: WindowSet
    validation: WindowSet
    test: WindowSet
    tasks: "dict[str, Task]"
    channels: tuple[str, ...]
    categories: tuple[int, ...]
    category_names: tuple[tuple[str, ...], ...]
    scaler: Scaler
    notes: tuple[Note, ...]


@dataclass
class Survey:
    """How far opening a site came: `site` is there as soon as anything could be made of it, problems or not."""

    config: SiteConfig
    findings: Findings = field(default_factory=Findings)
    files: tuple[Path, ...] = ()
    rows: int = 0
    groups: dict[str, int] = field(default_factory=dict)
    statistics: list[ChannelStatistics] = field(default_factory=list)
    split: Split | None = None
    site: SiteData | None = None


def open_data(folder: Path, state: Path, seal: Sealing | None = None) -> SiteData:
    """The data of the site in `folder`, split as `state`/split.json says (written on the first call).

    Raises:
        ConfigError: site.toml is absent or says something that cannot be meant.
        DataError: the files are not what site.toml describes; one line a problem, all problems at once.
        StorageError: split.json cannot be written.
        TrustError: split.json cannot be opened by `seal`, which is that of `state`.
    """
    result = survey(folder, state, seal=seal)
    result.findings.refuse()
    if result.site is None or result.split is None:
        raise DataError(f"{folder}: nothing to train on. `trunkline check {folder}` says more.")
    write_split(state / "split.json", result.split, seal)
    return result.site


def open_newcomer(
    folder: Path, state: Path | None, scales: Sequence[PooledScale], seal: Sealing | None = None
) -> SiteData:
    """The data of a site that is new to a federation: nothing is held out for validation, and nothing is written.

    With few labels a fixed split would cost too many of them, so `train` also holds what the site would validate on, and
    who chooses by it holds groups out himself. The test rows are those that `open_data` would test on.

    Args:
        scales: the federation's statistics, which the scaler leans on where the site has few groups of its own.
        seal: that of `state`.

    Raises:
        ConfigError, DataError, TrustError: as `open_data`.
    """
    result = survey(folder, state, newcomer=tuple(scales), seal=seal)
    result.findings.refuse()
    if result.site is None:
        raise DataError(f"{folder}: nothing to adapt on. `trunkline check {folder}` says more.")
    return result.site


def survey(
    folder: Path,
    state: Path | None = None,
    newcomer: tuple[PooledScale, ...] | None = None,
    seal: Sealing | None = None,
) -> Survey:
    """Open the site as far as it goes and write nothing. Without `state` the split is a fresh one.

    Args:
        newcomer: the federation's statistics, for a site that comes to it with little data; see `open_newcomer`.
        seal: that of `state`.

    Raises:
        ConfigError: site.toml is absent or says something that cannot be meant.
        TrustError: split.json cannot be opened by `seal`.
    """
    result = Survey(read_site(folder))
    config, findings = result.config, result.findings
    _check_names(folder, config, findings)
    table = read_table(folder, config, findings)
    if table is None:
        findings.judge_tasks(())
        return result
    result.files, result.rows = table.files, table.frame.height
    tasks, labels = _read_labels(config, table, findings)
    group, order, names = read_groups(config, table, findings)
    keep_apart(table, group, names, findings)
    rows = sort_rows(table, config, group, order, findings)
    path = state / "split.json" if state else None
    layout, result.split = lay_out_rows(
        table, config, group, order, names, rows, labels, path, findings, hold_out=newcomer is None, seal=seal
    )
    result.groups = {name: len(np.unique(layout.group[layout.part == code])) for code, name in enumerate(PARTS)}
    all_labels = dict(labels)
    if result.split is not None and config.data.split.labelled_groups is not None:
        _unlabel(result.split, layout, labels)
    values, scaler, result.statistics = read_inputs(table, config, layout, findings, newcomer or ())
    if result.split is not None:
        warn_of_leakage(config, layout, result.split, table.test_from, values, all_labels, findings)
    codes, category_names = read_categories(table, config, layout)
    for task in tasks.values():
        task.bind_inputs(_samples(config, table, scaler))
    train, validation, test = (_window_set(code, config, layout, values, codes, labels, tasks) for code in range(3))
    sets = (train, validation, test)
    tasks = {name: task for name, task in tasks.items() if _fit(task, sets, str(folder), findings)}
    findings.judge_tasks(tasks)
    train, validation, test = (
        replace(samples, labels={name: label for name, label in samples.labels.items() if name in tasks})
        for samples in sets
    )
    result.site = SiteData(
        config=config,
        train=train,
        validation=validation,
        test=test,
        tasks=tasks,
        channels=scaler.channels,
        categories=tuple(len(categories) + 1 for categories in category_names),
        category_names=category_names,
        scaler=scaler,
        notes=tuple(findings.notes),
    )
    return result


def _check_names(folder: Path, config: SiteConfig, findings: Findings) -> None:
    """Names in site.toml that point at nothing."""
    where = str(folder / "site.toml")
    for key, table in (("channels", config.data.clean.channels), ("valid", config.data.clean.valid)):
        for name in table:
            if name not in config.data.channels:
                findings.problem(
                    where,
                    f"`data.clean.{key}` names `{name}`, which is not a channel.",
                    f"Channels: {some(list(config.data.channels))}.",
                )
    for name, (low, high) in config.data.clean.valid.items():
        if low >= high:
            findings.problem(
                where, f"`data.clean.valid.{name}` = [{low}, {high}] allows nothing.", "Write [lowest, highest]."
            )
    if config.data.age and AGE in config.data.channels:
        findings.problem(
            where,
            "`age = true` adds an input called `age`, and `channels` has one too.",
            "Rename the column or drop one of the two.",
        )


def _read_labels(config: SiteConfig, table: Table, findings: Findings) -> "tuple[dict[str, Task], dict[str, Labels]]":
    """The tasks whose target could be read, and their labels in file order."""
    from trunkline.models.tasks import make_task  # here, because it brings torch: reading and scaling data need none

    tasks: dict[str, Task] = {}
    labels: dict[str, Labels] = {}
    where = str(table.files[0]) + (
        f" (and {counted(len(table.files) - 1, 'further file')})" if len(table.files) > 1 else ""
    )
    for name, settings in config.tasks.items():
        if not set(settings.columns) <= set(table.frame.columns):
            continue
        try:
            task = make_task(name, settings)
            labels[name] = task.read_from(table.frame, where)
            tasks[name] = task
        except ConfigError as error:
            findings.problem("", str(error))
        except DataError as error:
            findings.set_aside(name, "", str(error))
    return tasks, labels


def _unlabel(split: Split, layout: Layout, labels: dict[str, Labels]) -> None:
    """Take the labels of all training groups but the chosen ones."""
    keeps = np.isin(np.array(layout.names), split.labelled)
    rows = layout.rows[layout.training & ~keeps[layout.group]]
    for name in labels:
        labels[name] = labels[name].copy()
        labels[name][rows] = np.nan


def _window_set(
    part: int,
    config: SiteConfig,
    layout: Layout,
    values: NDArray[np.float32],
    codes: Rows,
    labels: dict[str, Labels],
    tasks: "dict[str, Task]",
) -> WindowSet:
    start, stop = np.searchsorted(layout.part, [part, part + 1]).tolist()
    first, last = layout.first[start:stop] - start, layout.last[start:stop] - start
    ends = ends_of(first, last, config.data.stride, only_last=part == TEST and config.data.test_at == "last")
    rows = layout.rows[start:stop]
    return WindowSet(
        values=values[start:stop],
        categorical=codes[start:stop],
        first=first[ends],
        ends=ends,
        window=config.data.window,
        labels={
            name: task.labels_for_samples(labels[name][rows], Places(ends, first, last, layout.order[start:stop]))
            for name, task in tasks.items()
        },
        groups=layout.group[start:stop][ends],
        order=layout.order[start:stop][ends],
        group_names=layout.names,
    )


def _samples(config: SiteConfig, table: Table, scaler: Scaler) -> "Samples":
    from trunkline.models.tasks.task import Samples  # here, as above

    scale = zip(scaler.mean[0].tolist(), scaler.std[0].tolist(), strict=True) if len(scaler.regimes) == 1 else ()
    return Samples(scaler.channels, config.data.window, table.clock, tuple(scale))


def _longest(samples: WindowSet) -> int:
    """Rows of the longest group in a part; a group's last row always ends a sample."""
    return int((samples.ends - samples.first).max()) + 1 if len(samples) else 0


def _fit(task: "Task", sets: tuple[WindowSet, ...], where: str, findings: Findings) -> bool:
    """Fit one task on its training labels, False where it has to be set aside; note the parts in which it cannot be scored."""
    try:
        if complaint := task.unsupported(_longest(sets[TRAIN])):
            raise DataError(f"Task {task.name!r}, training rows: {complaint}")
        if task.primary not in task.metrics:
            raise DataError(
                f"[tasks.{task.name}]: `metric = {task.primary!r}` means nothing for this task as it is set up; "
                f"choose one of {', '.join(task.metrics)}."
            )
        task.fit(sets[TRAIN].labels[task.name])
        if task.combines_inputs:
            task.fit_inputs(sets[TRAIN].values[sets[TRAIN].ends], sets[TRAIN].labels[task.name])
    except DataError as error:
        findings.set_aside(task.name, where, str(error))
        return False
    for part, samples in zip(PARTS, sets, strict=True):
        for remark in task.warnings(part, samples.labels[task.name]):
            findings.warn(f"task {task.name}", remark)
    for part, samples in list(zip(PARTS, sets, strict=True))[1:]:
        label = samples.labels[task.name]
        labelled = label[task.scored_mask(label)]
        if complaint := task.unsupported(_longest(samples)):
            findings.warn(f"task {task.name}", f"{part} rows: {complaint}")
        if not len(labelled):
            target = task.config.columns[0] if task.config.columns else task.name
            findings.warn(f"task {task.name}", f"no {part} sample has a label (`{target}`); it is not scored there.")
        elif task.kind in CLASSED and labelled.min() == labelled.max():
            findings.warn(
                f"task {task.name}", f"all {part} samples are of one class; ranking metrics mean nothing there."
            )
    return True
