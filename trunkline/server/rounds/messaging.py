"""Messages to sites and their replies, one at a time, with a deadline: the only code of the server that waits for sites."""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from flwr.app import Message, RecordDict

from trunkline.flower.errors import FULL, RESTARTED, MessageLost, error_site
from trunkline.protocol.arrays import Arrays
from trunkline.protocol.messages import TrainRequest
from trunkline.runtime.clock import Clock
from trunkline.strategies.streaming import Streamed

# Flower's own codes for a node that went away or a message that was lost: the site did nothing wrong, so it is asked again
# (3, 4: its bytes expired on the way, 5: it went offline, 8: its executor died). A plant's full disk is waited for, until the
# deadline; in a simulation the disk is this machine's own, whose operator should hear of it
LOST = frozenset({RESTARTED, FULL, 3, 4, 5, 8})
POLL_FIRST_S, POLL_MOST_S = 0.002, 0.25
LATE_S = 2.0  # between looks for answers that nobody waits for any more

Inbox = Callable[[Collection[str]], Iterator[Message]]  # ids of messages -> their replies that are there, each once


class StackedPart(Protocol):
    """A part of a round that some sites trained as stacks.

    `metrics`: node -> metric name -> number. `problems`: node -> why its update is set aside. `total`: the sum of updates.
    """

    @property
    def metrics(self) -> Mapping[int, Mapping[str, float]]: ...
    @property
    def problems(self) -> Mapping[int, str]: ...
    @property
    def total(self) -> Streamed: ...


class Stacks(Protocol):
    """Sites of a simulation that are trained many at once, as stacks of models."""

    @property
    def holding(self) -> bool:
        """Whether sites keep their state in memory between rounds."""

    def answer(self, request: TrainRequest, arrays: Arrays, nodes: Sequence[int]) -> Iterator[Any]:
        """StackedParts as they come; nodes that are in none are to be asked singly."""

    def flush(self) -> None:
        """Write the state that sites have in memory to their vaults."""


@runtime_checkable
class Transport(Protocol):
    """The way to the sites of a run: a SuperLink, or a grid of a simulation.

    Attributes:
        clock: of this machine, or of a simulated world.
        durable: sites are reached through a SuperLink. They and the server's disk may fail and come back, so a run waits.
        local: sites compute on this machine, and a message waits for a worker, not for a plant. How busy the machine is must
            not decide which sites are in: a deadline counts from the last reply.
        complete: no site will join later.
        journalled: the server may be started again in the middle of a round, so admitted updates are written down.
        waits: a look into an inbox waits a moment for the first reply, so the caller need not.
        stacks: of sites that are trained many at once; None where there are none.
    """

    @property
    def clock(self) -> Clock: ...
    @property
    def durable(self) -> bool: ...
    @property
    def local(self) -> bool: ...
    @property
    def complete(self) -> bool: ...
    @property
    def journalled(self) -> bool: ...
    @property
    def waits(self) -> bool: ...
    @property
    def stacks(self) -> Stacks | None: ...

    def get_node_ids(self) -> Collection[int]:
        """The nodes that are online."""

    def room(self) -> bool:
        """Whether it is time to send more: messages beyond this only lie in memory. `send` never refuses one."""

    def send(self, node: int, kind: str, group: str, content: RecordDict, keep_s: float) -> str:
        """Send a message; its id, by which an inbox finds the reply. Empty: it reached no queue.

        Args:
            kind: "query", "train" or "evaluate".
            group: the round, as text.
            keep_s: seconds after which nobody waits for the reply.

        Raises:
            MessageLost: the site has not seen it.
        """

    def inbox(self) -> Inbox:
        """For the replies of one conversation; the half-fetched replies of another stay with its own inbox."""

    def begin_round(self) -> None:
        """A round begins. A world lets the time pass that lies between two rounds."""

    def end_round(self, round: int) -> None:
        """A round is finished. A world lets go of the messages under way, and notes where it stands."""

    def stamp(self) -> dict[str, float]:
        """Keys that every event of the run gets: see `events.STAMPS`."""


def pause(transport: Transport, seconds: float, most: float) -> None:
    """Let `seconds` pass before the next look; on a virtual clock, which knows the next event, at most `most`."""
    transport.clock.pause(seconds, most)


def now(transport: Transport) -> float:
    """Seconds on the transport's clock."""
    return transport.clock.monotonic()


def flush_stacks(transport: Transport) -> None:
    """Have sites that keep their state in memory between rounds write it to their vaults."""
    if transport.stacks is not None and transport.stacks.holding:
        transport.stacks.flush()


