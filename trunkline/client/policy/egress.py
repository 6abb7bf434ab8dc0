"""The door of a plant: the last code before the SuperNode, which knows nothing of how a reply was made.

Every reply is opened here, held against the question, the contract on disk and the plant's policy, written to the
manifest, and only then made anew from what was checked: nothing leaves beside it, not even in the padding of a header.
What is anything else becomes an error reply that says so, and is written down too.
"""

import hashlib
import json
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np
from flwr.app import Message
from numpy.typing import NDArray
from pydantic import BaseModel, ValidationError

import trunkline
from trunkline.client.policy.consent import check_order, check_size, lets_go, objection
from trunkline.client.policy.contracts import Consent, read
from trunkline.client.policy.manifest import chain_of
from trunkline.client.state.identity import records_key
from trunkline.config.site import SiteConfig, read_site
from trunkline.errors import ContractError
from trunkline.flower.errors import AWAY, CRASHED, DECLINED, FULL, PENDING, REFUSED, RESTARTED, error_reply, safe_text
from trunkline.flower.records import open_records, to_records
from trunkline.models.tasks import Task, make_task
from trunkline.privacy.guards import at_server, guards_of, norm_of
from trunkline.protocol.arrays import SCALER_ARRAYS, Arrays
from trunkline.protocol.contract import FIT_CONTRACT, Contract
from trunkline.protocol.messages import (
    PROTOCOL,
    DecideRequest,
    FitQuery,
    Offer,
    OfferRequest,
    Reply,
    Request,
    Scorecard,
    ScoreRequest,
    TrainRequest,
    parse_request,
)
from trunkline.security.encryption import find_seal

MODELS = ("federated", "local", "shared", "ensemble", "finetuned", "fused")  # that a scorecard may compare
REPEATS = 2  # a run that went back to a checkpoint asks some rounds again; more than twice of all is something else
FIT_QUERIES = 32  # a round: trunks that a strategy may have a site try
ONCE = 8  # different offers, and different scorecards, of one run

Kind = Literal["offer", "update", "fit", "scorecard", "error"]
RENAMED = {"probe": "fit"}  # kinds in the manifest of an older Trunkline
Header = TypeVar("Header", bound=BaseModel)


@dataclass(frozen=True)
class Parcel:
    """What a reply holds, and nothing else of it.

    Args:
        run, round, operator: of the question; empty, 0 where it could not be read.
        header: JSON, exactly as it travels; empty of an error.
        error: code and text of an error.
    """

    kind: Kind
    run: str = ""
    round: int = 0
    operator: str = ""
    header: str = ""
    arrays: Arrays = field(default_factory=Arrays)
    metrics: Mapping[str, float] = field(default_factory=dict)
    error: tuple[int, str] | None = None

    @property
    def size(self) -> int:
        """Bytes of header, arrays, metrics and error text, without Flower's framing."""
        text = self.error[1] if self.error else self.header
        return len(text.encode()) + self.arrays.nbytes + 8 * len(self.metrics)

    def digest(self) -> str:
        """sha256 over error or header, metrics (JSON, sorted) and `Arrays.digest`, one a line."""
        said = json.dumps(self.error) if self.error else self.header
        numbers = json.dumps(dict(self.metrics), sort_keys=True)
        return hashlib.sha256(f"{said}\n{numbers}\n{self.arrays.digest()}".encode()).hexdigest()


