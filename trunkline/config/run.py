"""site.toml and run.toml: parsed once at the edge, frozen, and every error names file, key, value and what is allowed."""

import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, Self, TypeVar

from pydantic import BaseModel, Field, ValidationError, field_validator, model_validator

from trunkline.errors import ConfigError, nearest
from trunkline.protocol.messages import (
    DAYS,
    PLAIN,
    SITE_NAME,
    TASK_NAME,
    Frozen,
    GuardSettings,
    LocalPlan,
    Phase,
    PlantHours,
    TrunkSpec,
    WeekHours,
)

POLICY = "policy.toml"  # beside site.toml, for who owns the policy and not the data
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


Kind = Literal["regression", "binary", "multiclass", "ordinal", "multilabel", "forecast", "anomaly"]
CLASSED = ("binary", "multiclass", "ordinal")  # kinds whose label is one class of several
# keys of [tasks.NAME] that only some kinds understand
ONLY_FOR: dict[str, tuple[Kind, ...]] = {
    "cap": ("regression",),
    "quantile": ("regression",),
    "intercept": ("regression",),
    "classes": ("multiclass", "ordinal"),
    "ordinal": ("multiclass",),
    "targets": ("multilabel",),
    "highway": ("multilabel",),
    "horizons": ("forecast",),
    "season": ("forecast",),
    "quantiles": ("forecast",),
    "latent": ("anomaly",),
    "alarm_share": ("anomaly",),
    "class_weights": ("binary", "multiclass", "ordinal", "multilabel"),
    "focal": ("binary", "multiclass", "multilabel"),
    "label_smoothing": ("binary", "multiclass", "multilabel"),
}
LOSSES: dict[str, tuple[Kind, ...]] = {
    "huber": ("regression",),
    "mse": ("regression",),
    "pinball": ("regression",),
    "weighted": ("multilabel",),
    "asymmetric": ("multilabel",),
}


class TaskConfig(Frozen):
    """`[tasks.NAME]`: one thing to predict. Which keys a kind understands: docs/site-toml.md."""

    kind: Kind
    target: str = Field(default="", description="column of the label; an anomaly task may do without")
    targets: tuple[str, ...] = Field(default=(), max_length=1000, description="multilabel: a column of 0 and 1 each")
    highway: tuple[tuple[str, ...], ...] = Field(
        default=(), max_length=100, description="multilabel: lists of channels, in each the own channel of every target"
    )
    unit: str = Field(default="", max_length=32)
    cap: float | None = Field(default=None, gt=0.0, description="regression: labels above count as this much")
    loss: Literal["huber", "mse", "pinball", "weighted", "asymmetric"] | None = Field(
        default=None, description="default: regression huber, multilabel weighted"
    )
    quantile: float = Field(default=0.5, gt=0.0, lt=1.0, description="regression with loss = 'pinball'")
    intercept: bool = Field(default=True, description="regression; false: through the origin, nothing in gives 0 out")
    classes: tuple[str, ...] | None = Field(
        default=None, description="multiclass, ordinal: all class names, in order when ordinal"
    )
    ordinal: bool = False
    horizons: tuple[int, ...] = Field(default=(1,), min_length=1, max_length=1000, description="forecast: rows ahead")
    season: int = Field(
        default=1, ge=1, description="forecast: rows a season; the naive forecast is the value one season ago"
    )
    quantiles: tuple[float, ...] = Field(
        default=(0.1, 0.5, 0.9), min_length=1, description="forecast: quantiles to predict"
    )
    latent: int = Field(default=8, ge=1, le=1024, description="anomaly: numbers a window is squeezed through")
    alarm_share: float = Field(
        default=0.005,
        gt=0.0,
        lt=1.0,
        description="anomaly: share of normal validation rows that may alarm, where too few of them are flagged",
    )
    class_weights: Literal["effective", "none"] = "effective"
    focal: float = Field(default=0.0, ge=0.0, le=10.0, description="gamma of the focal loss; 0: plain cross entropy")
    label_smoothing: float = Field(default=0.0, ge=0.0, lt=1.0)
    metric: str = Field(
        default="", max_length=32, description="the metric that decides and is reported first; default: the kind's own"
    )
    weight: float = Field(default=1.0, gt=0.0, description="share of this task in the site's total loss")

    @property
    def columns(self) -> tuple[str, ...]:
        """The label columns this task reads; none for an anomaly task without labels."""
        return self.targets or ((self.target,) if self.target else ())

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        for key, kinds in ONLY_FOR.items():
            if key in self.model_fields_set and self.kind not in kinds and getattr(self, key) not in (None, False):
                raise ValueError(f"`{key}` is for kind {' or '.join(map(repr, kinds))}, not {self.kind!r}")
        if self.loss is not None and self.kind not in LOSSES[self.loss]:
            raise ValueError(f"`loss = {self.loss!r}` is for kind {LOSSES[self.loss][0]!r}, not {self.kind!r}")
        if self.kind == "multilabel":
            if not self.targets or self.target:
                raise ValueError("kind 'multilabel' needs `targets`, a list of columns, instead of `target`")
            if twice := [name for name in self.targets if self.targets.count(name) > 1]:
                raise ValueError(f"`targets` lists {twice[0]!r} twice")
            for place, own in enumerate(self.highway, start=1):
                if len(own) != len(self.targets):
                    raise ValueError(
                        f"list {place} of `highway` has {len(own)} channels and `targets` {len(self.targets)} columns; "
                        "each list has one channel a target, in the order of `targets`"
                    )
        elif not self.target and self.kind != "anomaly":
            raise ValueError(f"kind {self.kind!r} needs `target`, the column of its label")
        if any(one < 1 for one in self.horizons) or len(set(self.horizons)) < len(self.horizons):
            raise ValueError("`horizons` are different numbers of rows ahead, each at least 1")
        if any(not 0.0 < one < 1.0 for one in self.quantiles) or list(self.quantiles) != sorted(set(self.quantiles)):
            raise ValueError("`quantiles` lie between 0 and 1, ascending")
        return self


