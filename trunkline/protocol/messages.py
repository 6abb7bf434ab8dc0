"""Everything that may cross the wire between a factory and the centre, and the contract that checks it.

Down go an `Order` (what to do) and the arrays a site lends; up come an `Offer` (once), an `Update` (every round) and a
`Scorecard` (at the end). Nothing else has a type here, so nothing else can be sent.
"""

import hashlib
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from functools import lru_cache
from typing import Any, Literal, Self, TypeVar, get_args
from zoneinfo import ZoneInfo, available_timezones

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

import trunkline
from trunkline.errors import ContractError, nearest

PROTOCOL = 3  # raise when a header below changes its meaning; both ends compare it before anything else

Part = Literal["stem", "trunk", "heads"]
SITE_NAME = r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,63}$"  # also a folder name, so no separators
PLAIN = r"^[^\x00-\x1f\x7f-\x9f]*$"  # free text that may be shown on a terminal as it is
TASK_NAME = r"^[A-Za-z][A-Za-z0-9_-]{0,63}$"  # part of a parameter name, so no dots
# (regimes, channels) three times; (regimes, settings), in the settings' own units; (settings,), the width of each range
SCALER_ARRAYS = ("scaler.count", "scaler.mean", "scaler.variance", "scaler.centres", "scaler.widths")
ROUND_METRICS = (
    "train_loss",
    "validation_loss",
    "local_validation_loss",
)  # what every Update may report besides the curves
FIT = "validation_loss"  # all that the answer to a probe holds


class Frozen(BaseModel):
    """A value object: immutable, and an unknown key is an error rather than a surprise."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Arrays(Mapping[str, NDArray[Any]]):
    """An ordered, read-only map of parameter name -> array; one dtype and shape a name.

    The arrays are views marked read-only: who wants to change one makes a copy, so that a trunk handed to two sites
    can never be changed by one of them.
    """

    def __init__(self, arrays: Mapping[str, NDArray[Any]] | None = None) -> None:
        self._arrays: dict[str, NDArray[Any]] = {}
        for name, array in (arrays or {}).items():
            view = np.asarray(array).view()
            view.flags.writeable = False
            self._arrays[name] = view

    def __getitem__(self, name: str) -> NDArray[Any]:
        return self._arrays[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._arrays)

    def __len__(self) -> int:
        return len(self._arrays)

    def __repr__(self) -> str:
        return f"Arrays({len(self)} names, {self.nbytes} bytes)"

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays together, without names or framing."""
        return sum(array.nbytes for array in self._arrays.values())

    def only(self, names: Mapping[str, object] | set[str] | tuple[str, ...]) -> "Arrays":
        """The arrays of `names`, in the order they have here."""
        return Arrays({name: array for name, array in self.items() if name in names})

    def digest(self) -> str:
        """sha256 over names, dtypes, shapes and bytes in order: equal digests are byte-equal trunks."""
        total = hashlib.sha256()
        for name, array in self.items():
            total.update(f"{name}|{array.dtype.str}|{array.shape}|".encode())
            total.update(np.ascontiguousarray(array).tobytes())
        return total.hexdigest()


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

    parts: tuple[Part, ...]
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
        "best"  # of a site's models over the rounds, by validation loss; alike for both twins
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
    finish_parts: tuple[Part, ...] = ("heads",)
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
    hold: Literal["federated", "ensemble", "local"] = Field(
        default="federated", description="the model the gate keeps until another is better beyond noise"
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


class Twin(Frozen):
    """The local baseline's own settings, where a search chose them for it as it chose the federation's."""

    trunk: TrunkSpec
    plan: LocalPlan


class Conditions(Frozen):
    """What a simulated world makes of a site's rows by now; a centre that is deployed sends none."""

    labelled: float = Field(
        default=1.0, gt=0.0, le=1.0, description="share of the labelled training rows whose labels are there: the first"
    )
    drift: float = Field(default=0.0, ge=0.0, description="how far the scaled inputs have moved, root mean square")


class GuardSettings(Frozen):
    """`[guards]` of run.toml: what is done to every update before it leaves a site; `trunkline/privacy/guards.py` does it."""

    clip_norm: float | None = Field(
        default=None, gt=0.0, le=1e6, description="largest L2 norm of what a site sends in a round; absent: no limit"
    )


class About(Frozen):
    """What a run is and whose, as its operator says it: part of every order, so that a plant can hold the run to it."""

    operator: str = Field(default="", max_length=120, pattern=PLAIN)
    name: str = Field(default="", max_length=64, pattern=PLAIN)
    strategy: str = Field(default="", max_length=64, pattern=PLAIN)
    rounds: int = Field(default=0, ge=0, description="of all passes together; 0: as many as the order's own")
    guards: GuardSettings = GuardSettings()


class Order(Frozen):
    """Down, with the lent arrays: round `round` of `rounds`. `round` 0 asks for an Offer, `rounds` + 1 for a Scorecard.

    A `probe` asks how well the arrays fit a site as it would enter `round`: nothing is trained, nothing is kept, and the
    answer is one number.

    A run that refits goes over its rounds twice. After the first pass every site is told to `decide` by its validation
    rows and to remember it; in the second pass, which starts anew, it trains on those rows too. Rounds are counted on.
    """

    protocol: int = PROTOCOL
    run: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,127}$", description="names a folder in the vault")
    seed: int = Field(ge=0, lt=2**63)
    round: int = Field(ge=0)
    rounds: int = Field(ge=1)
    trunk: TrunkSpec
    plan: LocalPlan
    lend: tuple[str, ...]
    weight_cap: int = Field(default=100_000, ge=1, description="training windows above which a site weighs no more")
    baseline: bool = True  # also train the local-only twin the report compares with
    twin: Twin | None = None  # None: the twin takes the trunk and plan above
    contract: str = ""  # digest of the contract the arrays below were made for
    probe: bool = False
    decide: bool = False
    passed: int = Field(default=0, ge=0, description="rounds that lie before this pass; 0: it is the first")
    conditions: Conditions = Conditions()
    about: About = About()

    @property
    def done(self) -> int:
        """Rounds of this pass that lie behind this one."""
        return self.round - 1 - self.passed

    @property
    def total_rounds(self) -> int:
        """Rounds of all passes together."""
        return max(self.rounds, self.about.rounds)

    def terms(self) -> dict[str, Any]:
        """What may not change within a run: all of an order but where in the run it stands."""
        return self.model_dump(mode="json", exclude=MOVING)


