"""`[[tasks]]` of site.toml: one task of a site."""

from typing import ClassVar, Literal, Self

from pydantic import Field, model_validator

from trunkline.config.renames import RenamedKey, Renaming
from trunkline.protocol.frozen import Frozen

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
    "skip_channels": ("multilabel",),
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

    RENAMED: ClassVar[tuple[Renaming, ...]] = (RenamedKey("highway", "skip_channels"),)

    kind: Kind
    target: str = Field(default="", description="column of the label; an anomaly task may do without")
    targets: tuple[str, ...] = Field(default=(), max_length=1000, description="multilabel: a column of 0 and 1 each")
    skip_channels: tuple[tuple[str, ...], ...] = Field(
        default=(), max_length=100, description="multilabel: lists of channels, each with one channel for every target"
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
            for row, channels in enumerate(self.skip_channels, start=1):
                if len(channels) != len(self.targets):
                    raise ValueError(
                        f"list {row} of `skip_channels` has {len(channels)} channels and `targets` {len(self.targets)} columns; "
                        "each list has one channel a target, in the order of `targets`"
                    )
        elif not self.target and self.kind != "anomaly":
            raise ValueError(f"kind {self.kind!r} needs `target`, the column of its label")
        if any(horizon < 1 for horizon in self.horizons) or len(set(self.horizons)) < len(self.horizons):
            raise ValueError("`horizons` are different numbers of rows ahead, each at least 1")
        if any(not 0.0 < quantile < 1.0 for quantile in self.quantiles) or list(self.quantiles) != sorted(
            set(self.quantiles)
        ):
            raise ValueError("`quantiles` lie between 0 and 1, ascending")
        return self
