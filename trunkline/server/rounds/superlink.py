"""The sites of a deployment, through Flower's SuperLink."""

from collections.abc import Collection, Iterator
from typing import Any

from flwr.app import DEFAULT_TTL, Message, RecordDict
from flwr.serverapp import Grid

from trunkline.flower.errors import MessageLost
from trunkline.flower.records import pack
from trunkline.flower.replies import PUSH_LOST, Replies
from trunkline.runtime.clock import MachineClock
from trunkline.server.rounds.messaging import Inbox, Transport

BATCH = 16  # replies fetched at once: each may hold a whole trunk, so this bounds memory


def transport_of(grid: Grid) -> Transport:
    """The transport that a grid is, or one through the SuperLink behind it."""
    return grid if isinstance(grid, Transport) else SuperLinkTransport(grid)


class SuperLinkTransport:
    """Flower's own grid, as the round loop uses it.

    Args:
        grid: as Flower gives it to a ServerApp.
    """

    durable = True
    local = False
    complete = False
    journalled = True
    waits = False
    stacks = None

    def __init__(self, grid: Grid) -> None:
        self.clock = MachineClock()
        self._grid = grid
        self._packed: tuple[Any, Any] = (None, None)  # the last content, and the same as it goes through a SuperLink

    def get_node_ids(self) -> Collection[int]:
        return list(self._grid.get_node_ids())

    def room(self) -> bool:
        return True

    def send(self, node: int, kind: str, group: str, content: RecordDict, keep_s: float) -> str:
        if self._packed[0] is not content:  # most sites are asked the same
            self._packed = content, pack(content)
        ttl = min(keep_s, DEFAULT_TTL)
        message = Message(self._packed[1], dst_node_id=node, message_type=kind, ttl=ttl, group_id=group)
        try:  # Flower's grid goes through its messages twice, so it gets one at a time
            ids = list(self._grid.push_messages([message]))
        except PUSH_LOST as lost:
            raise MessageLost(str(lost)) from None
        return ids[0] if ids and ids[0] else ""

    def inbox(self) -> Inbox:
        replies = Replies(self._grid)

        def fetch(message_ids: Collection[str]) -> Iterator[Message]:
            return replies.pull(list(message_ids), BATCH)

        return fetch

    def begin_round(self) -> None:
        """Plants keep their own time."""

    def end_round(self, round: int) -> None:
        """Plants keep their own time."""

    def stamp(self) -> dict[str, float]:
        return {}
