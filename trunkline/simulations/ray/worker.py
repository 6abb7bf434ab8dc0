"""The worker process of a simulation on Ray. Nothing here imports torch: a process without a site starts without it."""

import logging
import os
import pickle
import socket
import time
from collections.abc import Callable
from importlib.metadata import version
from typing import Any

import ray
from flwr.app import Context

import trunkline
from trunkline.flower.grid import message_of
from trunkline.protocol.arrays import Arrays
from trunkline.protocol.messages import TrainRequest
from trunkline.simulations.ray.serialization import Buffer, pack, unpack

# A message as a worker receives it: node, metadata, content without its arrays, and these: their bytes, or the key
# of the shared content that has them.
SerializedMessage = tuple[int, bytes, bytes, list[Buffer] | int]


def versions() -> dict[str, str]:
    """The versions that every process of a simulation must share, or the bytes of its results would differ."""
    return {"trunkline": trunkline.__version__, "flwr": version("flwr"), "torch": version("torch")}


@ray.remote
class Worker:
    """One process with a share of the sites.

    Args:
        site_host: makes the object that opens the sites and answers their messages; it is called with a description
            of this process, for the texts of errors.
        index: of this worker.
    """

    def __init__(self, site_host: Callable[[str], Any], index: int) -> None:
        logging.getLogger("flwr").setLevel(logging.ERROR)
        node = ray.get_runtime_context().get_node_id()
        self.site_host = site_host(
            f"worker {index} (process {os.getpid()} on {socket.gethostname()}, Ray node {node[:8]})"
        )
        self.contexts: dict[int, Context] = {}
        self.shared: dict[int, list[bytes]] = {}

    def hello(self) -> dict[str, str]:
        """Return this process's versions; the driver takes the call's return as the sign that the process has started."""
        return versions()

    def vectorized_begin(self, request: str, contexts: list[Context]) -> list[int]:
        """Prepare the sites for training in stacks; a process has one `VectorizedWorker`, made anew for every pass of a run."""
        from trunkline.simulations.vectorized.worker import VectorizedWorker

        self.vectorized = VectorizedWorker({context.node_id: context.node_config for context in contexts})
        return self.vectorized.begin(TrainRequest.model_validate_json(request))

    def vectorized_answer(self, request: str, arrays: dict[str, Any], nodes: list[int]) -> Any:
        return self.vectorized.answer(TrainRequest.model_validate_json(request), Arrays(arrays), nodes)

    def vectorized_flush(self) -> None:
        self.vectorized.flush()

    def open(self, contexts: list[Context]) -> list[tuple[str | None, float]]:
        """Open these sites; for each the text of its problem, or None, and the seconds that it took."""
        self.contexts |= {context.node_id: context for context in contexts}
        return [self.site_host.open(context) for context in contexts]

    def answer(
        self, messages: list[SerializedMessage], contexts: list[Context], shared: dict[int, list[Any]]
    ) -> list[tuple[bytes, list[Buffer], float]]:
        """Answer a group of messages in their order; each reply is packed and comes with the seconds that it took.

        Args:
            messages: the group.
            contexts: of nodes that this process has not met.
            shared: key of a shared content -> a list with the reference to its buffers in the object store.
        """
        self.contexts |= {context.node_id: context for context in contexts}
        for key in self.shared.keys() - shared.keys():
            del self.shared[key]
        for key, (reference,) in shared.items():
            if key not in self.shared:  # one copy a process, which all messages with this content then look at
                self.shared[key] = [bytes(buffer) for buffer in ray.get(reference)]
        replies = []
        for node, metadata, body, arrays in messages:
            start = time.perf_counter()
            buffers = self.shared[arrays] if isinstance(arrays, int) else [bytes(buffer) for buffer in arrays]
            content = unpack(body, buffers)
            reply = self.site_host.answer(message_of(pickle.loads(metadata), content), self.contexts[node])
            replies.append((*pack(reply), time.perf_counter() - start))
        return replies