# what differs from order to order of one run
MOVING = {"round", "probe", "decide", "passed", "conditions", "contract"}


def terms_digest(terms: Mapping[str, Any]) -> str:
    """sha256 of what `Order.terms` gave."""
    return hashlib.sha256(json.dumps(terms, sort_keys=True).encode()).hexdigest()


def changed_terms(agreed: Mapping[str, Any], now: Mapping[str, Any], path: str = "") -> list[str]:
    """Each key path at which two terms differ, in words: `plan.steps` was 20, is 40."""
    found: list[str] = []
    for key in dict.fromkeys((*agreed, *now)):
        was, is_ = agreed.get(key), now.get(key)
        if isinstance(was, Mapping) and isinstance(is_, Mapping):
            found += changed_terms(was, is_, f"{path}{key}.")
        elif was != is_:
            found.append(f"`{path}{key}` was {json.dumps(was)[:80]}, is {json.dumps(is_)[:80]}")
    return found


Day = Literal["mon", "tue", "wed", "thu", "fri", "sat", "sun"]
DAYS: tuple[Day, ...] = get_args(Day)
LONGEST_CLOSURE = timedelta(days=366)
CLOSURE = "%Y-%m-%d %H:%M"  # how the two ends of a closure are written


class WeekHours(Frozen):
    """Hours that are the same every week, by the clock on the wall."""

    hours: tuple[tuple[float, float], ...] = Field(
        default=((0.0, 24.0),),
        min_length=1,
        max_length=48,
        description="from and to; [22, 6] ends in the morning after",
    )
    days: tuple[Day, ...] = Field(default=DAYS, min_length=1, max_length=7, description="on which `hours` begin")

    @model_validator(mode="after")
    def _hours_of_a_day(self) -> Self:
        for begin, end in self.hours:
            if not (0.0 <= begin < 24.0 and 0.0 <= end <= 24.0) or begin == end:
                raise ValueError(
                    f"`hours` holds [{begin:g}, {end:g}]: two different hours of a day from 0 to 24; all day is [0, 24]"
                )
        return self


