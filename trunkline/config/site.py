"""site.toml: a site's data, tasks, policy and hours."""

import itertools
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import ClassVar, Literal, Self

from pydantic import Field, field_validator, model_validator

from trunkline.config.parsing import parse, read
from trunkline.config.renames import RenamedKey, RenamedWord, Renaming, rename
from trunkline.config.tasks import TaskConfig
from trunkline.errors import ConfigError, nearest
from trunkline.privacy.settings import GuardDemands
from trunkline.protocol.frozen import Frozen
from trunkline.protocol.opening_hours import PlantHours
from trunkline.protocol.plan import SITE_NAME, TASK_NAME

POLICY = "policy.toml"  # beside site.toml, where the policy's owner is not the data's owner
Missing = Literal["forward", "linear", "zero", "keep"]
Outliers = Literal["flag", "clip", "keep"]


class CleanConfig(Frozen):
    """`[data.clean]`: what happens to values that cannot be right. Nothing is dropped in silence; `trunkline check` counts."""

    missing: Missing = Field(
        default="forward", description="within a group: last value, straight line, channel mean, or left missing"
    )
    outliers: Outliers = "flag"
    robust_z: float = Field(
        default=12.0, gt=0.0, description="distance from the median in units of 1.4826 MAD that counts as an outlier"
    )
    channels: dict[str, Missing] = Field(default={}, description="missing-value policy of single channels")
    valid: dict[str, tuple[float, float]] = Field(
        default={}, description="possible range per channel; outside is treated as missing"
    )
    constant: Literal["refuse", "keep"] = Field(
        default="refuse",
        description="a channel that never moves in training; keep: where sites lend a stem, all need the same channels",
    )


class SplitConfig(Frozen):
    """`[data.split]`: shares of the groups (or, without a group, of the time line) kept for validation and test."""

    validation: float = Field(default=0.2, gt=0.0, lt=1.0)
    test: float = Field(default=0.2, ge=0.0, lt=1.0, description="ignored where `test_files` names the test data")
    by: Literal["group", "time"] = "group"
    seed: int = Field(default=0, ge=0)
    labelled_groups: int | None = Field(
        default=None, ge=1, description="keep the labels of this many training groups only"
    )
    folds: int | None = Field(
        default=None,
        ge=2,
        le=100,
        description="instead of `test`: this many equal shares of the groups, one of them the test",
    )
    fold: int = Field(default=0, ge=0, description="which of the `folds` tests; 0 is the first")

    @model_validator(mode="after")
    def _one_of_the_folds(self) -> Self:
        if self.folds is None:
            if self.fold:
                raise ValueError(f"`fold = {self.fold}` without `folds`: say how many there are")
            return self
        if self.fold >= self.folds:
            raise ValueError(f"`fold = {self.fold}`, but {self.folds} `folds` are numbered 0 to {self.folds - 1}")
        if self.by == "time":
            raise ValueError('`folds` deal whole groups, `by = "time"` cuts through them: drop one of the two')
        return self


class DataConfig(Frozen):
    """`[data]`: where the rows are and what their columns mean."""

    files: str | tuple[str, ...] = Field(description="glob(s) relative to the site folder: csv, parquet, hdf5, npz")
    test_files: str | tuple[str, ...] = ()
    group: str | None = Field(default=None, description="column of what must never be split across train and test")
    order: str | None = Field(default=None, description="column of time or cycle within a group")
    channels: tuple[str, ...] = Field(min_length=1, max_length=1000)
    categorical: tuple[str, ...] = ()
    window: int | None = Field(
        default=None, ge=1, le=100_000, description="rows a window; absent: every row is a sample of its own"
    )
    stride: int = Field(default=1, ge=1)
    regime: tuple[str, ...] = ()
    scale: Literal["zscore", "none"] = Field(
        default="zscore",
        description="per channel and regime, from training rows; none: values go in as they are, alike at every site",
    )
    age: bool = False
    reference: int = Field(
        default=0,
        ge=0,
        le=100_000,
        description="each channel's mean over a group's first rows, this many, is an input too",
    )
    test_at: Literal["all", "last"] = Field(
        default="all", description="score every test window, or the last of each test group"
    )
    clean: CleanConfig = CleanConfig()
    split: SplitConfig = SplitConfig()

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.window is not None and self.categorical:
            raise ValueError("`categorical` columns are for rows; a site with `window` lists its channels only")
        if self.reference and (self.order is None or self.group is None):
            raise ValueError("`reference` is the mean of a group's first rows: it needs `group` and `order`")
        if self.age and self.order is None:
            raise ValueError("`age = true` needs `order`, the column of operating time")
        if self.test_at == "last" and self.group is None:
            raise ValueError('`test_at = "last"` needs `group`')
        if self.split.folds is not None and self.group is None:
            raise ValueError("`split.folds` deals groups: it needs `group`, the column of what belongs together")
        if self.split.folds is not None and self.test_files:
            raise ValueError("`split.folds` and `test_files` both name the test data; drop one of the two")
        if twice := [name for name in self.channels if self.channels.count(name) > 1]:
            raise ValueError(f"channel {twice[0]!r} is listed twice")
        return self