class PolicyConfig(Frozen):
    """`[policy]`, or policy.toml beside site.toml: the site's own word on what a run may take; it wins over the server."""

    decide: Literal["accept", "ask", "refuse"] = Field(
        default="accept", description="a run that keeps to the rest of the policy: yes, a person is asked, or no"
    )
    lend: tuple[str, ...] = ("trunk", "stem", "heads")  # nothing is lent unless the run names it too; "heads": any head
    metrics: bool | tuple[str, ...] = Field(
        default=True, description="numbers that travel with an update: all the run has, none, or these"
    )
    report: bool = Field(default=True, description="whether results by task go to the report of the run")
    guards: tuple[Literal["clip"], ...] = Field(default=(), description="what a run must have")
    max_clip_norm: float | None = Field(default=None, gt=0.0, description="largest bound of a clip guard")
    max_bytes_round: int | None = Field(default=None, ge=1, description="largest reply, in bytes")
    max_rounds: int | None = Field(default=None, ge=1, description="most rounds of a run, all passes together")
    strategies: tuple[str, ...] = Field(default=(), description="the only ones allowed; empty: any")
    operators: tuple[str, ...] = Field(default=(), description="whose runs alone are allowed; empty: anybody's")
    runs: tuple[str, ...] = Field(default=(), description="names of runs that need no person's yes")

    @model_validator(mode="after")
    def _bound_of_a_guard(self) -> Self:
        if self.max_clip_norm is not None and "clip" not in self.guards:
            raise ValueError("`max_clip_norm` is the bound of a guard that is not demanded: add `guards = ['clip']`")
        return self


SITE_SCHEMA = (
    1  # of site.toml: raise when a key changes its meaning; a release says what its run's sites were described by
)


