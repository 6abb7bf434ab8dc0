"""The egress filter of a plant: the last code before the SuperNode, which trusts no code that made a reply.

It opens every reply, compares it with the request, the contract on disk and the plant's policy, and records it in the
manifest. Then it builds the reply anew from what was checked: nothing else leaves, not even in the padding of a header.
Any other reply becomes an error reply with the cause, and is recorded too.
"""

import hashlib
import json
import threading
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np
from flwr.app import Message
from numpy.typing import NDArray
from pydantic import BaseModel, ValidationError

import trunkline
from trunkline.client.policy.consent import check_size, check_terms, lets_go, objection
from trunkline.client.policy.contracts import Consent, read
from trunkline.client.policy.manifest import chain_of
from trunkline.client.state.identity import records_key
from trunkline.config.site import SiteConfig, read_site
from trunkline.config.tasks import TaskConfig
from trunkline.errors import ContractError
from trunkline.flower.errors import AWAY, CRASHED, DECLINED, FULL, PENDING, REFUSED, RESTARTED, error_reply, safe_text
from trunkline.flower.records import open_records, to_records
from trunkline.privacy.clip import norm_of
from trunkline.privacy.guards import at_server, guards_of
from trunkline.protocol.arrays import SCALER_ARRAYS, Arrays
from trunkline.protocol.contract import FIT_CONTRACT, Contract, TaskCard, TaskDescription
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
    TaskRow,
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
Describe = Callable[[Mapping[str, TaskConfig]], Mapping[str, TaskDescription]]  # `models.tasks.describe_tasks`


