"""What a run asks of a site's model and training: the trunk's shape and the local plan."""

from typing import Literal, Self

from pydantic import Field, field_validator, model_validator

from trunkline.protocol.frozen import Frozen

ModelPart = Literal["stem", "trunk", "heads"]
SITE_NAME = r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,63}$"  # also a folder name, so no separators
PLAIN = r"^[^\x00-\x1f\x7f-\x9f]*$"  # free text that may be shown on a terminal as it is
TASK_NAME = r"^[A-Za-z][A-Za-z0-9_-]{0,63}$"  # part of a parameter name, so no dots


class TrunkSpec(Frozen):
    """The shared body, `[trunk]` in run.toml: every site builds exactly this from its installed code."""

    backbone: str = "tcn"
    size: Literal["small", "base"] = "small"
    width: int | None = Field(
        default=None, ge=1, le=1024, description="channels the trunk reads; default: the size's own"
    )
    columns: int | None = Field(
        default=None, ge=1, le=100_000, description="linear only: columns it reads as they are, the same at every site"
    )
    norm: Literal["group", "private", "private-group"] = Field(
        default="group",
        description="group: GroupNorm, lent; private: BatchNorm that stays home; private-group: GroupNorm that stays home",
    )
    dropout: float = Field(default=0.1, ge=0.0, lt=1.0)

    @model_validator(mode="after")
    def _columns_are_for_linear(self) -> Self:
        if (self.backbone == "linear") != (self.columns is not None):
            raise ValueError(
                "backbone 'linear' reads a table as it is: it needs `columns`, and no other backbone takes it"
            )
        if self.width is not None and self.width < 4 and self.backbone != "linear":
            raise ValueError(f"`width` of backbone {self.backbone!r} is at least 4")
        return self


class Phase(Frozen):
    """One stretch of a site's local training: which parts move, for which share of the round's steps."""

    parts: tuple[ModelPart, ...]
    share: float = Field(default=1.0, gt=0.0, le=1.0)


class Augment(Frozen):
    """`[training.augment]`: how training samples are varied; everything is off by default and belongs to validation."""

    jitter: float = Field(default=0.0, ge=0.0, le=10.0, description="noise added, in training standard deviations")
    scaling: float = Field(
        default=0.0, ge=0.0, le=1.0, description="standard deviation of a factor a channel, around 1"
    )
    time_mask: float = Field(
        default=0.0, ge=0.0, lt=1.0, description="share of a window's rows set silent, in one stretch"
    )
    channel_drop: float = Field(default=0.0, ge=0.0, lt=1.0, description="chance that a channel of a sample is silent")
    mixup: float = Field(default=0.0, ge=0.0, le=10.0, description="alpha of the Beta that mixes two samples; 0: off")


class LocalPlan(Frozen):
    """What a site is asked to do between two exchanges."""

    phases: tuple[Phase, ...] = (Phase(parts=("stem", "trunk", "heads")),)
    steps: int = Field(default=20, ge=1, le=1_000_000, description="optimiser steps a round")
    epochs: float | None = Field(
        default=None, gt=0.0, le=1000.0, description="passes over the training rows a round, instead of steps"
    )
    batch_size: int = Field(default=128, ge=1, le=65536)
    learning_rate: float = Field(default=5e-3, gt=0.0, le=1.0)
    private_rate: float = Field(
        default=1.0, ge=0.0, le=10.0, description="learning rate of stem and heads, as a multiple of the trunk's"
    )
    optimizer: Literal["adamw", "lbfgs"] = Field(
        default="adamw",
        description="lbfgs: all rows at once, `steps` iterations; for some hundred rows, without rates and batches",
    )
    weight_decay: float = Field(default=1e-2, ge=0.0, le=10.0)
    clip_norm: float = Field(default=1.0, gt=0.0, description="largest gradient norm of a step")
    schedule: Literal["cosine", "constant"] = "cosine"
    proximal: float = Field(default=0.0, ge=0.0, description="pull of the lent parts towards what arrived (FedProx mu)")
    keep: Literal["best", "last"] = (
        "best"  # of a site's models over the rounds, by validation loss; alike for the federated model and the local baseline
    )
    patience_rounds: int = Field(
        default=0,
        ge=0,
        description="a model that trains alone stops after this many rounds without a better loss; 0: never",
    )
    balance: Literal["fixed", "uncertainty", "famo", "upgrad"] = Field(
        default="fixed", description="how the losses of several tasks become one step; fixed: the weights of site.toml"
    )
    sampling: Literal["uniform", "balanced"] = Field(
        default="uniform", description="balanced: rows of rare classes are drawn more often"
    )
    augment: Augment = Augment()
    personal: float = Field(
        default=0.0,
        ge=0.0,
        description="pull of a personal trunk, trained beside, to the shared one (Ditto lambda); 0: none",
    )
    finish_steps: int = Field(
        default=0, ge=0, le=1_000_000, description="steps a site takes alone with `finish_parts` before it is scored"
    )
    finish_parts: tuple[ModelPart, ...] = ("heads",)
    finish_rate: float = Field(
        default=1.0, gt=0.0, le=1.0, description="their learning rate, as a multiple of learning_rate"
    )
    finetune_steps: int = Field(
        default=0,
        ge=0,
        le=1_000_000,
        description="steps of local fine-tuning behind the gate's further candidates; 0: none",
    )
    finetune_rate: float = Field(
        default=0.1, gt=0.0, le=1.0, description="its learning rate, as a multiple of learning_rate"
    )

    @model_validator(mode="after")
    def _whole_batches_are_plain(self) -> Self:
        if self.optimizer == "lbfgs":
            for key, plain in (("balance", "fixed"), ("sampling", "uniform"), ("augment", Augment())):
                if getattr(self, key) != plain:
                    raise ValueError(
                        f"`optimizer = 'lbfgs'` takes all rows as they are: leave `{key}` out, or use 'adamw'"
                    )
        return self


class SelectionSettings(Frozen):
    """`[selection]` of run.toml: how each site chooses among its models."""

    default: Literal["federated", "ensemble", "local"] = Field(
        default="federated", description="the model that the gate uses until another is better beyond noise"
    )


class LocalBaseline(Frozen):
    """The local baseline's own settings, where a search chose them for it as it chose the federation's."""

    trunk: TrunkSpec
    plan: LocalPlan


class Conditions(Frozen):
    """What a simulated world makes of a site's rows by now; a server that is deployed sends none."""

    labelled: float = Field(
        default=1.0, gt=0.0, le=1.0, description="share of the labelled training rows whose labels are there: the first"
    )
    drift: float = Field(default=0.0, ge=0.0, description="how far the scaled inputs have moved, root mean square")


GuardSetting = bool | int | float | str


class About(Frozen):
    """What a run is and whose, as its operator says it: part of every order, so that a plant can hold the run to it."""

    operator: str = Field(default="", max_length=120, pattern=PLAIN)
    name: str = Field(default="", max_length=64, pattern=PLAIN)
    strategy: str = Field(default="", max_length=64, pattern=PLAIN)
    rounds: int = Field(default=0, ge=0, description="of all passes together; 0: as many as the order's own")
    guards: dict[str, GuardSetting] = Field(
        default={}, max_length=32, description="settings of the run's guards that are set; see `trunkline/privacy`"
    )

    @field_validator("guards", mode="before")
    @classmethod
    def _set_ones(cls, guards: object) -> object:
        """Protocol 3 sent null for a guard that is not set."""
        return (
            {key: value for key, value in guards.items() if value is not None} if isinstance(guards, dict) else guards
        )