class SiteConfig(Frozen):
    """site.toml, as a plant engineer writes it."""

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
    def _highways_are_channels(self) -> Self:
        for name, task in self.tasks.items():
            for channel in (one for own in task.highway for one in own):
                if channel not in self.data.channels:
                    raise ValueError(
                        f"`highway` of task {name!r} names `{channel}`, which is not a channel"
                        f"{nearest(channel, self.data.channels)} List it under `channels`, or correct `highway`"
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


class StrategyConfig(BaseModel):
    """`[strategy]`: a name of `trunkline/strategies` and the options of that one algorithm, checked by its own file."""

    model_config = {"frozen": True, "extra": "allow"}
    name: str = "fedper"

    @property
    def options(self) -> dict[str, Any]:
        return dict(self.model_extra or {})


class CohortConfig(Frozen):
    """`[cohort]`: who must be there, and for how long a round waits."""

    mode: Literal["rounds", "buffered"] = Field(
        default="rounds",
        description="buffered: no round waits for anybody; a step as soon as `buffer` updates are in, of any trunk",
    )
    buffer: int | None = Field(
        default=None, ge=1, description="updates a step; default: half of the sites that are there at the start"
    )
    staleness_power: float = Field(
        default=0.5, ge=0.0, le=10.0, description="an update s steps old counts (1 + s) to the minus this; 0: all alike"
    )
    staleness_limit: int = Field(default=50, ge=0, description="steps; an update older than this is set aside")

    min_sites: int = Field(default=2, ge=1)
    sites: tuple[str, ...] = Field(
        default=(), description="names that must all be present at the start; empty: whoever is connected"
    )
    share: float = Field(
        default=1.0, gt=0.0, le=1.0, description="share of the cohort that a round asks, drawn anew each time"
    )
    over_select: float = Field(
        default=1.0,
        ge=1.0,
        le=10.0,
        description="ask so many times the share, and end the round once the share itself is in",
    )
    quorum: float = Field(default=0.6, gt=0.0, le=1.0, description="share of the sites asked that a round needs")
    deadline_s: float = Field(default=600.0, gt=0.0, description="longest a round waits for a site")
    gather_s: float = Field(default=600.0, gt=0.0, description="longest the start waits for min_sites")
    resend_s: float = Field(
        default=60.0, gt=0.0, description="silence after which a site is asked again; doubles each time"
    )
    outage_s: float = Field(
        default=86_400.0,
        ge=0.0,
        description="longest a run that has begun waits for enough sites, or room on its disk, to come back",
    )
    weight_cap: int = Field(default=100_000, ge=1, description="training windows above which a site weighs no more")

    @model_validator(mode="after")
    def _of_the_mode(self) -> Self:
        if self.over_select > 1.0 and self.share == 1.0:
            raise ValueError("`over_select` changes nothing while `share` is 1, which asks everybody: lower `share`")
        if self.mode == "rounds":
            idle = [key for key in ("buffer", "staleness_power", "staleness_limit") if key in self.model_fields_set]
            if any(getattr(self, key) != type(self).model_fields[key].default for key in idle):
                raise ValueError(f'`{idle[0]}` changes nothing without `mode = "buffered"`: set it, or drop the key')
        elif self.share < 1.0:
            raise ValueError(
                '`share` draws the sites of a round, and in `mode = "buffered"` every site that is free is asked: drop it'
            )
        return self


class ReportConfig(Frozen):
    """`[report]`."""

    baseline: bool = Field(
        default=True, description="every site also trains the local-only twin, which doubles its work"
    )
    local: dict[str, int | float | str] = Field(
        default={}, description="the twin's own settings by key path, where they differ; `[search]` fills them in"
    )

    @field_validator("local")
    @classmethod
    def _of_the_model_or_its_training(cls, local: dict[str, int | float | str]) -> dict[str, int | float | str]:
        for key in local:
            if not key.startswith(("training.", "trunk.")):
                raise ValueError(f"{key!r}: a site that trains alone has settings under [training] and [trunk] only")
        return local


class NewcomersConfig(Frozen):
    """`[newcomers]`: simulation only; sites kept out of the federation and onboarded with its trunk at the end."""

    sites: tuple[str, ...] = ()
    labelled_groups: tuple[int, ...] = Field(
        default=(), description="also with only this many labelled groups each; empty: with all they have"
    )


class SearchConfig(Frozen):
    """`[search]`: simulation only; settings chosen on validation before the run, the same budget for the local baseline."""

    trials: int = Field(default=0, ge=0, le=10_000, description="0: no search")
    minutes: float = Field(default=10.0, gt=0.0, description="no trial starts after this long")
    rounds: int | None = Field(default=None, ge=1, description="rounds a trial; default: those of the run")
    space: dict[str, tuple[float | str, ...]] = Field(
        default={}, description='key path -> values to choose from, such as "training.learning_rate" = [1e-3, 1e-2]'
    )


Shares = tuple[tuple[float, float], ...]  # of (share of the sites, factor)


class CalendarConfig(WeekHours):
    """`[[world.calendars]]`: when a share of the sites can be reached and may train, in their own local time."""

    share: float = Field(gt=0.0, le=1.0)


class WorldConfig(Frozen):
    """`[world]`: simulation only; sites that come and go, are slow, lose replies or lie, on a clock of their own."""

    calendars: tuple[CalendarConfig, ...] = Field(default=(), description="sites without one are always there")
    zones: tuple[float, ...] = Field(default=(), description="hours ahead of the run's clock; each site draws one")
    start_hour: float = Field(default=0.0, ge=0.0, lt=168.0, description="of the week, when the run starts")
    round_hours: float = Field(
        default=0.0, ge=0.0, le=8760.0, description="from the start of one round to the next, at least"
    )
    row_seconds: float = Field(default=0.0, ge=0.0, le=3600.0, description="to train on one row once, at speed 1")
    speeds: Shares = Field(default=(), description="share of the sites and their speed; the others have 1")
    speed_spread: float = Field(default=0.0, ge=0.0, le=3.0, description="sigma of a log-normal factor on each speed")
    up_mb_s: float | None = Field(default=None, gt=0.0, description="megabytes a second; absent: no time at all")
    down_mb_s: float | None = Field(default=None, gt=0.0)
    links: Shares = Field(default=(), description="share of the sites and a factor on both their bandwidths")
    link_spread: float = Field(default=0.0, ge=0.0, le=3.0, description="sigma of a log-normal factor on both")
    drop_out: float = Field(default=0.0, ge=0.0, lt=1.0, description="chance that a site is not heard of in a round")
    reply_loss: float = Field(default=0.0, ge=0.0, lt=1.0, description="chance that a reply gets lost")
    labels_start: float = Field(
        default=1.0, gt=0.0, le=1.0, description="share of the labelled training rows that is there at the start"
    )
    labels_hours: float = Field(
        default=0.0, ge=0.0, le=87600.0, description="over which the other rows come in, evenly, in their order"
    )
    label_delay_hours: float = Field(default=0.0, ge=0.0, le=87600.0, description="from a row to its label")
    drift_week: float = Field(
        default=0.0,
        ge=0.0,
        le=10.0,
        description="by how much scaled inputs move in a week, each site's in its own direction",
    )
    drift_share: float = Field(default=1.0, gt=0.0, le=1.0, description="of the sites that drift")
    hostile_share: float = Field(default=0.0, ge=0.0, le=1.0)
    hostile_sites: tuple[str, ...] = Field(default=(), description="by name, instead of a share")
    lie: Literal["sign-flip", "scale", "random"] = Field(default="sign-flip", description="what hostile sites send")

    @model_validator(mode="after")
    def _can_be_meant(self) -> Self:
        shares = {"calendars": [(one.share, 1.0) for one in self.calendars], "speeds": self.speeds, "links": self.links}
        for key, given in shares.items():
            if any(not 0.0 < share <= 1.0 or factor <= 0.0 for share, factor in given):
                raise ValueError(f"`{key}` are pairs of a share, above 0 and at most 1, and a factor above 0")
            if (total := sum(share for share, _ in given)) > 1.0 + 1e-9:
                raise ValueError(f"the shares of `{key}` sum to {total:g}; lower them to 1 or less")
        if wide := [zone for zone in self.zones if abs(zone) > 14.0]:
            raise ValueError(f"`zones` holds {wide[0]:g}: hours ahead of the run's clock, from -14 to 14")
        if self.labels_start < 1.0 and not (self.labels_hours or self.label_delay_hours):
            raise ValueError(
                "`labels_start` leaves labels out: say by `labels_hours` or `label_delay_hours` when they come"
            )
        if self.labels_start == 1.0 and (self.labels_hours or self.label_delay_hours):
            raise ValueError(
                "`labels_hours` and `label_delay_hours` change nothing while `labels_start` is 1: lower it"
            )
        if self.drift_share < 1.0 and not self.drift_week:
            raise ValueError("`drift_share` changes nothing without `drift_week`: set it")
        if self.hostile_share and self.hostile_sites:
            raise ValueError("`hostile_share` and `hostile_sites` both say who lies; drop one of the two")
        for keys, needs in ((("speeds", "speed_spread"), ("row_seconds",)), (("zones",), ("calendars",)),
                            (("links", "link_spread"), ("up_mb_s", "down_mb_s"))):  # fmt: skip
            idle = [key for key in keys if getattr(self, key)]
            if idle and not any(getattr(self, need) for need in needs):
                raise ValueError(
                    f"`{idle[0]}` changes nothing without {' or '.join(map('`{}`'.format, needs))}: set it"
                )
        return self


class RunConfig(Frozen):
    """run.toml, as the operator of the federation writes it."""

    name: str = Field(default="run", pattern=SITE_NAME)
    rounds: int = Field(default=24, ge=1, le=100_000)
    seed: int = Field(default=0, ge=0, lt=2**63)
    lend: tuple[str, ...] = Field(default=("trunk",), description='"trunk", "stem", "heads", "head.<task>", "scaler"')
    operator: str = Field(
        default="", max_length=120, pattern=PLAIN, description="who runs it, as plants read it; empty: account@host"
    )
    refit: bool = Field(
        default=False,
        description="once every site has chosen by its validation rows, the same rounds again from the start on all labelled rows",
    )
    trunk: TrunkSpec = TrunkSpec()
    training: LocalPlan = LocalPlan()
    strategy: StrategyConfig = StrategyConfig()
    guards: GuardSettings = GuardSettings()
    cohort: CohortConfig = CohortConfig()
    report: ReportConfig = ReportConfig()
    newcomers: NewcomersConfig = NewcomersConfig()
    search: SearchConfig = SearchConfig()
    world: WorldConfig = WorldConfig()

    @property
    def total_rounds(self) -> int:
        """Rounds of all passes together."""
        return self.rounds * (2 if self.refit else 1)

    @model_validator(mode="after")
    def _one_pass_where_sites_miss_rounds(self) -> Self:
        if self.refit and self.cohort.mode == "buffered":
            raise ValueError(
                "`refit` goes over the same rounds again and keeps each site's best of them, and in [cohort] mode = 'buffered' "
                "a site is in a round by chance: drop one of the two"
            )
        return self

    @field_validator("lend")
    @classmethod
    def _whole_modules(cls, lend: tuple[str, ...]) -> tuple[str, ...]:
        for part in lend:
            if part not in ("trunk", "stem", "heads", "scaler") and not (part.startswith("head.") and len(part) > 5):
                raise ValueError(
                    f"cannot lend {part!r}: whole modules only, 'trunk', 'stem', 'heads', 'head.<task>' or 'scaler'"
                )
        return lend


Config = TypeVar("Config", SiteConfig, RunConfig, PolicyConfig)


def _parse(kind: type[Config], table: dict[str, Any], origin: str) -> Config:
    try:
        return kind.model_validate(table)
    except ValidationError as error:
        raise ConfigError("\n".join(_explain(kind, table, item, origin) for item in error.errors())) from None


def _explain(kind: type[BaseModel], table: dict[str, Any], item: Any, origin: str) -> str:
    """One pydantic complaint in words: file, key, value, what is allowed."""
    path = [str(step) for step in item["loc"]]
    key = ".".join(path)
    if item["type"] == "extra_forbidden":
        known = _keys_beside(kind, path)
        return f"{origin}: unknown key `{key}`{nearest(path[-1], known)} Allowed here: {', '.join(sorted(known))}."
    if item["type"] == "missing":
        return f"{origin}: `{key}` is missing. Add it; docs/ has a page for this file."
    text = str(item["msg"]).removeprefix("Value error, ")
    found = "" if isinstance(item["input"], dict) else f" Found {item['input']!r}."
    return f"{origin}: {f'`{key}`: ' if key else ''}{text}.{found}"


def _keys_beside(kind: type[BaseModel], path: list[str]) -> list[str]:
    """The keys allowed where `path` ends, following nested models and tables of models."""
    model: type[BaseModel] | None = kind
    for step in path[:-1]:
        if model is None:
            return []
        if step in model.model_fields:
            inner: Any = model.model_fields[step].annotation
            arguments = [inner, *getattr(inner, "__args__", ())]
            model = next((one for one in arguments if isinstance(one, type) and issubclass(one, BaseModel)), None)
    return list(model.model_fields) if model else []


def _read(path: Path) -> dict[str, Any]:
    try:
        with path.open("rb") as file:
            return tomllib.load(file)
    except FileNotFoundError:
        raise ConfigError(
            f"{path}: no such file. `trunkline sites` writes example site folders; examples/ has run files."
        ) from None
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{path}: not valid TOML: {error}.") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read: {error}.") from None


