"""run.toml: what the operator decides about a run."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

from pydantic import BaseModel, Field, field_validator, model_validator

from trunkline.config.parsing import parse, read
from trunkline.config.renames import RenamedKey, RenamedWord, Renaming, rename, rename_overrides
from trunkline.config.world import WorldConfig
from trunkline.errors import ConfigError
from trunkline.privacy.settings import GuardSettings
from trunkline.protocol.frozen import Frozen
from trunkline.protocol.plan import PLAIN, SITE_NAME, LocalPlan, SelectionSettings, TrunkSpec


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
        default=True, description="every site also trains the local baseline, which doubles its work"
    )
    local: dict[str, int | float | str] = Field(
        default={},
        description="the local baseline's own settings by key path, where they differ; `[search]` fills them in",
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


class RunConfig(Frozen):
    """run.toml, as the operator of the federation writes it."""

    RENAMED: ClassVar[tuple[Renaming, ...]] = (
        RenamedWord("strategy.name", "cohorts", "clustered"),
        RenamedKey("training.hold", "selection.default"),
        RenamedKey("world.hostile_share", "world.byzantine_share"),
        RenamedKey("world.hostile_sites", "world.byzantine_sites"),
        RenamedKey("world.lie", "world.attack"),
    )

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
    selection: SelectionSettings = SelectionSettings()
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


def read_run(path: Path, overrides: dict[str, Any] | None = None) -> RunConfig:
    """The RunConfig in `path`, with `key.path: value` overrides laid over it."""
    return parse_run(read(path), str(path), overrides)


def parse_run(table: dict[str, Any], origin: str, overrides: dict[str, Any] | None = None) -> RunConfig:
    """A RunConfig from a parsed table; `origin` names it in errors."""
    table = rename(RunConfig, table, origin)
    for key, value in rename_overrides(RunConfig, overrides or {}, origin).items():
        *steps, last = key.split(".")
        parent = table
        for step in steps:
            parent = parent.setdefault(step, {})
            if not isinstance(parent, dict):
                raise ConfigError(f"--set {key}: `{step}` is not a table in {origin}.")
        parent[last] = value
    return parse(RunConfig, table, origin)


def with_settings(run: RunConfig, settings: Mapping[str, Any], origin: str) -> RunConfig:
    """`run` with `key.path: value` laid over it; `origin` names them in errors."""
    return parse_run(run.model_dump(mode="json"), origin, dict(settings))