class PlantHours(WeekHours):
    """`[hours]` of site.toml: when a plant may train and be asked to. Part of its Offer, so that no round waits for it
    at other times; `trunkline/protocol/opening_hours.py` reckons with it."""

    zone: str = Field(max_length=64, description="time zone of the plant's clock, by its IANA name")
    closed: tuple[str, ...] = Field(
        default=(), max_length=100, description='besides: "2026-12-24 06:00 to 2026-12-27 06:00", by the same clock'
    )

    @field_validator("zone")
    @classmethod
    def _known(cls, zone: str) -> str:
        zone_of(zone)
        return zone

    @field_validator("closed")
    @classmethod
    def _from_to(cls, closed: tuple[str, ...]) -> tuple[str, ...]:
        for one in closed:
            closure_of(one)
        return closed


@lru_cache(maxsize=64)
def zone_of(name: str) -> ZoneInfo:
    """The time zone of an IANA name.

    Raises:
        ValueError: there is none of this name; the text says so, and what to write.
    """
    try:
        return ZoneInfo(name)
    except (KeyError, ValueError, OSError):
        close = nearest(name, available_timezones())
        raise ValueError(
            f"no time zone is called {name!r}{close} Write its IANA name, such as 'Europe/Berlin' or 'UTC'"
        ) from None


def closure_of(text: str) -> tuple[datetime, datetime]:
    """Begin and end of one entry of `closed`, by the clock on the plant's wall, without a zone.

    Raises:
        ValueError: it is anything else; the text says what, and how to write it.
    """
    begin, to, end = text.partition(" to ")
    try:
        span = datetime.strptime(begin, CLOSURE), datetime.strptime(end, CLOSURE)
    except ValueError:
        span = None
    # what strptime takes and strftime would not write (one digit for two, say) is not taken: one span, one way to say it
    if span is None or not to or text != f"{span[0]:{CLOSURE}} to {span[1]:{CLOSURE}}":
        raise ValueError(f"{text[:64]!r} is no closure; write it as '2026-12-24 06:00 to 2026-12-27 06:00'")
    if not span[0] < span[1] <= span[0] + LONGEST_CLOSURE:
        raise ValueError(
            f"{text!r} ends before it begins, or lasts more than {LONGEST_CLOSURE.days} days; correct one of the two"
        )
    return span


class ArraySpec(Frozen):
    """Name, shape and dtype of one array that may travel."""

    name: str = Field(max_length=256)
    shape: tuple[int, ...]
    dtype: Literal["float32", "float64", "float16"] = "float32"

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * np.dtype(self.dtype).itemsize


class TaskCard(Frozen):
    """What a site says of one of its tasks: never a label, only its kind and how it is measured."""

    task: str = Field(pattern=TASK_NAME)
    kind: str = Field(max_length=32)
    metric: str = Field(max_length=32, description="the primary metric")
    unit: str = Field(max_length=32)
    better: Literal["lower", "higher"]


class Inputs(Frozen):
    """How a site calls what its stem reads: said only where a run lends a stem or statistics, useless without names.

    Args:
        channels: in the order of the stem's inputs.
        settings: the `regime` columns of site.toml, in the order of `scaler.centres`.
        window: rows a window; None: single rows.
    """

    channels: tuple[str, ...] = Field(max_length=1001)
    settings: tuple[str, ...] = Field(max_length=64)
    window: int | None