def read_site(folder: Path) -> SiteConfig:
    """The SiteConfig in `folder`/site.toml, with the policy of `folder`/policy.toml where there is one."""
    if not folder.is_dir():
        raise ConfigError(f"{folder}: no such folder. Give the folder that holds site.toml.")
    path, apart = folder / "site.toml", folder / POLICY
    table = _read(path)
    if not apart.exists():
        return _parse(SiteConfig, table, str(path))
    if "policy" in table:
        raise ConfigError(f"{path}: `policy` is here and in {apart} too. Keep one: the file replaces the table.")
    policy = _parse(PolicyConfig, _read(apart), str(apart))
    return _parse(SiteConfig, table, str(path)).model_copy(update={"policy": policy})


def read_run(path: Path, overrides: dict[str, Any] | None = None) -> RunConfig:
    """The RunConfig in `path`, with `key.path: value` overrides laid over it."""
    return parse_run(_read(path), str(path), overrides)


def parse_run(table: dict[str, Any], origin: str, overrides: dict[str, Any] | None = None) -> RunConfig:
    """A RunConfig from a parsed table; `origin` names it in errors."""
    for key, value in (overrides or {}).items():
        *steps, last = key.split(".")
        place = table
        for step in steps:
            place = place.setdefault(step, {})
            if not isinstance(place, dict):
                raise ConfigError(f"--set {key}: `{step}` is not a table in {origin}.")
        place[last] = value
    return _parse(RunConfig, table, origin)


def with_settings(run: RunConfig, settings: Mapping[str, Any], origin: str) -> RunConfig:
    """`run` with `key.path: value` laid over it; `origin` names them in errors."""
    return parse_run(run.model_dump(mode="json"), origin, dict(settings))


def parse_value(text: str) -> Any:
    """The TOML value of `text` on a command line; a bare word is a string."""
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text


__all__ = [
    "CLASSED",
    "DAYS",
    "POLICY",
    "CalendarConfig",
    "CleanConfig",
    "CohortConfig",
    "DataConfig",
    "LocalPlan",
    "NewcomersConfig",
    "Phase",
    "PlantHours",
    "PolicyConfig",
    "ReportConfig",
    "RunConfig",
    "SearchConfig",
    "SiteConfig",
    "SplitConfig",
    "StrategyConfig",
    "TaskConfig",
    "TrunkSpec",
    "WorldConfig",
    "parse_run",
    "parse_value",
    "read_run",
    "read_site",
    "with_settings",
]
