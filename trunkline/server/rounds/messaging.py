"""Messages to sites and their replies, one at a time, with a deadline: the only code of the centre that waits."""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

from flwr.app import DEFAULT_TTL, Message, RecordDict
from flwr.serverapp import Grid

from trunkline.flower.errors import FULL, RESTARTED, error_site
from trunkline.flower.grid import LocalGrid
from trunkline.flower.records import pack
from trunkline.flower.replies import PUSH_LOST, Replies

# Flower's own codes for a node that went away or a message that was lost: the site did nothing wrong, so it is asked again
# (3, 4: its bytes expired on the way, 5: it went offline, 8: its executor died). A plant's full disk is waited for, until the
# deadline; in a simulation the disk is this machine's own, whose operator should hear of it
LOST = frozenset({RESTARTED, FULL, 3, 4, 5, 8})
POLL_FIRST_S, POLL_MOST_S = 0.002, 0.25
LATE_S = 2.0  # between looks for answers that nobody waits for any more
BATCH = 16  # replies fetched at once: each may hold a whole trunk, so this bounds memory


class Clock(Protocol):
    """What waits. The machine's own, or of a simulated world: `sleep` then ends early, with the first thing that happens."""

    def monotonic(self) -> float: ...
    def sleep(self, seconds: float, /) -> None: ...


def pause(grid: Grid, seconds: float, most: float) -> None:
    """Let `seconds` pass before the next look; on a grid's own clock, which knows what comes next, at most `most`."""
    own: Clock | None = getattr(grid, "clock", None)
    time.sleep(seconds) if own is None else own.sleep(most)


def now(grid: Grid) -> float:
    """Seconds on the grid's own clock where it brings one, else on the machine's."""
    own: Clock | None = getattr(grid, "clock", None)
    return time.monotonic() if own is None else own.monotonic()


def is_far(grid: Grid) -> bool:
    """Whether sites are reached through a SuperLink: neither in this process nor on a simulated clock."""
    return not isinstance(grid, LocalGrid) and getattr(grid, "clock", None) is None


def holds_state(grid: Grid) -> bool:
    """Whether sites keep their state in memory between rounds."""
    return bool(getattr(grid, "holding", False))


def flush_stacks(grid: Grid) -> None:
    """Have sites that a grid keeps in memory between rounds write their state to their vaults."""
    if holds_state(grid):
        grid.flush()  # type: ignore[attr-defined]


@dataclass(frozen=True)
class Answer:
    """What came of one request: the content of a reply, or the reason why there is none."""

    node: int
    content: RecordDict | None
    failure: str = ""
    silent: bool = False  # the deadline passed; the node may still be at work
    code: int = 0  # of an error reply
    tries: int = 1  # questions it took; more than one: it, or a message, was lost in between
    lost: str = ""  # what came in place of the first answer


@dataclass
class _Request:
    content: Callable[[], RecordDict]
    tries: int = 0
    again_at: float = 0.0
    lost: str = ""


class Late:
    """Questions that were asked once too often: whose answers may still come, and are taken off the SuperLink and dropped.

    Left there they would lie in its database for ever. None of them can enter a sum: `ask` hands on one answer a question,
    and `intake.admit` one of its own round.

    Args:
        tell: called with node and round for every answer that was dropped.
    """

    MOST = 4096  # of the newest that are looked for

    def __init__(self, tell: Callable[[int, int], None] = lambda node, round: None) -> None:
        self.tell = tell
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
        known = self._open.pop(message.metadata.reply_to_message_id, None)
        if known is not None and not message.has_error():
            self.tell(*known)
        return known is not None


