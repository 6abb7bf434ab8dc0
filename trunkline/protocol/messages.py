"""Everything that may cross the wire between a site and the server.

Down go a request (what to do) and the arrays a site lends. Up come an `Offer` (once), an `Update` (every round) and a
`Scorecard` (at the end). Nothing else has a type here, so nothing else can be sent.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from pydantic import Field

from trunkline.protocol.arrays import Arrays, ArraySpec
from trunkline.protocol.contract import MOVING, TaskCard
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


class RoundRequest(Frozen):
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
    twin: LocalBaseline | None = None  # None: the twin takes the trunk and plan above
    contract: str = ""  # digest of the contract the arrays below were made for
    probe: bool = False
    decide: bool = False
    passed: int = Field(default=0, ge=0, description="rounds that lie before this pass; 0: it is the first")
    conditions: Conditions = Conditions()
    about: About = About()
    selection: SelectionSettings = SelectionSettings()

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


def open_stored_request(stored: Mapping[str, Any]) -> RoundRequest:
    """A request out of a vault or contract, in this protocol.

    In protocol 3 `selection.default` was `plan.hold`, and the strategy `clustered` was `cohorts`.
    """
    table = {**stored, "protocol": PROTOCOL}
    plan = dict(table["plan"])
    if "hold" in plan:
        table |= {"plan": plan, "selection": {"default": plan.pop("hold")}}
    if table.get("twin"):
        twin_plan = {key: value for key, value in table["twin"]["plan"].items() if key != "hold"}
        table["twin"] = {**table["twin"], "plan": twin_plan}
    about = table.get("about") or {}
    if about.get("strategy") == "cohorts":
        table["about"] = {**about, "strategy": "clustered"}
    return RoundRequest.model_validate(table)


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
