"""Messages to sites and their replies, one at a time, with a deadline: the only code of the centre that waits."""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol

from flwr.app import DEFAULT_TTL, Message, RecordDict
from flwr.serverapp import Grid

from trunkline.flower import RESTARTED, error_site

# Flower's own codes for a node that went away or a message that was lost: the site did nothing wrong, so it is asked again
# (3, 4: its bytes expired on the way, 5: it went offline, 8: its executor died)
LOST = frozenset({RESTARTED, 3, 4, 5, 8})
POLL_FIRST_S, POLL_MOST_S = 0.002, 0.25
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


@dataclass(frozen=True)
class Answer:
    """What came of one request: the content of a reply, or the reason why there is none."""

    node: int
    content: RecordDict | None
    failure: str = ""
    silent: bool = False  # the deadline passed; the node may still be at work


@dataclass
class _Request:
    content: Callable[[], RecordDict]
    tries: int = 0
    again_at: float = 0.0


def ask(
    grid: Grid,
    kind: str,
    requests: dict[int, Callable[[], RecordDict]],
    *,
    round: int,
    deadline_s: float,
    resend_s: float,
    patient_for: set[int] | None = None,
) -> Iterator[Answer]:
    """Send one message a node and yield the answers as they come, each node once.

    A message that got lost, or a node that is silent for `resend_s` (doubling), is asked again with the same content;
    the site answers a repeated question with the same bytes, so nothing is counted twice. Flower delivers at most once.

    Args:
        requests: node id -> maker of the content (made when sent, so that a thousand trunks do not lie in memory).
        deadline_s: seconds after which the remaining nodes are given up.
        patient_for: nodes worth waiting for; the others are heard only while these are not all in. Default: all.
    """
    end = now(grid) + deadline_s
    open_requests = {node: _Request(content) for node, content in requests.items()}
    sent: dict[str, int] = {}
    patient = set(requests) if patient_for is None else patient_for & set(requests)
    poll = POLL_FIRST_S
    while open_requests and patient and now(grid) < end:
        online = set(grid.get_node_ids())
        at = now(grid)
        due = [node for node, request in open_requests.items() if node in online and at >= request.again_at]
        for node in due:
            request = open_requests[node]
            message = Message(
                request.content(),
                dst_node_id=node,
                message_type=kind,
                ttl=min(deadline_s, DEFAULT_TTL),
                group_id=str(round),
            )
            sent |= {message_id: node for message_id in grid.push_messages([message]) if message_id}
            request.tries += 1
            request.again_at = now(grid) + resend_s * 2.0 ** (request.tries - 1)
        heard = False
        waiting = [message_id for message_id, node in sent.items() if node in open_requests]
        for start in range(0, len(waiting), BATCH):
            for message in grid.pull_messages(waiting[start : start + BATCH]):
                answered = sent.pop(message.metadata.reply_to_message_id, None)
                if answered is None or answered not in open_requests:
                    continue
                heard = True
                error = error_site(message)
                if error is not None and error[1] in LOST:
                    open_requests[answered].again_at = now(grid) + min(1.0, resend_s)
                    continue
                del open_requests[answered]
                patient.discard(answered)
                yield Answer(answered, None, error[2]) if error is not None else Answer(answered, message.content)
        poll = POLL_FIRST_S if heard else min(poll * 2, POLL_MOST_S)
        if open_requests and patient and not heard:
            at = now(grid)
            pause(grid, poll, min([end, *(one.again_at for one in open_requests.values() if one.again_at > at)]) - at)
    for node in open_requests:
        if node in patient:
            yield Answer(node, None, f"no reply within {deadline_s:g} s", silent=True)