def ask(
    grid: Grid,
    kind: str,
    requests: dict[int, Callable[[], RecordDict]],
    *,
    round: int,
    deadline_s: float,
    resend_s: float,
    patient_for: set[int] | None = None,
    gone: Callable[[int], str] = lambda node: "",
    late: Late | None = None,
    away: Callable[[int], bool] = lambda node: False,
    enough: Callable[[], bool] = lambda: False,
) -> Iterator[Answer]:
    """Send one message a node and yield the answers as they come, each node once.

    A message that got lost, or a node that is silent for `resend_s` (doubling), is asked again with the same content;
    the site answers a repeated question with the same bytes, so nothing is counted twice. Flower delivers at most once.

    Args:
        requests: node id -> maker of the content (made when sent, so that a thousand trunks do not lie in memory).
        deadline_s: seconds after which the remaining nodes are given up; in a simulation since the last answer.
        patient_for: nodes worth waiting for; the others are heard only while these are not all in. Default: all.
        gone: why a node will never answer (its site was revoked, say), or nothing; such a node is given up at once.
        late: remembers, from one call to the next, the questions whose answers nobody waits for.
        away: whether a node's site has closed by now; it is heard while others are waited for, and not waited for itself.
        enough: asked after every answer; True ends it, and of who has not answered nothing is said.
    """
    local = grid if isinstance(grid, LocalGrid) else None
    end = now(grid) + deadline_s
    open_requests = {node: _Request(content) for node, content in requests.items()}
    sent: dict[str, int] = {}
    patient = set(requests) if patient_for is None else patient_for & set(requests)
    far = is_far(grid)
    late = late if late is not None else Late()
    late_at = 0.0
    replies = Replies(grid) if far else None
    poll, look_at = POLL_FIRST_S, 0.0
    packed: list[Any] = [None, None]  # the last content, and the same as it goes through a SuperLink
    due: Iterator[int] = iter(())

    def outgoing(room: Callable[[], bool]) -> Iterator[Message]:
        """One message a due node, made when it is taken, until there is no room for more."""
        while room() and (node := next(due, None)) is not None:
            if (request := open_requests.get(node)) is None:
                continue
            content = request.content()
            if far:
                if packed[0] is not content:  # most sites are asked the same
                    packed[:] = [content, pack(content)]
                content = packed[1]
            message = Message(
                content,
                dst_node_id=node,
                message_type=kind,
                ttl=min(deadline_s, DEFAULT_TTL) if local is None else DEFAULT_TTL,
                group_id=str(round),
            )
            request.tries += 1
            request.again_at = now(grid) + resend_s * 2.0 ** (request.tries - 1)
            taken.append(node)
            yield message
            del message  # before the next is made: each may hold a trunk

    while open_requests and patient and now(grid) < end and not enough():
        at = now(grid)
        if at >= look_at:  # not at every reply: at 10^5 sites the look itself would cost more than the replies
            look_at = at + min(POLL_MOST_S, resend_s)
            closed = {node for node in open_requests if away(node)} if local is None else set()
            patient -= closed
            asked = (node for node in grid.get_node_ids() if node in open_requests and node not in closed)
            due = iter([node for node in asked if at >= open_requests[node].again_at])
            for node in [node for node in open_requests if gone(node)] if local is None else ():
                del open_requests[node]
                patient.discard(node)
                yield Answer(node, None, gone(node))
        taken: list[int] = []
        if local is not None:
            sent |= dict(zip(local.push_messages(outgoing(local.room)), taken, strict=True))
        else:  # Flower's own grid goes through what it is given twice, so it gets one at a time
            for message in outgoing(lambda: True):
                try:
                    sent |= {message_id: taken[-1] for message_id in grid.push_messages([message]) if message_id}
                except PUSH_LOST as lost:  # no site has seen it: it is sent again in a moment
                    request = open_requests[taken[-1]]
                    request.again_at, request.lost = now(grid) + min(1.0, resend_s), request.lost or str(lost)
        heard = False
        beside: list[str] = []
        if far and now(grid) >= late_at:
            late_at, beside = now(grid) + LATE_S, late.ids
        for message in _pull(grid, sent, open_requests, replies, beside):
            if late.take(message):
                continue
            answered = sent.pop(message.metadata.reply_to_message_id, None)
            if answered is None or answered not in open_requests:
                continue
            heard = True
            if local is not None:
                # there a message waits for a worker, not for a plant: how busy this machine is must not decide who is in
                end = now(grid) + deadline_s
            error = error_site(message)
            request = open_requests[answered]
            if error is not None and error[1] in LOST and not (error[1] == FULL and not far):
                request.again_at = now(grid) + min(1.0, resend_s)
                request.lost = request.lost or error[2] or f"Flower's error {error[1]}"
                continue
            del open_requests[answered]
            patient.discard(answered)
            again = [one for one, node in sent.items() if node == answered] if far and request.tries > 1 else []
            for message_id in again:
                late.expect(message_id, answered, round)
                del sent[message_id]
            yield Answer(
                answered,
                message.content if error is None else None,
                error[2] if error is not None else "",
                code=error[1] if error is not None else 0,
                tries=request.tries,
                lost=request.lost,
            )
            del message  # it may hold a trunk, and what comes next may be another
            if enough():
                break
        poll = POLL_FIRST_S if heard else min(poll * 2, POLL_MOST_S)
        if open_requests and patient and not heard and not (local is not None and local.waits):
            at = now(grid)
            pause(grid, poll, min([end, *(one.again_at for one in open_requests.values() if one.again_at > at)]) - at)
    for message_id, node in sent.items() if far else ():
        late.expect(message_id, node, round)
    for node, request in open_requests.items():
        if node in patient and not enough():
            why = f" ({request.lost})" if request.lost else ""
            yield Answer(node, None, f"no reply within {deadline_s:g} s{why}", silent=True, tries=request.tries)


def _pull(
    grid: Grid,
    sent: dict[str, int],
    open_requests: dict[int, _Request],
    replies: Replies | None,
    beside: list[str],
) -> Iterator[Message]:
    """The replies that are there, never more of them at once in memory than a few."""
    if isinstance(grid, LocalGrid):
        came = list(grid.pull_messages(sent.keys()))
        while came:
            yield came.pop(0)
        return
    waiting = [message_id for message_id, node in sent.items() if node in open_requests]
    if replies is not None:
        yield from replies.pull([*waiting, *beside], BATCH)
        return
    for start in range(0, len(waiting), BATCH):
        yield from grid.pull_messages(waiting[start : start + BATCH])