@dataclass(frozen=True)
class NodeReply:
    """The result of one request: the content of a reply, or the reason why there is none."""

    node: int
    content: RecordDict | None
    failure: str = ""
    silent: bool = False  # the deadline passed; the node may still be at work
    code: int = 0  # of an error reply
    tries: int = 1  # questions it took; more than one: it, or a message, was lost in between
    lost: str = ""  # what came in place of the first answer


class LateReplies:
    """Questions that were asked once too often: their answers may still come, and are taken off the SuperLink and dropped.

    Left there they would lie in its database for ever. None of them can enter a sum: `ask` hands on one answer a question,
    and `admission.admit` one of its own round.

    Args:
        report: takes node and round of every answer that was dropped.
    """

    MOST = 4096  # of the newest that are looked for

    def __init__(self, report: Callable[[int, int], None] = lambda node, round: None) -> None:
        self.report = report
        self._open: dict[str, tuple[int, int]] = {}

    def expect(self, message_id: str, node: int, round: int) -> None:
        self._open[message_id] = (node, round)
        while len(self._open) > self.MOST:
            del self._open[next(iter(self._open))]

    @property
    def ids(self) -> list[str]:
        return list(self._open)

    def take(self, message: Message) -> bool:
        """Whether `message` answers one of these."""
        question = self._open.pop(message.metadata.reply_to_message_id, None)
        if question is not None and not message.has_error():
            self.report(*question)
        return question is not None


def ask(
    transport: Transport,
    kind: str,
    requests: Mapping[int, Callable[[], RecordDict]],
    *,
    round: int,
    deadline_s: float,
    resend_s: float,
    patient_for: set[int] | None = None,
    revoked: Callable[[int], str] = lambda node: "",
    late: LateReplies | None = None,
    is_away: Callable[[int], bool] = lambda node: False,
    enough: Callable[[], bool] = lambda: False,
) -> Iterator[NodeReply]:
    """Send one message a node and yield the replies as they come, each node once.

    A message that got lost, or a node that is silent for `resend_s` (doubling), is asked again with the same content;
    the site answers a repeated question with the same bytes, so nothing is counted twice. Flower delivers at most once.

    Args:
        requests: node id -> maker of the content (made when sent, so that a thousand trunks do not lie in memory).
        deadline_s: seconds after which the remaining nodes are given up; on a local transport since the last reply.
        patient_for: nodes worth waiting for; the others are heard only while these are not all in. Default: all.
        revoked: why a node will never answer (its site was revoked, say), or nothing; such a node is given up at once.
        late: remembers, from one call to the next, the questions whose answers nobody waits for.
        is_away: whether a node's site has closed by now; it is heard while others are waited for, and not waited for itself.
        enough: asked after every reply; True ends the wait, and no word is lost about the nodes that have not answered.
    """
    limits = _Limits(deadline_s, resend_s, revoked, is_away, enough)
    patient = set(requests) if patient_for is None else patient_for & set(requests)
    return _Conversation(transport, kind, requests, round, limits, patient, late or LateReplies()).replies()


@dataclass
class _Request:
    content: Callable[[], RecordDict]
    tries: int = 0
    again_at: float = 0.0
    lost: str = ""


@dataclass(frozen=True)
class _Limits:
    """How long a conversation goes on; see `ask`."""

    deadline_s: float
    resend_s: float
    revoked: Callable[[int], str]
    is_away: Callable[[int], bool]
    enough: Callable[[], bool]