class Offer(Frozen):
    """Up, once: who the site is and what it would lend in this run.

    `arrays` and `metrics` travel every round. `once` came with this offer and never travel again: the scaler's statistics
    (`SCALER_ARRAYS` and `scaler.label.<task>`), float64.
    """

    protocol: int = PROTOCOL
    site: str = Field(pattern=SITE_NAME)
    run: str
    version: str = Field(max_length=32)
    arrays: tuple[ArraySpec, ...]
    tasks: tuple[TaskCard, ...]
    metrics: tuple[str, ...] = Field(
        default=(), description="numbers it sends each round: of `metric_names`, those its policy lets go"
    )
    once: tuple[ArraySpec, ...] = ()
    inputs: Inputs | None = None
    # left out where a site has none: an older server knows no such key
    hours: PlantHours | None = Field(default=None, exclude_if=lambda hours: hours is None)


class Contract(Frozen):
    """The allow-list of one site in one run, checked before it sends and before the server admits."""

    arrays: tuple[ArraySpec, ...]
    metrics: tuple[str, ...]

    def digest(self) -> str:
        return hashlib.sha256(self.model_dump_json().encode()).hexdigest()

    def check(self, arrays: Arrays, metrics: Mapping[str, float]) -> None:
        """Raise ContractError naming the first array or metric this contract does not allow."""
        allowed = {spec.name: spec for spec in self.arrays}
        if extra := [name for name in arrays if name not in allowed]:
            raise ContractError(
                f"`{extra[0]}` is not in this run's contract ({len(extra)} such arrays); only what the run lends may travel"
            )
        if missing := [name for name in allowed if name not in arrays]:
            raise ContractError(
                f"`{missing[0]}` is missing ({len(missing)} such arrays); a reply carries every lent array"
            )
        for name, array in arrays.items():
            spec = allowed[name]
            if array.shape != spec.shape:
                raise ContractError(f"`{name}` has shape {array.shape}; this run's trunk has {spec.shape}")
            if array.dtype.name != spec.dtype:
                raise ContractError(f"`{name}` has dtype {array.dtype.name}; this run's trunk has {spec.dtype}")
        if extra := [name for name in metrics if name not in self.metrics]:
            raise ContractError(
                f"metric `{extra[0]}` is not in this run's contract; allowed: {', '.join(self.metrics) or 'none'}"
            )


PROBED = Contract(arrays=(), metrics=(FIT,))  # of every answer to a probe, whatever the site's contract lets it lend


def specs_of(arrays: Arrays) -> tuple[ArraySpec, ...]:
    """The contract lines of `arrays`, in order."""
    return tuple(ArraySpec(name=name, shape=array.shape, dtype=array.dtype.name) for name, array in arrays.items())  # type: ignore[arg-type]


def conflict_name(one: str, other: str) -> str:
    """The round metric that holds the cosine of two tasks' gradients at the trunk's output."""
    first, second = sorted((one, other))
    return f"conflict.{first}.{second}"


def metric_names(tasks: tuple[TaskCard, ...]) -> tuple[str, ...]:
    """The numbers a site with these tasks may report each round: losses, two validation curves a task, one cosine a pair."""
    curves = [f"{card.task}.{who}" for card in tasks for who in ("federated", "local")]
    names = sorted(card.task for card in tasks)
    cosines = [conflict_name(one, other) for place, one in enumerate(names) for other in names[place + 1 :]]
    return (*ROUND_METRICS, *curves, *cosines)


class Reply(Frozen):
    """The header of an Update, or of the answer to a probe, on the wire."""

    protocol: int = PROTOCOL
    site: str = Field(pattern=SITE_NAME)
    run: str
    round: int
    contract: str
    weight: float


@dataclass(frozen=True)
class Update:
    """Up, every round: what a site's training changed in the lent arrays.

    Args:
        delta: after minus before, per lent array.
        weight: how much it counts in a mean (training windows, capped).
        metrics: a fixed list of numbers, see `metric_names`; weighted like the delta when combined.
        weights: per-array weight, filled in by a combination over sites of which not all have every array.
    """

    site: str
    run: str
    round: int
    delta: Arrays
    weight: float
    metrics: Mapping[str, float] = field(default_factory=dict)
    weights: Mapping[str, float] = field(default_factory=dict)


