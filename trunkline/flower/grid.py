"""Flower Grids without a SuperLink: what the in-process and the Ray grid share."""

import itertools
import time
from abc import abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from typing import Any

from flwr.app import Context, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid

from trunkline.errors import ContractError
from trunkline.flower.errors import answer
from trunkline.flower.private import Run, TaskIdentity, make_message

CENTRE = 1  # Flower's node id of the server side
Scalar = str | int | float


class LocalGrid(Grid):
    """A Flower Grid without a SuperLink: what the in-process and the Ray grid share.

    Flower's process-global task identity is set at construction, so a process holds one such grid at a time.

    Args:
        node_configs: one mapping a site, what `--node-config` is in deployment. Node ids count up from 2 in this order.
        run_config: what `[tool.flwr.app.config]` and its overrides are in deployment.
    """

    complete = True  # no node will join later, so nobody need wait for one
    waits = False  # whether `pull_messages` itself waits a moment for the first reply, so that who polls need not sleep

    def __init__(
        self,
        node_configs: Sequence[Mapping[str, Scalar]],
        run_config: Mapping[str, Scalar] | None = None,
        run_id: int = 1,
    ) -> None:
        TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, run_id, CENTRE
        self.contexts: dict[int, Context] = {
            node: Context(run_id, node, dict(config), RecordDict(), dict(run_config or {}))
            for node, config in enumerate(node_configs, start=CENTRE + 1)
        }
        self._run = Run.create_empty(run_id)
        self._numbers = itertools.count(1)

    @abstractmethod
    def _dispatch(self, message: Message, context: Context) -> None:
        """Start the work that answers `message`; may do it all before returning."""

    @abstractmethod
    def _collect(self, message_ids: AbstractSet[str]) -> list[Message]:
        """Replies that are there among those to `message_ids`, each handed out once; a few at a time where they are many."""

    def room(self) -> bool:
        """Whether it is time to push more: what is pushed beyond this only lies in memory. A push is never refused."""
        return True

    def set_run(self, run: Run) -> None:
        self._run = run

    @property
    def run(self) -> Run:
        return self._run

    def create_message(
        self, content: RecordDict, message_type: str, dst_node_id: int, group_id: str, ttl: float | None = None
    ) -> Message:
        return Message(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)

    def get_node_ids(self) -> list[int]:
        return list(self.contexts)

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        """Send `messages`, each taken when the one before is on its way; the ids in the same order are what `pull_messages` takes."""
        ids = []
        for message in messages:
            node = message.metadata.dst_node_id
            if node not in self.contexts:
                known = f"{CENTRE + 1} to {CENTRE + len(self.contexts)}"
                raise ContractError(f"a message is addressed to node {node}; this grid has nodes {known}")
            stamp(message, f"{message.metadata.run_id}-{next(self._numbers)}")
            self._dispatch(message, self.contexts[node])
            ids.append(message.metadata.message_id)
            del message  # before the next is made: each may hold a trunk
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        # a view of a dict's keys is taken as it is: at 10^5 sites, a copy for every few replies would cost more than they
        return self._collect(message_ids if isinstance(message_ids, AbstractSet) else set(message_ids))

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> list[Message]:
        """Push, then collect until all have answered or `timeout` seconds have passed; the late are left out."""
        end = None if timeout is None else time.monotonic() + timeout
        waiting = set(self.push_messages(messages))
        replies: list[Message] = []
        while waiting:
            came = self.pull_messages(waiting)
            replies += came
            waiting -= {reply.metadata.reply_to_message_id for reply in came}
            if not waiting or (end is not None and time.monotonic() >= end):
                break
            time.sleep(0.02)
        return replies


class LoopbackGrid(LocalGrid):
    """Calls the ClientApp in this process while a message is pushed: the tests' network, and the others' reference."""

    def __init__(
        self,
        client_app: ClientApp,
        node_configs: Sequence[Mapping[str, Scalar]],
        run_config: Mapping[str, Scalar] | None = None,
        run_id: int = 1,
    ) -> None:
        super().__init__(node_configs, run_config, run_id)
        self._app = client_app
        self._answers: dict[str, Message] = {}

    def _dispatch(self, message: Message, context: Context) -> None:
        self._answers[message.metadata.message_id] = answer(self._app, message, context)

    def _collect(self, message_ids: AbstractSet[str]) -> list[Message]:
        return [self._answers.pop(one) for one in list(self._answers) if one in message_ids]

    def room(self) -> bool:
        return not self._answers


def stamp(message: Message, message_id: str) -> None:
    """Give a message the id that its reply will name; Flower itself writes it this way, there is no setter."""
    message.metadata.__dict__["_message_id"] = message_id


def message_of(metadata: Any, content: RecordDict) -> Message:
    """A message again, from the two halves it was sent in."""
    return make_message(metadata=metadata, content=content)
