"""Flower Grids without a SuperLink: the base of the in-process and the Ray grid."""

import itertools
import time
from abc import abstractmethod
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from typing import Any

from flwr.app import DEFAULT_TTL, Context, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid

from trunkline.errors import ContractError
from trunkline.flower.errors import answer
from trunkline.flower.private import Run, TaskIdentity, make_message
from trunkline.runtime.clock import MachineClock

SERVER_NODE = 1  # Flower's node id of the server side
Scalar = str | int | float


class LocalGrid(Grid):
    """A Flower Grid without a SuperLink, and the round loop's `Transport` at the same time.

    Flower's process-global task identity is set at construction, so a process holds one such grid at a time.

    Args:
        node_configs: one mapping a site, in place of a deployment's `--node-config`. Node ids count up from 2 in this order.
        run_config: in place of a deployment's `[tool.flwr.app.config]` and its overrides.
    """

    durable = False
    local = True
    complete = True
    journalled = False
    waits = False

    def __init__(
        self,
        node_configs: Sequence[Mapping[str, Scalar]],
        run_config: Mapping[str, Scalar] | None = None,
        run_id: int = 1,
    ) -> None:
        self.clock = MachineClock()
        TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, run_id, SERVER_NODE
        self.contexts: dict[int, Context] = {
            node: Context(run_id, node, dict(config), RecordDict(), dict(run_config or {}))
            for node, config in enumerate(node_configs, start=SERVER_NODE + 1)
        }
        self._run = Run.create_empty(run_id)
        self._numbers = itertools.count(1)

    @abstractmethod
    def _dispatch(self, message: Message, context: Context) -> None:
        """Start the work that answers `message`; may do it all before returning."""

    @abstractmethod
    def _collect(self, message_ids: AbstractSet[str]) -> list[Message]:
        """The replies to `message_ids` that are there, each handed out once; a few at a time where they are many."""

    def room(self) -> bool:
        """Whether it is time to push more: messages beyond this only lie in memory. A push is never refused."""
        return True

    @property
    def stacks(self) -> Any:
        """Sites that are trained many at once; None where there are none."""
        return None

    def send(self, node: int, kind: str, group: str, content: RecordDict, keep_s: float) -> str:
        """Send one message; its id. It is never too old: it waits for a worker, not for a plant."""
        message = Message(content, dst_node_id=node, message_type=kind, ttl=DEFAULT_TTL, group_id=group)
        return self.push_messages([message])[0]

    def inbox(self) -> Callable[[Collection[str]], Iterator[Message]]:
        def fetch(message_ids: Collection[str]) -> Iterator[Message]:
            messages = self.pull_messages(message_ids)
            while messages:
                yield messages.pop(0)

        return fetch

    def begin_round(self) -> None:
        """Nothing happens between two rounds."""

    def end_round(self, round: int) -> None:
        """Nothing happens between two rounds."""

    def stamp(self) -> dict[str, float]:
        return {}

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
                nodes = f"{SERVER_NODE + 1} to {SERVER_NODE + len(self.contexts)}"
                raise ContractError(f"a message is addressed to node {node}; this grid has nodes {nodes}")
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
            arrived = self.pull_messages(waiting)
            replies += arrived
            waiting -= {reply.metadata.reply_to_message_id for reply in arrived}
            if not waiting or (end is not None and time.monotonic() >= end):
                break
            time.sleep(0.02)
        return replies


class LoopbackGrid(LocalGrid):
    """Calls the ClientApp in this process while a message is pushed: the tests' network, and the reference of the others."""

    journalled = True

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
        return [self._answers.pop(message_id) for message_id in list(self._answers) if message_id in message_ids]

    def room(self) -> bool:
        return not self._answers


def stamp(message: Message, message_id: str) -> None:
    """Give a message the id that its reply will name; Flower itself writes it this way, there is no setter."""
    message.metadata.__dict__["_message_id"] = message_id


def message_of(metadata: Any, content: RecordDict) -> Message:
    """A message again, from the two halves it was sent in."""
    return make_message(metadata=metadata, content=content)