class Door:
    """What leaves one site, and the manifest of it.

    Args:
        folder: with site.toml, which is read for every reply: the plant's word counts from when it is written.
        state: where contracts and manifest lie.
        centre: to whom, as it is written down.

    Raises:
        TrustError, StorageError: the state's seal or the key that signs the manifest cannot be used.
    """

    def __init__(self, folder: Path, state: Path, centre: str = "") -> None:
        self.folder = folder
        self.state = state
        self.centre = centre
        self._seal = find_seal(state)
        self._key = records_key(state, self._seal)
        self._chain = chain_of(state, self._seal)
        self._left: dict[tuple[str, str], set[str]] | None = None  # (run, kind) -> digests of what has left
        self._lock = threading.Lock()

    def pass_(self, request: Message, reply: Message) -> Message:
        """The reply to send: what `reply` says where that may leave, else an error that says why not. It is in the manifest.

        Args:
            request: the question; its envelope alone where its content could not be read.

        Raises:
            StorageError, TamperError: the manifest cannot be written or read, or is not what was written: nothing may leave.
        """
        with self._lock:
            left = self._counted()
            try:
                parcel = self._open(request, reply)
                self._check_count(parcel, left)
            except Exception as error:
                parcel = self._stopped(request, error)
            digest = parcel.digest()
            self._chain.append(self._key, self._line(parcel, digest))
            left.setdefault((parcel.run, parcel.kind), set()).add(digest)
        if parcel.error is not None:
            return error_reply(request, parcel.error[1], parcel.error[0])
        return Message(to_records(parcel.arrays, parcel.header, parcel.metrics), reply_to=request)

    def _counted(self) -> dict[tuple[str, str], set[str]]:
        """What has left, of which run and kind: from the manifest, once, checked line by line on the way."""
        if self._left is None:
            left: dict[tuple[str, str], set[str]] = {}
            for link in self._chain.read(self._key.public_key()):
                kind = RENAMED.get(link.body["kind"], link.body["kind"])
                left.setdefault((link.body["run"], kind), set()).add(link.body["sha256"])
            self._left = left
        return self._left

    def _line(self, parcel: Parcel, digest: str) -> dict[str, Any]:
        return {
            "run": parcel.run,
            "round": parcel.round,
            "kind": parcel.kind,
            "to": " at ".join(part for part in (parcel.operator, self.centre) if part),
            "header": json.loads(parcel.header) if parcel.header else {},
            "tensors": [_tensor(name, array) for name, array in parcel.arrays.items()],
            "metrics": dict(parcel.metrics),
            "bytes": parcel.size,
            "error": list(parcel.error) if parcel.error else None,
            "sha256": digest,
        }

    def _open(self, request: Message, reply: Message) -> Parcel:
        """What is in a reply.

        Raises:
            ContractError: it may not leave; the text says why, without quoting it.
        """
        if reply.has_error():
            known = reply.error.code in (CRASHED, REFUSED, RESTARTED, PENDING, DECLINED, AWAY, FULL)
            return self._error(request, reply.error.code if known else CRASHED, reply.error.reason or "")
        order = _order_of(request)
        if order is None:
            raise ContractError("the question is none of Trunkline's, so no answer to it is")
        site = read_site(self.folder)
        found = read(self.state, order.run, self._seal)
        check_order(site.name, order, found)
        assert found is not None  # check_order refuses where there is none
        if found.verdict != "accepted":
            raise ContractError(f"run {order.run!r} is not accepted at this plant but {found.verdict}")
        if why := objection(site.policy, order, found.bytes_round):
            raise ContractError(f"{site.name}: {why}")
        raw, header, metrics = open_records(reply.content)
        arrays, category = Arrays(raw), request.metadata.message_type
        if category != order.message_type:
            raise ContractError(
                f"no answer is known to a request of the kind {order.kind!r} in a message of type {category[:32]!r}"
            )
        kind: Kind
        if isinstance(order, OfferRequest):
            kind = "offer"
            _check_offer(_parse(Offer, header), arrays, metrics, order, found, site)
        elif isinstance(order, TrainRequest | FitQuery):
            kind = "fit" if isinstance(order, FitQuery) else "update"
            _check_update(_parse(Reply, header), arrays, metrics, order, found, site)
        else:
            kind = "scorecard"
            _check_scorecard(_parse(Scorecard, header), arrays, metrics, order, found, site)
        parcel = Parcel(kind, order.run, order.round, order.about.operator, header, arrays, metrics)
        if why := check_size(site.policy, parcel.size):
            raise ContractError(f"{site.name}: {why}")
        if kind == "update" and parcel.size > found.bytes_round:
            raise ContractError(f"it has {parcel.size} bytes; the contract of the run has at most {found.bytes_round}")
        return parcel

    def _error(self, request: Message, code: int, text: str) -> Parcel:
        order = _order_of(request)
        about = (order.run, order.round, order.about.operator) if order else ("", 0, "")
        return Parcel("error", *about, error=(code, safe_text(text)))

    def _stopped(self, request: Message, error: Exception) -> Parcel:
        # only a ContractError's text is known to be about the exchange: others may quote what was in the reply or the folder
        why = str(error) if isinstance(error, ContractError) else type(error).__name__
        return self._error(request, REFUSED, f"stopped at the plant's door: {why}.")

    def _check_count(self, parcel: Parcel, left: Mapping[tuple[str, str], set[str]]) -> None:
        """A question may be asked again and is answered with the same bytes; how many different answers there are is bounded."""
        if parcel.kind == "error":
            return
        found = read(self.state, parcel.run, self._seal)
        rounds = found.request.total_rounds if found else 0
        most = {"update": REPEATS * rounds, "fit": FIT_QUERIES * rounds}.get(parcel.kind, ONCE)
        before = left.get((parcel.run, parcel.kind), set())
        if len(before) >= most and parcel.digest() not in before:
            raise ContractError(
                f"{len(before)} different answers of the kind {parcel.kind} have left in run {parcel.run!r} of {rounds} rounds, and "
                f"no more than {most} may"
            )


