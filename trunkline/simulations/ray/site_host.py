"""What a process does for its simulated sites, with Ray and without: open their folders, answer their messages."""

import logging
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from flwr.app import Context, Message

from trunkline.errors import DataError, TrunklineError
from trunkline.flower.errors import CRASHED, answer, error_reply
from trunkline.flower.grid import LoopbackGrid, Scalar
from trunkline.protocol.arrays import Arrays
from trunkline.protocol.messages import RoundRequest
from trunkline.simulations.vectorized.worker import Alone, Part


class Desk:
    """One process, one torch thread, any number of sites. Their vaults are the only state that outlives it.

    Args:
        where: the process, in words for an error.
    """

    def __init__(self, where: str) -> None:
        import torch

        torch.set_num_threads(
            int(os.environ.get("TRUNKLINE_THREADS", "1"))
        )  # two contended threads are slower than one
        from trunkline.client.app import app

        self.app = app
        self.where = where

    def open(self, context: Context) -> tuple[str | None, float]:
        """Read a site before anything starts: the text of what is wrong with it, or None; and the seconds that took."""
        from trunkline.client.site import open_site

        began = time.perf_counter()
        try:
            open_site(context.node_config)
        except TrunklineError as error:
            return str(error), time.perf_counter() - began
        return None, time.perf_counter() - began

    def answer(self, message: Message, context: Context) -> Message:
        folder = Path(str(context.node_config["site"]))
        if not folder.is_dir():  # its rows may still be in memory, but what a round needs next may not
            return error_reply(
                message,
                f"{folder.name}: its folder {folder} is gone; {self.where} looked for it there. Put it back, or on a cluster mount it "
                "there too; until then the round goes on without this site.",
                code=CRASHED,
            )
        return answer(self.app, message, context)


def node_configs(sites: Sequence[Path], states: Sequence[Path]) -> list[Mapping[str, Scalar]]:
    """What `--node-config` is in deployment, one a site."""
    return [
        {"site": str(site.resolve()), "state": str(state.resolve())} for site, state in zip(sites, states, strict=True)
    ]


def check_opened(problems: Sequence[str | None]) -> None:
    """Raises DataError with the problems of every site that cannot take part.

    In a simulation all of them are the researcher's own, so the text may be read here; a deployed site keeps it to itself.
    """
    if told := [text for text in problems if text is not None]:
        raise DataError(f"{len(told)} of {len(problems)} sites cannot take part.\n" + "\n".join(told))


class DeskGrid(LoopbackGrid):
    """`--workers 0`: every site in this process, one after the other, without Ray."""

    def __init__(self, sites: Sequence[Path], states: Sequence[Path]) -> None:
        logging.getLogger("flwr").setLevel(logging.ERROR)
        self._desk = Desk("this process")
        super().__init__(self._desk.app, node_configs(sites, states))
        self._alone = Alone({node: context.node_config for node, context in self.contexts.items()})

    def together(self, request: RoundRequest, arrays: Arrays, nodes: Sequence[int]) -> Iterator[Part]:
        """A round of the sites that can be trained in stacks; the others are to be asked singly."""
        return self._alone.together(request, arrays, nodes)

    def flush(self) -> None:
        """What sites have in memory goes to their vaults."""
        self._alone.flush()

    @property
    def holding(self) -> bool:
        return self._alone.holding

    def _dispatch(self, message: Message, context: Context) -> None:
        self._answers[message.metadata.message_id] = self._desk.answer(message, context)

    def open_sites(self) -> None:
        """Read every site. Raises DataError with what is wrong with those that cannot take part."""
        check_opened([self._desk.open(context)[0] for context in self.contexts.values()])

    def close(self) -> None:
        """Nothing runs beside this process."""