@dataclass(frozen=True)
class Outgoing:
    """The content of a reply that may leave, and nothing else of it.

    Args:
        run, round, operator: of the request; empty, 0 where it could not be read.
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
        text = json.dumps(self.error) if self.error else self.header
        numbers = json.dumps(dict(self.metrics), sort_keys=True)
        return hashlib.sha256(f"{text}\n{numbers}\n{self.arrays.digest()}".encode()).hexdigest()


class EgressFilter:
    """Checks and records what leaves one site.

    Args:
        folder: with site.toml, which is read for every reply: a change of the policy holds from the next reply on.
        state: where contracts and manifest lie.
        server: the receiver, as the manifest names it.
        describe: what a scorecard and an offer may say of the tasks in site.toml. It is handed in, because task kinds need
            torch and this module does not.

    Raises:
        TrustError, StorageError: the state's seal or the key that signs the manifest cannot be used.
    """

    def __init__(self, folder: Path, state: Path, server: str, describe: Describe) -> None:
        self.folder = folder
        self.state = state
        self.server = server
        self.describe = describe
        self._seal = find_seal(state)
        self._key = records_key(state, self._seal)
        self._chain = chain_of(state, self._seal)
        self._left: dict[tuple[str, str], set[str]] | None = None  # (run, kind) -> digests of what has left
        self._lock = threading.Lock()

    def check(self, request: Message, reply: Message) -> Message:
        """The reply to send, which is in the manifest: `reply` where it may leave, else an error with the cause.

        Args:
            request: what was asked; its envelope alone where its content could not be read.

        Raises:
            StorageError, TamperError: the manifest cannot be written or read, or is not what was written: nothing may leave.
        """
        with self._lock:
            left = self._counted()
            try:
                outgoing = self._open(request, reply)
                self._check_count(outgoing, left)
            except Exception as error:
                outgoing = self._stopped(request, error)
            digest = outgoing.digest()
            self._chain.append(self._key, self._line(outgoing, digest))
            left.setdefault((outgoing.run, outgoing.kind), set()).add(digest)
        if outgoing.error is not None:
            return error_reply(request, outgoing.error[1], outgoing.error[0])
        return Message(to_records(outgoing.arrays, outgoing.header, outgoing.metrics), reply_to=request)

    def _counted(self) -> dict[tuple[str, str], set[str]]:
        """(run, kind) -> digests of what has left: from the manifest, once, each line of it verified."""
        if self._left is None:
            left: dict[tuple[str, str], set[str]] = {}
            for link in self._chain.read(self._key.public_key()):
                kind = RENAMED.get(link.body["kind"], link.body["kind"])
                left.setdefault((link.body["run"], kind), set()).add(link.body["sha256"])
            self._left = left
        return self._left

    def _line(self, outgoing: Outgoing, digest: str) -> dict[str, Any]:
        return {
            "run": outgoing.run,
            "round": outgoing.round,
            "kind": outgoing.kind,
            "to": " at ".join(part for part in (outgoing.operator, self.server) if part),
            "header": json.loads(outgoing.header) if outgoing.header else {},
            "tensors": [_tensor(name, array) for name, array in outgoing.arrays.items()],
            "metrics": dict(outgoing.metrics),
            "bytes": outgoing.size,
            "error": list(outgoing.error) if outgoing.error else None,
            "sha256": digest,
        }

    def _open(self, request: Message, reply: Message) -> Outgoing:
        """The content of a reply.

        Raises:
            ContractError: it may not leave; the text has the cause, and quotes nothing of the reply.
        """
        if reply.has_error():
            listed = reply.error.code in (CRASHED, REFUSED, RESTARTED, PENDING, DECLINED, AWAY, FULL)
            return self._error(request, reply.error.code if listed else CRASHED, reply.error.reason or "")
        order = _request_in(request)
        if order is None:
            raise ContractError("the question is none of Trunkline's, so no answer to it is")
        site = read_site(self.folder)
        consent = check_terms(site.name, order, read(self.state, order.run, self._seal))
        if consent.verdict != "accepted":
            raise ContractError(f"run {order.run!r} is not accepted at this plant but {consent.verdict}")
        if objections := objection(site.policy, order, consent.bytes_round):
            raise ContractError(f"{site.name}: {objections}")
        raw, header, metrics = open_records(reply.content)
        arrays, category = Arrays(raw), request.metadata.message_type
        if category != order.message_type:
            raise ContractError(
                f"no answer is known to a request of the kind {order.kind!r} in a message of type {category[:32]!r}"
            )
        kind: Kind
        if isinstance(order, OfferRequest):
            kind = "offer"
            _check_offer(_parse(Offer, header), arrays, metrics, order, consent, site, self.describe(site.tasks))
        elif isinstance(order, TrainRequest | FitQuery):
            kind = "fit" if isinstance(order, FitQuery) else "update"
            _check_update(_parse(Reply, header), arrays, metrics, order, consent, site)
        else:
            kind = "scorecard"
            _check_scorecard(
                _parse(Scorecard, header), arrays, metrics, order, consent, site, self.describe(site.tasks)
            )
        outgoing = Outgoing(kind, order.run, order.round, order.about.operator, header, arrays, metrics)
        if objections := check_size(site.policy, outgoing.size):
            raise ContractError(f"{site.name}: {objections}")
        if kind == "update" and outgoing.size > consent.bytes_round:
            raise ContractError(
                f"it has {outgoing.size} bytes; the contract of the run has at most {consent.bytes_round}"
            )
        return outgoing

    def _error(self, request: Message, code: int, text: str) -> Outgoing:
        order = _request_in(request)
        about = (order.run, order.round, order.about.operator) if order else ("", 0, "")
        return Outgoing("error", *about, error=(code, safe_text(text)))

    def _stopped(self, request: Message, error: Exception) -> Outgoing:
        # only a ContractError's text is known to be about the exchange: others may quote what was in the reply or the folder
        cause = str(error) if isinstance(error, ContractError) else type(error).__name__
        return self._error(request, REFUSED, f"stopped by the plant's egress filter: {cause}.")

    def _check_count(self, outgoing: Outgoing, left: Mapping[tuple[str, str], set[str]]) -> None:
        """Limit the different answers of a kind in a run. The same answer may leave again: a request may be repeated."""
        if outgoing.kind == "error":
            return
        consent = read(self.state, outgoing.run, self._seal)
        rounds = consent.request.total_rounds if consent else 0
        most = {"update": REPEATS * rounds, "fit": FIT_QUERIES * rounds}.get(outgoing.kind, ONCE)
        before = left.get((outgoing.run, outgoing.kind), set())
        if len(before) >= most and outgoing.digest() not in before:
            raise ContractError(
                f"{len(before)} different answers of the kind {outgoing.kind} have left in run {outgoing.run!r} of {rounds} rounds, and "
                f"no more than {most} may"
            )


def _tensor(name: str, array: NDArray[Any]) -> list[Any]:
    """Name, shape, dtype, bytes, L2 norm, sha256 of the bytes."""
    digest = hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest()
    return [name, list(array.shape), array.dtype.name, array.nbytes, norm_of(Arrays({name: array})), digest]


def _request_in(request: Message) -> Request | None:
    """The request in a message; None where it holds none, or its content was lost."""
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


def _compare(field: str, value: object, expected: object) -> None:
    if value != expected:
        raise ContractError(f"its {field} is not what the contract of the run says")


def _check_offer(
    offer: Offer,
    arrays: Arrays,
    metrics: Mapping[str, float],
    order: OfferRequest,
    consent: Consent,
    site: SiteConfig,
    tasks: Mapping[str, TaskDescription],
) -> None:
    for field_, value, expected in (
        ("version", offer.version, trunkline.__version__),
        *((key, getattr(offer, key), getattr(consent, key)) for key in ("run", "arrays", "once", "metrics", "tasks", "inputs")),
        ("site", offer.site, site.name), ("hours", offer.hours, site.hours),
    ):  # fmt: skip
        _compare(field_, value, expected)
    # and, whatever the contract was made of, nothing but what the run lends and the plant's own files name
    for spec in offer.arrays:
        if not _lent(spec.name, order.lend):
            raise ContractError(f"`{spec.name}` belongs to nothing that the run lends ({', '.join(order.lend)})")
    statistics = "scaler" in order.lend and "scaler" in site.policy.lend
    labels = {f"scaler.label.{name}" for name in site.tasks}
    for spec in offer.once:
        if not statistics or spec.name not in (*SCALER_ARRAYS, *labels):
            raise ContractError(f"`{spec.name}` may not leave: only statistics that run and policy both lend")
    _check_descriptions(offer.tasks, tasks)
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
    consent: Consent,
    site: SiteConfig,
) -> None:
    last = order.total_rounds + (1 if isinstance(order, FitQuery) else 0)
    if not 1 <= order.round <= last:
        raise ContractError(
            f"run {order.run!r} has {order.total_rounds} rounds; this is an answer to round {order.round}"
        )
    digest = consent.contract.digest()
    for field_, value, expected in (
        ("site", reply.site, site.name), ("run", reply.run, order.run), ("round", reply.round, order.round),
        ("contract", reply.contract, digest), ("question", order.contract, digest),
    ):  # fmt: skip
        _compare(field_, value, expected)
    if not (0 < reply.weight <= order.weight_cap and reply.weight == int(reply.weight)):
        raise ContractError(f"its weight is no whole number of rows from 1 to {order.weight_cap}")
    (FIT_CONTRACT if isinstance(order, FitQuery) else consent.contract).check(arrays, metrics)
    if lets_go(site.policy, tuple(metrics)) != tuple(metrics):
        raise ContractError("it holds metrics that the policy lets nobody have")
    at_server(guards_of(order.about.guards), arrays)


def _check_scorecard(
    card: Scorecard, arrays: Arrays, metrics: Mapping[str, float], order: DecideRequest | ScoreRequest, consent: Consent,
    site: SiteConfig, tasks: Mapping[str, TaskDescription],
) -> None:  # fmt: skip
    Contract(arrays=(), metrics=()).check(arrays, metrics)
    for field_, value, expected in (
        ("site", card.site, site.name), ("run", card.run, order.run), ("question", order.contract, consent.contract.digest())
    ):  # fmt: skip
        _compare(field_, value, expected)
    if card.rows and (isinstance(order, DecideRequest) or not (consent.report and site.policy.report)):
        raise ContractError("it holds results, which were not agreed on")
    _check_descriptions(card.rows, tasks)
    names = {row.task for row in card.rows}
    if not names <= {task.task for task in consent.tasks} or len(names) < len(card.rows):
        raise ContractError("it holds results of tasks that were not agreed on")
    for row in card.rows:
        models = {row.chosen, *row.candidates, *(model for values in row.more.values() for model in values)}
        if not set(row.more) <= tasks[row.task].metrics or not models <= set(MODELS):
            raise ContractError("it holds results under names that are no metric's or model's")


def _check_descriptions(entries: Iterable[TaskCard | TaskRow], tasks: Mapping[str, TaskDescription]) -> None:
    """Raise ContractError unless each card or row describes its task as site.toml does: it has no room for other words."""
    for entry in entries:
        if entry.task not in tasks:
            raise ContractError("it names a task that site.toml has not")
        card = tasks[entry.task].card
        if (entry.kind, entry.metric, entry.unit, entry.better) != (card.kind, card.metric, card.unit, card.better):
            raise ContractError(f"what it says of task `{entry.task}` is not what site.toml says")


def _lent(name: str, lend: tuple[str, ...]) -> bool:
    """Whether the array belongs to a module that a run names."""
    part, _, parameter = name.partition(".")
    if part == "head":
        return "heads" in lend or f"head.{parameter.partition('.')[0]}" in lend
    return part in ("trunk", "stem") and part in lend