def _tensor(name: str, array: NDArray[Any]) -> list[Any]:
    """Name, shape, dtype, bytes, L2 norm, sha256 of the bytes."""
    digest = hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest()
    return [name, list(array.shape), array.dtype.name, array.nbytes, norm_of(Arrays({name: array})), digest]


def _order_of(request: Message) -> Request | None:
    """The order of a question; None where it is none, or its content never came."""
    try:
        _, header, _ = open_records(request.content)
        order = parse_request(header)
    except (ContractError, ValidationError, ValueError):
        return None
    return order if order.protocol == PROTOCOL else None


def _parse(kind: type[Header], text: str) -> Header:
    """A header of this type, written in the one way there is: no field, space or digit more than its values need."""
    try:
        header = kind.model_validate_json(text, strict=True)
    except ValidationError as error:
        first = error.errors(include_input=False)[0]
        key = first["loc"][0] if first["loc"] and first["loc"][0] in kind.model_fields else ""
        where = f"`{key}`: {first['type']}" if key else first["type"]
        raise ContractError(f"its header is no {kind.__name__} ({where})") from None
    if header.model_dump_json() != text:
        raise ContractError(f"its header is a {kind.__name__}, but holds more than that")
    return header


def _same(what: str, found: object, expected: object) -> None:
    if found != expected:
        raise ContractError(f"its {what} is not what the contract of the run says")


def _check_offer(
    offer: Offer, arrays: Arrays, metrics: Mapping[str, float], order: OfferRequest, found: Consent, site: SiteConfig
) -> None:
    for what, one, expected in (
        ("version", offer.version, trunkline.__version__),
        *((key, getattr(offer, key), getattr(found, key)) for key in ("run", "arrays", "once", "metrics", "tasks", "inputs")),
        ("site", offer.site, site.name), ("hours", offer.hours, site.hours),
    ):  # fmt: skip
        _same(what, one, expected)
    # and, whatever the contract was made of, nothing but what the run lends and the plant's own files name
    for spec in offer.arrays:
        if not _lent(spec.name, order.lend):
            raise ContractError(f"`{spec.name}` belongs to nothing that the run lends ({', '.join(order.lend)})")
    statistics = "scaler" in order.lend and "scaler" in site.policy.lend
    labels = {f"scaler.label.{name}" for name in site.tasks}
    for spec in offer.once:
        if not statistics or spec.name not in (*SCALER_ARRAYS, *labels):
            raise ContractError(f"`{spec.name}` may not leave: only statistics that run and policy both lend")
    _cards(tuple(offer.tasks), site)
    if lets_go(site.policy, offer.metrics) != offer.metrics:
        raise ContractError("it offers metrics that the policy lets nobody have")
    if offer.inputs is not None and not (statistics or "stem" in order.lend):
        raise ContractError("it names the inputs, which only a run that lends a stem or statistics needs")
    beyond = {spec.name: spec for spec in (*offer.arrays, *offer.once) if not spec.name.startswith("trunk.")}
    Contract(arrays=tuple(beyond.values()), metrics=()).check(arrays, metrics)


