"""The driver's half of vectorized sites on Ray: one request per worker and round, one sum back."""

from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import ray
from flwr.app import Context
from ray.exceptions import RayActorError

from trunkline.errors import StateLost
from trunkline.protocol.arrays import Arrays
from trunkline.protocol.messages import TrainRequest
from trunkline.simulations.vectorized.worker import PartialRound, wanted

AT_ONCE = 512  # sites an order: a large round shows progress, and a small one costs one call a worker
LOSSES = 2  # workers that may die with the same round in their hands before everybody is asked singly


class Workers(Protocol):
    """What the driver needs of the scheduler: the worker processes with their sites, and a new one for a dead one."""

    def sites_by_worker(self) -> list[tuple[Any, list[Context]]]:
        """Every worker's actor, with the contexts of the sites that it owns."""

    def replace(self, actor: Any) -> str | None:
        """Start a worker that has died again; returns its description, or None where `actor` is none of the workers."""


class VectorizedDriver:
    """Which sites are trained in stacks, by which worker, and what of them is only in memory.

    Args:
        workers: the processes that own the sites.
    """

    def __init__(self, workers: Workers) -> None:
        self.workers = workers
        self.pass_of: tuple[str, int] | None = None
        self.actor_of: dict[int, Any] = {}  # node -> the worker process that holds its state
        self.dirty = False  # whether a worker holds what its vaults do not
        self.losses: dict[tuple[str, int], int] = {}  # (run, round) -> workers that died in it

    @property
    def holding(self) -> bool:
        return bool(self.actor_of)

    def answer(self, request: TrainRequest, arrays: Arrays, nodes: Sequence[int]) -> Iterator[PartialRound]:
        """Parts of a round as they come; nodes that are in none are to be asked singly.

        Raises:
            StateLost: a worker died with what its sites had learnt since the last checkpoint.
        """
        if not wanted() or self.losses.get((request.run, request.round), 0) >= LOSSES:
            self.actor_of = {}
            return
        if self.pass_of != (request.run, request.passed):
            self._begin(request)
        if not self.actor_of:
            return
        text, shared = request.model_dump_json(), ray.put(dict(arrays))
        by_actor: dict[Any, list[int]] = {}
        for node in nodes:
            if node in self.actor_of:
                by_actor.setdefault(self.actor_of[node], []).append(node)
        running = {
            actor.vectorized_answer.remote(text, shared, mine[start : start + AT_ONCE]): actor
            for actor, mine in by_actor.items()
            for start in range(0, len(mine), AT_ONCE)
        }
        self.dirty = self.dirty or bool(running)
        while running:
            (ready, *_), _ = ray.wait(list(running), num_returns=1)
            part: PartialRound = self._get(ready, running.pop(ready), request)
            del ready
            yield part

    def _begin(self, request: TrainRequest) -> None:
        self.flush()
        self.pass_of, self.actor_of = (request.run, request.passed), {}
        text, waiting = request.model_dump_json(), []
        for actor, contexts in self.workers.sites_by_worker():
            waiting.append((actor, actor.vectorized_begin.remote(text, contexts)))
        stacked = [(actor, self._get(reference, actor, request)) for actor, reference in waiting]
        self.actor_of = {node: actor for actor, nodes in stacked for node in nodes}

    def flush(self) -> None:
        """Every site's state into its vault.

        Raises:
            StateLost: a worker is gone, and with it what its sites had learnt since they last were put away.
        """
        if not self.dirty:
            return
        waiting = [(actor, actor.vectorized_flush.remote()) for actor in dict.fromkeys(self.actor_of.values())]
        for actor, reference in waiting:
            self._get(reference, actor, None)
        self.dirty = False

    def _get(self, reference: Any, actor: Any, request: TrainRequest | None) -> Any:
        """What a worker answered. One that died is started anew, and stacks are loaded again from the vaults."""
        try:
            return ray.get(reference)
        except RayActorError:
            if request is not None:
                key = (request.run, request.round)
                self.losses[key] = self.losses.get(key, 0) + 1
            self.pass_of, self.actor_of, self.dirty = None, {}, False
            when = f"Round {request.round}: " if request else ""
            worker = self.workers.replace(actor) or "a worker"
            raise StateLost(
                f"{when}{worker} died, most likely out of memory, with what its sites had learnt since."
            ) from None