class _Conversation:
    """One call of `ask`: the open requests, the messages under way, and the loop that looks after both."""

    def __init__(
        self, transport: Transport, kind: str, requests: Mapping[int, Callable[[], RecordDict]], round: int, limits: _Limits,
        patient: set[int], late: LateReplies,
    ) -> None:  # fmt: skip
        self.transport = transport
        self.kind = kind
        self.round = round
        self.limits = limits
        self.open = {node: _Request(content) for node, content in requests.items()}
        self.patient = patient
        self.late = late
        self.inbox = transport.inbox()
        self.sent: dict[str, int] = {}  # id of a message -> its node
        self.due: Iterator[int] = iter(())
        self.heard = False
        self.end = now(transport) + limits.deadline_s
        self._look_at = self._late_at = 0.0

    def replies(self) -> Iterator[NodeReply]:
        poll = POLL_FIRST_S
        while self._is_waiting():
            yield from self._look()
            self._send_due()
            self.heard = False
            for message in self.inbox(self._wanted()):
                reply = self._take(message)
                del message  # it may hold a trunk, and the next may be another
                if reply is None:
                    continue
                yield reply
                del reply
                if self.limits.enough():
                    break
            poll = POLL_FIRST_S if self.heard else min(poll * 2, POLL_MOST_S)
            if not self.heard:
                self._pause(poll)
        yield from self._give_up()

    def _is_waiting(self) -> bool:
        return bool(self.open and self.patient) and now(self.transport) < self.end and not self.limits.enough()

    def _look(self) -> Iterator[NodeReply]:
        """See which nodes are online, away or gone; not at every reply: at 10^5 sites that would cost more than the replies."""
        moment = now(self.transport)
        if moment < self._look_at:
            return
        self._look_at = moment + min(POLL_MOST_S, self.limits.resend_s)
        closed = set() if self.transport.local else {node for node in self.open if self.limits.is_away(node)}
        self.patient -= closed
        online = (node for node in self.transport.get_node_ids() if node in self.open and node not in closed)
        self.due = iter([node for node in online if moment >= self.open[node].again_at])
        for node in () if self.transport.local else [node for node in self.open if self.limits.revoked(node)]:
            self._close(node, unanswered=True)
            yield NodeReply(node, None, self.limits.revoked(node))

    def _send_due(self) -> None:
        """Send a message to each node that is due, made when it is sent, until there is no room for more."""
        while self.transport.room() and (node := next(self.due, None)) is not None:
            if (request := self.open.get(node)) is None:
                continue
            request.tries += 1
            request.again_at = now(self.transport) + self.limits.resend_s * 2.0 ** (request.tries - 1)
            try:
                message_id = self.transport.send(
                    node, self.kind, str(self.round), request.content(), self.limits.deadline_s
                )
            except MessageLost as lost:  # no site has seen it: it is sent again in a moment
                self._ask_soon(request, str(lost))
                continue
            if message_id:
                self.sent[message_id] = node

    def _wanted(self) -> Collection[str]:
        """The messages whose replies are fetched now."""
        if self.transport.durable and now(self.transport) >= self._late_at:
            self._late_at = now(self.transport) + LATE_S
            return [*self.sent, *self.late.ids]
        return self.sent.keys()

    def _take(self, message: Message) -> NodeReply | None:
        """The reply that a message is; None where its node is asked again, or the message answers no open request."""
        if self.late.take(message):
            return None
        node = self.sent.pop(message.metadata.reply_to_message_id, None)
        if node is None or node not in self.open:
            return None
        self.heard = True
        if self.transport.local:
            self.end = now(self.transport) + self.limits.deadline_s
        error, request = error_site(message), self.open[node]
        if error is not None and error[1] in LOST and (error[1] != FULL or self.transport.durable):
            self._ask_soon(request, error[2] or f"Flower's error {error[1]}")
            return None
        self._close(node)
        if error is not None:
            return NodeReply(node, None, error[2], code=error[1], tries=request.tries, lost=request.lost)
        return NodeReply(node, message.content, tries=request.tries, lost=request.lost)

    def _ask_soon(self, request: _Request, cause: str) -> None:
        request.again_at = now(self.transport) + min(1.0, self.limits.resend_s)
        request.lost = request.lost or cause

    def _close(self, node: int, *, unanswered: bool = False) -> None:
        """Wait for a node no longer. Further replies of it are late."""
        request = self.open.pop(node)
        self.patient.discard(node)
        if (unanswered or request.tries > 1) and not self.transport.local:
            for message_id in [message_id for message_id, receiver in self.sent.items() if receiver == node]:
                self._expect_late(message_id)
                del self.sent[message_id]

    def _expect_late(self, message_id: str) -> None:
        if self.transport.durable:
            self.late.expect(message_id, self.sent[message_id], self.round)

    def _pause(self, poll: float) -> None:
        if not self.open or not self.patient or (self.transport.local and self.transport.waits):
            return
        moment = now(self.transport)
        repeats = [request.again_at for request in self.open.values() if request.again_at > moment]
        pause(self.transport, poll, min([self.end, *repeats]) - moment)

    def _give_up(self) -> Iterator[NodeReply]:
        """A reply of silence for each node that was waited for."""
        for message_id in self.sent:
            self._expect_late(message_id)
        for node, request in self.open.items():
            if node in self.patient and not self.limits.enough():
                cause = f" ({request.lost})" if request.lost else ""
                text = f"no reply within {self.limits.deadline_s:g} s{cause}"
                yield NodeReply(node, None, text, silent=True, tries=request.tries)
