"""Many sites on Ray, with the ClientApp and ServerApp that are deployed: only the Grid differs.

Each worker process owns a share of the sites, so a site's rows are read once and stay where they are. A site's state lies
in its vault on disk, so another worker can go on with it at any time: after a worker or a whole node has died, or when
one has nothing left to do before a round ends. Which worker answers changes no byte of an answer.
"""

import pickle
from collections.abc import Callable, Iterable, Sequence
from collections.abc import Set as AbstractSet
from pathlib import Path
from typing import Any

import ray
from flwr.app import Context, Message

from trunkline.flower.grid import LocalGrid, stamp
from trunkline.simulations.ray.cluster import start_ray, start_workers
from trunkline.simulations.ray.scheduler import Job, Scheduler
from trunkline.simulations.ray.serialization import Buffer, ContentStore
from trunkline.simulations.ray.site_host import SiteHost, check_opened, node_configs
from trunkline.simulations.vectorized.driver import VectorizedDriver


class RayGrid(LocalGrid):
    """A Grid over Ray actors.

    Args:
        sites: site folders; node ids follow their order. On a cluster they, and the states, lie on storage that all its
            nodes have at the same path.
        states: the sites' state folders, in the same order.
        workers: processes; None: one for every CPU of the cluster. Never more than sites.
        address: of a Ray cluster to join; None starts one on this machine.
        site_host: makes what a worker opens and answers its sites with.

    Raises:
        DeploymentError: Ray cannot be started or joined.
    """

    waits = True

    def __init__(
        self,
        sites: Sequence[Path],
        states: Sequence[Path],
        *,
        workers: int | None,
        address: str | None = None,
        site_host: Callable[[str], Any] = SiteHost,
    ) -> None:
        super().__init__(node_configs(sites, states))
        self._started = not ray.is_initialized()
        if self._started:
            start_ray(address, workers)
        file_bytes = {node: _bytes_in(site) for node, site in zip(self.contexts, sites, strict=True)}
        self.scheduler = Scheduler(self.contexts, file_bytes, start_workers(workers, len(sites), site_host))
        self.contents = ContentStore(_put)
        self._vectorized = VectorizedDriver(self.scheduler)

    def get_node_ids(self) -> list[int]:
        """Longest first: a long site that starts last is what a round would wait for."""
        return self.scheduler.workload.longest_first(self.contexts)

    def room(self) -> bool:
        return self.scheduler.has_room()

    def _dispatch(self, message: Message, context: Context) -> None:
        body, arrays, new = self.contents.pack(message.content)
        metadata = message.metadata
        job = Job(
            metadata.message_id, context.node_id, metadata.message_type, metadata.group_id, pickle.dumps(metadata, 5), body,
            arrays, first=new,
        )  # fmt: skip
        answering_id = self.scheduler.submit(job)
        if answering_id != metadata.message_id:
            stamp(message, answering_id)

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        """The replies of at most one group, so that no more than that is ever held here; waits a moment for the first."""
        return super().pull_messages(message_ids)

    def _collect(self, message_ids: AbstractSet[str]) -> list[Message]:
        return self.scheduler.take_replies(message_ids)

    # ---- many sites at once

    @property
    def stacks(self) -> VectorizedDriver:
        return self._vectorized

    # ---- a run

    def open_sites(self) -> None:
        """Have every worker read its sites, all at once.

        Raises:
            DataError: with the problems of every site that cannot take part.
            DeploymentError: a worker cannot start, has other versions than this process, or dies while it reads.
        """
        check_opened(self.scheduler.open_sites())

    def close(self) -> None:
        """End the workers, and Ray if it was started here."""
        self.scheduler.close()
        if self._started:
            ray.shutdown()


def _put(buffers: list[Buffer]) -> tuple[Any, list[Buffer]]:
    reference = ray.put(buffers)
    return reference, ray.get(reference)


def _bytes_in(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file() and ".trunkline" not in path.parts)