class PolicyConfig(GuardDemands):
    """`[policy]`, or policy.toml beside site.toml: the site's own word on what a run may take; it wins over the server."""

    RENAMED: ClassVar[tuple[Renaming, ...]] = (RenamedWord("strategies", "cohorts", "clustered"),)

    decide: Literal["accept", "ask", "refuse"] = Field(
        default="accept", description="a run that keeps to the rest of the policy: yes, a person is asked, or no"
    )
    lend: tuple[str, ...] = ("trunk", "stem", "heads")  # nothing is lent unless the run names it too; "heads": any head
    metrics: bool | tuple[str, ...] = Field(
        default=True, description="numbers that travel with an update: all the run has, none, or these"
    )
    report: bool = Field(default=True, description="whether results by task go to the report of the run")
    max_bytes_round: int | None = Field(default=None, ge=1, description="largest reply, in bytes")
    max_rounds: int | None = Field(default=None, ge=1, description="most rounds of a run, all passes together")
    strategies: tuple[str, ...] = Field(default=(), description="the only ones allowed; empty: any")
    operators: tuple[str, ...] = Field(default=(), description="whose runs alone are allowed; empty: anybody's")
    runs: tuple[str, ...] = Field(default=(), description="names of runs that need no person's yes")


SITE_SCHEMA = (
    1  # of site.toml: raise when a key changes its meaning; a release says what its run's sites were described by
)


class SiteConfig(Frozen):
    """site.toml, as a plant engineer writes it."""

    RENAMED: ClassVar[tuple[Renaming, ...]] = (
        RenamedKey("tasks.*.highway", "tasks.*.skip_channels"),
        RenamedWord("policy.strategies", "cohorts", "clustered"),
    )

    name: str = Field(pattern=SITE_NAME)
    data: DataConfig
    tasks: dict[str, TaskConfig] = Field(min_length=1)
    policy: PolicyConfig = PolicyConfig()
    hours: PlantHours | None = Field(default=None, description="when it may train; absent: always")

    @field_validator("tasks")
    @classmethod
    def _task_names(cls, tasks: dict[str, TaskConfig]) -> dict[str, TaskConfig]:
        import re

        for name in tasks:
            if not re.match(TASK_NAME, name):
                raise ValueError(
                    f"task name {name!r} must start with a letter and hold letters, digits, '_' and '-' only"
                )
        return tasks

    @model_validator(mode="after")
    def _skip_channels_are_channels(self) -> Self:
        for name, task in self.tasks.items():
            for channel in itertools.chain.from_iterable(task.skip_channels):
                if channel not in self.data.channels:
                    raise ValueError(
                        f"`skip_channels` of task {name!r} names `{channel}`, which is not a channel"
                        f"{nearest(channel, self.data.channels)} List it under `channels`, or correct `skip_channels`"
                    )
        return self

    @model_validator(mode="after")
    def _no_label_is_an_input(self) -> Self:
        for name, task in self.tasks.items():
            if task.kind == "forecast":  # what it reads is past, what it says is to come
                _past_only(name, self.data)
                continue
            for target in task.columns:
                if target in (*self.data.channels, *self.data.categorical):
                    raise ValueError(
                        f"`{target}` is the target of task {name!r} and an input too: the model would read its own answer"
                    )
        return self


def _past_only(task: str, data: DataConfig) -> None:
    """Refuse what would let a forecast see what comes, or leave nothing to come."""
    clean = data.clean
    for channel in data.channels:
        if clean.channels.get(channel, clean.missing) == "linear":
            raise ValueError(
                f"`missing = 'linear'` fills a gap of `{channel}` with values from behind it, which task {task!r} has to "
                "forecast; use 'forward', 'zero' or 'keep'"
            )
    if data.test_at == "last":
        raise ValueError(
            f'`test_at = "last"` scores the last row of a group, and nothing comes after it for task {task!r} to forecast; '
            'use "all"'
        )


def warn_of_older_names(folders: Iterable[Path]) -> None:
    """The warnings of `read_site` alone, for a process whose workers read the sites and print nothing."""
    for folder in folders:
        for model, path in ((SiteConfig, folder / "site.toml"), (PolicyConfig, folder / POLICY)):
            with suppress(ConfigError):  # reported where the site is read
                rename(model, read(path), str(path))


def read_site(folder: Path) -> SiteConfig:
    """The SiteConfig in `folder`/site.toml, with the policy of `folder`/policy.toml where there is one."""
    if not folder.is_dir():
        raise ConfigError(f"{folder}: no such folder. Give the folder that holds site.toml.")
    path, apart = folder / "site.toml", folder / POLICY
    table = read(path)
    if not apart.exists():
        return parse(SiteConfig, table, str(path))
    if "policy" in table:
        raise ConfigError(f"{path}: `policy` is here and in {apart} too. Keep one: the file replaces the table.")
    policy = parse(PolicyConfig, read(apart), str(apart))
    return parse(SiteConfig, table, str(path)).model_copy(update={"policy": policy})