class TaskRow(Frozen):
    """One site and task of the worth-it report."""

    task: str = Field(pattern=TASK_NAME)
    kind: str = Field(max_length=32)
    metric: str = Field(max_length=32)
    unit: str = Field(max_length=32)
    better: Literal["lower", "higher"]
    n_train: int = Field(ge=0)
    n_validation: int = Field(ge=0)
    n_test: int = Field(ge=0)
    n_groups: int = Field(ge=0, description="test groups behind the interval")
    local: float | None  # None: no baseline was asked for, or no test rows carry this label
    federated: float | None
    chosen: str = Field(max_length=32, description="a key of `candidates`, decided on validation data only")
    interval: tuple[float, float] | None
    more: dict[str, dict[str, float | None]] = {}
    candidates: dict[str, float | None] = Field(
        default={}, description="every model the gate looked at, on the test rows"
    )
    gated: float | None = Field(default=None, description="the chosen candidate on the test rows")
    gated_interval: tuple[float, float] | None = Field(default=None, description="of gated minus local, as `interval`")


class Scorecard(Frozen):
    """Up, at the end: aggregates over the site's own test rows, never a row."""

    protocol: int = PROTOCOL
    site: str = Field(pattern=SITE_NAME)
    run: str
    rows: tuple[TaskRow, ...]


Header = TypeVar("Header", bound=BaseModel)
Side = Literal["server", "site"]
UPDATE = "Update Trunkline at the {}"


def read_header(kind: type[Header], text: str, side: Side) -> Header:
    """A header from the wire.

    Two Trunklines that do not understand each other are told apart by who is older: the one that speaks the lower protocol,
    does not know a key, or left one out. That one has to be updated.

    Args:
        side: who reads it. The other side's version is told where its header has one (`Offer.version`); what it was when the
            run began is not taken for it, because it may have been updated since.

    Raises:
        ContractError: it cannot be understood; the text says which side has to be updated, or what else is wrong.
    """
    other: Side = "site" if side == "server" else "server"
    try:
        told = json.loads(text)
        protocol = told.get("protocol", PROTOCOL)
        said = told.get("version", "")
    except (ValueError, AttributeError, RecursionError):
        raise ContractError(f"its header is no JSON object, so the {other} is no Trunkline of ours") from None
    version = _shown(said) if isinstance(said, str) else ""

    def update(older: Side, why: str) -> ContractError:
        there, here = (
            f"the {other}'s Trunkline{' ' + version if version else ''}",
            f"the {side}'s Trunkline {trunkline.__version__}",
        )
        names = f"{here if older == side else there} is older than {there if older == side else here}"
        to = trunkline.__version__ if older == other else version
        return ContractError(f"{why}: {names}. {UPDATE.format(older)}{f' to {to}' if to else ''}")

    if type(protocol) is int and protocol != PROTOCOL:
        why = f"it speaks protocol {protocol}, and here {PROTOCOL} is spoken"
        raise update(side if protocol > PROTOCOL else other, why)
    try:
        return kind.model_validate_json(text)
    except ValidationError as error:
        problems = error.errors(include_input=False)
        first = next((one for one in problems if one["type"] not in ("extra_forbidden", "missing")), problems[0])
        key = _shown(".".join(map(str, first["loc"]))) or "header"
        if first["type"] == "extra_forbidden":
            raise update(side, f"its header has a key `{key}` that is not known here") from None
        if first["type"] == "missing":
            raise update(other, f"its header has no key `{key}`") from None
        raise ContractError(
            f"`{key}`: {first['msg']}. Both sides speak protocol {PROTOCOL}, so one of the two is no Trunkline of ours: install it again"
        ) from None


def _shown(text: str) -> str:
    """Words of the other side as they may stand in a log."""
    return "".join(sign if sign.isprintable() else "?" for sign in text[:64])


def seed_of(*parts: object) -> int:
    """A 63-bit seed from anything printable, the same on every machine: `seed_of(run_seed, site, round)`."""
    return int.from_bytes(hashlib.sha256("/".join(str(part) for part in parts).encode()).digest()[:8], "big") >> 1
