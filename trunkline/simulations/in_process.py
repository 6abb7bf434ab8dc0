"""`--workers 0`: every site in this process, one after the other, without Ray."""

import logging
from collections.abc import Sequence
from pathlib import Path

from flwr.app import Context, Message

from trunkline.flower.grid import LoopbackGrid
from trunkline.simulations.ray.site_host import SiteHost, check_opened, node_configs
from trunkline.simulations.vectorized.worker import InProcess


class InProcessGrid(LoopbackGrid):
    """A Grid whose sites all live in this process.

    Args:
        sites: site folders; node ids follow their order.
        states: the sites' state folders, in the same order.
    """

    def __init__(self, sites: Sequence[Path], states: Sequence[Path]) -> None:
        logging.getLogger("flwr").setLevel(logging.ERROR)
        self._site_host = SiteHost("this process")
        super().__init__(self._site_host.app, node_configs(sites, states))
        self._vectorized = InProcess({node: context.node_config for node, context in self.contexts.items()})

    @property
    def stacks(self) -> InProcess:
        return self._vectorized

    def _dispatch(self, message: Message, context: Context) -> None:
        self._answers[message.metadata.message_id] = self._site_host.answer(message, context)

    def open_sites(self) -> None:
        """Read every site. Raises DataError with the problems of those that cannot take part."""
        check_opened([self._site_host.open(context)[0] for context in self.contexts.values()])

    def close(self) -> None:
        """Nothing to end: no other process runs."""
