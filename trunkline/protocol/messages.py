"""Everything that may cross the wire between a site and the server.

Down go a `Request` and the arrays that a site lends. Up come an `Offer` (once), an `Update` (every round), the answer to
a `FitQuery` and a `Scorecard` (at the end). Nothing else has a type here, so nothing else can be sent.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, TypeAdapter

from trunkline.protocol.arrays import Arrays, ArraySpec
from trunkline.protocol.contract import TaskCard
from trunkline.protocol.frozen import Frozen
from trunkline.protocol.opening_hours import PlantHours
from trunkline.protocol.plan import (
    SITE_NAME,
    TASK_NAME,
    About,
    Conditions,
    LocalBaseline,
    LocalPlan,
    SelectionSettings,
    TrunkSpec,
)

PROTOCOL = 4  # raise when a header below changes its meaning; both ends compare it before anything else
KINDS = Literal["offer", "train", "fit", "decide", "score"]
MOVING = {"kind", "protocol", "round", "contract", "passed", "conditions"}  # differ between two requests of one run


class RoundRequest(Frozen):
    """Down: what every request repeats, the terms of its run, and the round that it is for.

    The five kinds below add what each needs. A plant compares the terms of every request with those that it agreed to.

    Args:
        baseline: also train the local baseline that the report compares with.
        local_baseline: trunk and plan of the local baseline; None: those above.
    """

    message_type: ClassVar[str]  # of the Flower message that carries it

    kind: KINDS
    protocol: int = PROTOCOL
    run: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,127}$", description="names a folder in the vault")
    seed: int = Field(ge=0, lt=2**63)
    round: int = Field(ge=0)
    rounds: int = Field(ge=1, description="of one pass; a run that refits has two passes and counts on")
    trunk: TrunkSpec
    plan: LocalPlan
    lend: tuple[str, ...]
    weight_cap: int = Field(default=100_000, ge=1, description="training windows above which a site weighs no more")
    baseline: bool = True
    local_baseline: LocalBaseline | None = None
    about: About = About()
    selection: SelectionSettings = SelectionSettings()

    @property
    def total_rounds(self) -> int:
        """Rounds of all passes together."""
        return max(self.rounds, self.about.rounds)

    def terms(self) -> dict[str, Any]:
        """What may not change within a run: all of a request but its kind and where in the run it stands."""
        return self.model_dump(mode="json", exclude=MOVING)


class OfferRequest(RoundRequest):
    """Asks a site whether it takes part, and what it would lend. It opens the run, at round 0."""

    message_type: ClassVar[str] = "query"
    kind: Literal["offer"] = "offer"
    round: Literal[0] = 0


class AgreedRequest(RoundRequest):
    """The part that all requests after the offer share, with the lent arrays beside them.

    Args:
        contract: digest of the contract that the arrays were made for.
        passed: rounds of the passes before this one; 0 in the first pass. In the second pass of a run that refits, a site
            trains on its validation rows too.
    """

    round: int = Field(ge=1)
    contract: str = ""
    passed: int = Field(default=0, ge=0)
    conditions: Conditions = Conditions()

    @property
    def done(self) -> int:
        """Rounds of this pass that lie behind this one."""
        return self.round - 1 - self.passed


class TrainRequest(AgreedRequest):
    """Asks for the Update of round `round`."""

    message_type: ClassVar[str] = "train"
    kind: Literal["train"] = "train"


class FitQuery(AgreedRequest):
    """Asks how well the arrays fit a site as it would enter `round`: one validation loss. Nothing is trained or kept."""

    message_type: ClassVar[str] = "query"
    kind: Literal["fit"] = "fit"


class DecideRequest(AgreedRequest):
    """Ends the first pass of a run that refits: the site chooses by its validation rows, and remembers its choice."""

    message_type: ClassVar[str] = "evaluate"
    kind: Literal["decide"] = "decide"
    passed: Literal[0] = 0


class ScoreRequest(AgreedRequest):
    """Asks for a Scorecard of the final arrays, at round `total_rounds` + 1."""

    message_type: ClassVar[str] = "evaluate"
    kind: Literal["score"] = "score"


Request = Annotated[
    OfferRequest | TrainRequest | FitQuery | DecideRequest | ScoreRequest, Field(discriminator="kind")
]  # all that goes down
REQUESTS: Mapping[str, type[RoundRequest]] = {
    "offer": OfferRequest, "train": TrainRequest, "fit": FitQuery, "decide": DecideRequest, "score": ScoreRequest
}  # fmt: skip
_REQUEST: TypeAdapter[Request] = TypeAdapter(Request)


def parse_request(text: str) -> Request:
    """The request of a header, as its own kind.

    Raises:
        ValidationError: `text` is no request. `protocol.header.read_request` says which side has to be updated.
    """
    return _REQUEST.validate_json(text)


def open_stored_terms(terms: Mapping[str, Any]) -> OfferRequest:
    """The request that asked for a stored contract, of this protocol or protocol 3; `terms` is what `terms()` gave."""
    return OfferRequest.model_validate(_current(terms))


def open_stored_training(text: str) -> TrainRequest:
    """The training request that a vault holds, of this protocol or protocol 3."""
    return TrainRequest.model_validate(_current(json.loads(text)))


def _current(stored: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of protocol 3 under their names of today.

    It had one request for all kinds, with two flags. `local_baseline` was `twin`, `selection.default` was `plan.hold`,
    and the strategy `clustered` was `cohorts`.
    """
    table = {name: field for name, field in stored.items() if name not in ("protocol", "probe", "decide")}
    plan = dict(table["plan"])
    if "hold" in plan:
        table |= {"plan": plan, "selection": {"default": plan.pop("hold")}}
    if "twin" in table and (baseline := table.pop("twin")):
        settings = {name: setting for name, setting in baseline["plan"].items() if name != "hold"}
        table["local_baseline"] = {**baseline, "plan": settings}
    about = table.get("about") or {}
    if about.get("strategy") == "cohorts":
        table["about"] = {**about, "strategy": "clustered"}
    return table


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


class Reply(Frozen):
    """The header of an Update, or of the answer to a FitQuery, on the wire."""

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
    more: dict[str, dict[str, float | None]] = Field(default={})
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