def _check_update(
    reply: Reply,
    arrays: Arrays,
    metrics: Mapping[str, float],
    order: TrainRequest | FitQuery,
    found: Consent,
    site: SiteConfig,
) -> None:
    last = order.total_rounds + (1 if isinstance(order, FitQuery) else 0)
    if not 1 <= order.round <= last:
        raise ContractError(
            f"run {order.run!r} has {order.total_rounds} rounds; this is an answer to round {order.round}"
        )
    digest = found.contract.digest()
    for what, one, expected in (
        ("site", reply.site, site.name), ("run", reply.run, order.run), ("round", reply.round, order.round),
        ("contract", reply.contract, digest), ("question", order.contract, digest),
    ):  # fmt: skip
        _same(what, one, expected)
    if not (0 < reply.weight <= order.weight_cap and reply.weight == int(reply.weight)):
        raise ContractError(f"its weight is no whole number of rows from 1 to {order.weight_cap}")
    (FIT_CONTRACT if isinstance(order, FitQuery) else found.contract).check(arrays, metrics)
    if lets_go(site.policy, tuple(metrics)) != tuple(metrics):
        raise ContractError("it holds metrics that the policy lets nobody have")
    at_server(guards_of(order.about.guards), arrays)


def _check_scorecard(
    card: Scorecard,
    arrays: Arrays,
    metrics: Mapping[str, float],
    order: DecideRequest | ScoreRequest,
    found: Consent,
    site: SiteConfig,
) -> None:
    Contract(arrays=(), metrics=()).check(arrays, metrics)
    for what, one, expected in (
        ("site", card.site, site.name), ("run", card.run, order.run), ("question", order.contract, found.contract.digest())
    ):  # fmt: skip
        _same(what, one, expected)
    if card.rows and (isinstance(order, DecideRequest) or not (found.report and site.policy.report)):
        raise ContractError("it holds results, which were not agreed on")
    tasks = _cards(card.rows, site)
    if not set(tasks) <= {one.task for one in found.tasks} or len(tasks) < len(card.rows):
        raise ContractError("it holds results of tasks that were not agreed on")
    for row in card.rows:
        known = set(tasks[row.task].METRICS) | set(tasks[row.task].metrics)
        keys = {row.chosen, *row.candidates, *(who for one in row.more.values() for who in one)}
        if not set(row.more) <= known or not keys <= set(MODELS):
            raise ContractError("it holds results under names that are no metric's or model's")


def _cards(offered: tuple[Any, ...], site: SiteConfig) -> dict[str, Task]:
    """The tasks of these cards or rows, each as site.toml has it: a card's words are no place for others."""
    tasks: dict[str, Task] = {}
    for one in offered:
        if one.task not in site.tasks:
            raise ContractError("it names a task that site.toml has not")
        task = tasks[one.task] = make_task(one.task, site.tasks[one.task])
        own = task.card
        said = (one.kind, one.metric, one.unit, one.better)
        if said != (own.kind, own.metric, own.unit, own.better):
            raise ContractError(f"what it says of task `{one.task}` is not what site.toml says")
    return tasks


def _lent(name: str, lend: tuple[str, ...]) -> bool:
    """Whether the array belongs to a module that a run names."""
    part, _, rest = name.partition(".")
    if part == "head":
        return "heads" in lend or f"head.{rest.partition('.')[0]}" in lend
    return part in ("trunk", "stem") and part in lend
