"""Pulling replies from a SuperLink without waiting for the slow ones."""

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, cast

import httpx
from flwr.app import Error, Message

from trunkline.flower.grid import stamp
from trunkline.flower.private import (
    SYSTEM_MESSAGE_TYPE,
    ConfirmMessageReceivedRequest,
    ErrorCode,
    Metadata,
    ObjectPullError,
    ObjectPushError,
    ObjectUnavailableError,
    PullAppMessagesRequest,
    RunNotRunningException,
    inflate_object_from_contents,
    iterate_object_tree,
    make_message,
    make_pull_object_fn_protobuf,
)

# what a grid raises once its SuperLink has forgotten the run, or is another; one that is only away is waited for inside
LINK_LOST = (httpx.HTTPError, RunNotRunningException)
PUSH_LOST = ObjectPushError  # what it raises when a SuperLink came back in the middle of a message that was sent to it


@dataclass
class _Begun:
    """A reply that is on its way: its id, what of it has come, and what has not."""

    message_id: str
    missing: list[str]
    contents: dict[str, bytes] = field(default_factory=dict)


class Replies:
    """What comes back through a SuperLink, without waiting for what is still being sent.

    Flower's own `pull_messages` stays inside until the last object of every reply it has seen is there: a site that stops in
    the middle of its upload, or is shut out there, would hold everybody's round for minutes. Here such a reply is left
    for the next look, and what of it has come is kept.
    """

    def __init__(self, grid: Any) -> None:
        self._grid = grid
        self._begun: dict[str, _Begun] = {}  # by the id of the question

    def pull(self, message_ids: Sequence[str], at_once: int = 16) -> Iterator[Message]:
        """The replies to `message_ids` that are whole by now, each once; a few at a time, as each may hold a trunk.

        What had begun of a reply to any other id is let go.
        """
        client, node, run = self._grid._runtime_client, self._grid.node, self._grid.run.run_id
        pull = make_pull_object_fn_protobuf(client.PullObject, node, run)
        self._begun = {asked: one for asked, one in self._begun.items() if asked in set(message_ids)}
        new = [asked for asked in message_ids if asked not in self._begun]
        for start in range(0, max(1, len(new)), at_once):  # once also where there is nothing new to ask for
            if ids := new[start : start + at_once]:
                found = client.PullMessages(PullAppMessagesRequest(message_ids=ids))
                for proto, tree in zip(found.messages_list, found.message_object_trees, strict=True):
                    objects = list(dict.fromkeys(part.object_id for part in iterate_object_tree(tree)))
                    asked = proto.metadata.reply_to_message_id
                    self._begun[asked] = _Begun(proto.metadata.message_id, objects)
            for asked, one in list(self._begun.items()):
                try:
                    if not self._fetch(one, pull):
                        continue
                    client.ConfirmMessageReceived(
                        ConfirmMessageReceivedRequest(node=node, run_id=run, message_object_id=one.message_id)
                    )
                    message = cast(Message, inflate_object_from_contents(one.message_id, one.contents))
                except ObjectPullError as error:  # it will never be whole: the site is asked again
                    message = _lost(asked, run, node.node_id, str(error))
                else:
                    stamp(message, one.message_id)
                del self._begun[asked]
                yield message
                del message  # it may hold a trunk

    @staticmethod
    def _fetch(one: _Begun, pull: Callable[[str], bytes]) -> bool:
        """Fetch what is there of a reply; whether it is whole."""

        def attempt(name: str) -> None:
            with contextlib.suppress(ObjectUnavailableError):
                one.contents[name] = pull(name)

        with ThreadPoolExecutor(2) as pool:  # as many as Flower itself fetches at once
            list(pool.map(attempt, one.missing))
        one.missing = [name for name in one.missing if name not in one.contents]
        return not one.missing


def _lost(asked: str, run: int, node: int, why: str) -> Message:
    """The error that Flower's own grid makes of a reply whose objects never came."""
    metadata = Metadata(
        run_id=run, message_id="", src_node_id=node, dst_node_id=node, reply_to_message_id=asked, group_id="",
        created_at=time.time(), ttl=0, message_type=SYSTEM_MESSAGE_TYPE,
    )  # fmt: skip
    return make_message(metadata=metadata, error=Error(code=ErrorCode.MESSAGE_UNAVAILABLE, reason=why))
