"""Whom the centre asks again: a plant whose disk was full answers later, and its round is not lost."""

from collections.abc import Iterator
from typing import Any

import pytest
from flwr.app import Message, RecordDict
from flwr.clientapp import ClientApp

from trunkline.flower.errors import CRASHED, FULL, error_reply
from trunkline.flower.grid import LoopbackGrid, stamp
from trunkline.flower.records import to_records
from trunkline.server.rounds import superlink
from trunkline.server.rounds.messaging import NodeReply, ask
from trunkline.server.rounds.superlink import transport_of


class Far:
    """A SuperLink with one node, which answers the n-th question as `codes` says; 0 is an answer."""

    def __init__(self, *codes: int) -> None:
        self.codes = list(codes)
        self.asked = 0
        self.waiting: list[Message] = []

    def get_node_ids(self) -> list[int]:
        return [2]

    def push_messages(self, messages: list[Message]) -> list[str]:
        for message in messages:
            self.asked += 1
            stamp(message, f"m{self.asked}")
            code = self.codes.pop(0)
            reply = (
                error_reply(message, "its disk is full; ask again", code)
                if code
                else Message(to_records({}, "{}"), reply_to=message)
            )
            self.waiting.append(reply)
        return [f"m{self.asked}"]

    def pull(self, waiting: list[str], most: int) -> Iterator[Message]:
        came, self.waiting = self.waiting, []
        yield from came


def answers(grid: Far, monkeypatch: pytest.MonkeyPatch) -> list[NodeReply]:
    LoopbackGrid(ClientApp(), [{}])  # sets who this process is, as Flower wants it before a message is made
    monkeypatch.setattr(superlink, "Replies", lambda grid: grid)
    found: Any = ask(transport_of(grid), "train", {2: RecordDict}, round=1, deadline_s=10.0, resend_s=0.05)  # type: ignore[arg-type]
    return list(found)


def test_a_full_disk_is_asked_again_and_a_crash_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    grid = Far(FULL, FULL, 0)
    (answer,) = answers(grid, monkeypatch)
    assert answer.content is not None and grid.asked == 3
    grid = Far(CRASHED, 0)
    (answer,) = answers(grid, monkeypatch)
    assert answer.content is None and answer.code == CRASHED and grid.asked == 1
