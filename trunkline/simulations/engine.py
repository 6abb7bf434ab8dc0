"""Many sites on Ray, with the ClientApp and ServerApp that are deployed: only the Grid differs.

Each worker process owns a fixed share of the sites, so a site's rows are read once and stay where they are.
"""

import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import ray
from flwr.app import Context, Message

from trunkline.errors import DataError, DeploymentError, TrunklineError
from trunkline.flower import LocalGrid, Scalar, error_reply

OBJECT_STORE = 256 * 1024 * 1024  # bytes; a round's trunk and the replies in flight, not the data


@ray.remote
class Worker:
    """One process, one torch thread, some of the sites for good."""

    def __init__(self) -> None:
        import torch

        torch.set_num_threads(
            int(os.environ.get("TRUNKLINE_THREADS", "1"))
        )  # two contended threads are slower than one
        logging.getLogger("flwr").setLevel(logging.ERROR)
        from trunkline.client.app import app

        self.app = app

    def open(self, context: Context) -> str | None:
        """Read a site before anything starts; the text of what is wrong with it, or None."""
        from trunkline.client.site import open_site

        try:
            open_site(context.node_config)
        except TrunklineError as error:
            return str(error)
        return None

    def answer(self, message: Message, context: Context) -> Message:
        from trunkline.flower import answer

        return answer(self.app, message, context)


class RayGrid(LocalGrid):
    """A Grid over Ray actors.

    Args:
        sites: site folders; node ids follow their order.
        states: the sites' state folders, beside them in order.
        workers: processes; sites are dealt to them in turn.
        address: of a Ray cluster to join; None starts one on this machine.
        gpus: share of a GPU each worker asks Ray for.
    """

    def __init__(
        self,
        sites: Sequence[Path],
        states: Sequence[Path],
        *,
        workers: int,
        address: str | None = None,
        gpus: float = 0.0,
    ) -> None:
        configs: list[Mapping[str, Scalar]] = [
            {"site": str(site.resolve()), "state": str(state.resolve())}
            for site, state in zip(sites, states, strict=True)
        ]
        super().__init__(configs)
        self._started = not ray.is_initialized()
        if self._started:
            _start_ray(address, workers)
        count = max(1, min(workers, len(sites)))
        self._gpus = gpus
        self._workers: list[Any] = [self._worker() for _ in range(count)]
        self._owner = {node: place % count for place, node in enumerate(self.contexts)}
        self._pending: dict[str, tuple[Any, Message, int, Any]] = {}

    def _worker(self) -> Any:
        return Worker.options(num_cpus=1, num_gpus=self._gpus).remote()  # type: ignore[attr-defined]

    def _dispatch(self, message: Message, context: Context) -> None:
        place = self._owner[context.node_id]
        reference = self._workers[place].answer.remote(message, context)
        self._pending[message.metadata.message_id] = (reference, message, place, self._workers[place])

    def _collect(self, message_ids: Sequence[str]) -> list[Message]:
        references = {self._pending[one][0]: one for one in message_ids if one in self._pending}
        if not references:
            return []
        ready, _ = ray.wait(list(references), num_returns=len(references), timeout=0.0)
        return [self._reply(references[reference]) for reference in ready]

    def _reply(self, message_id: str) -> Message:
        reference, message, place, worker = self._pending.pop(message_id)
        try:
            reply: Message = ray.get(reference)
            return reply
        except ray.exceptions.RayActorError:
            # its sites go on in a new process: what they need is in their vaults. One new process, however many of its
            # sites were waiting for an answer
            if self._workers[place] is worker:
                self._workers[place] = self._worker()
            return error_reply(message, "the worker process died (out of memory?)", code=8)

    def open_sites(self) -> None:
        """Have every worker read its sites, all at once.

        Raises:
            DataError: with the problems of every site that cannot take part. In a simulation all of them are the
                researcher's own, so the text may be read here; a deployed site keeps it to itself.
        """
        waiting = {
            node: self._workers[self._owner[node]].open.remote(context) for node, context in self.contexts.items()
        }
        problems = [text for text in ray.get(list(waiting.values())) if text is not None]
        if problems:
            raise DataError(f"{len(problems)} of {len(waiting)} sites cannot take part.\n" + "\n".join(problems))

    def close(self) -> None:
        """End the workers, and Ray if it was started here."""
        for worker in self._workers:
            ray.kill(worker)
        if self._started:
            ray.shutdown()


def _start_ray(address: str | None, workers: int) -> None:
    # without these Ray warns of its own future defaults and reports usage to its makers
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        if address:
            ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
        else:
            ray.init(
                num_cpus=workers, include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR, object_store_memory=OBJECT_STORE,
                _system_config={"automatic_object_spilling_enabled": True},
            )  # fmt: skip
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise DeploymentError(
            f"Ray could not be {'joined at ' + address if address else 'started'}: {error}"
        ) from error
