"""What a process does for its simulated sites, with Ray and without: open their folders, answer their messages.

A Ray worker imports this module when it starts, so nothing here imports torch before the first site is opened.
"""

import os
import time
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path

from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from trunkline.errors import DataError, TrunklineError
from trunkline.flower.errors import CRASHED, answer, error_reply
from trunkline.flower.grid import Scalar


class SiteHost:
    """One process, one torch thread, any number of sites. Their vaults are the only state that outlives it.

    Args:
        where: a description of the process, for the texts of errors.
    """

    def __init__(self, where: str) -> None:
        self.where = where

    @cached_property
    def app(self) -> ClientApp:
        """The ClientApp of the package; its first use imports torch."""
        import torch

        torch.set_num_threads(
            int(os.environ.get("TRUNKLINE_THREADS", "1"))
        )  # two contended threads are slower than one
        from trunkline.client.app import app

        return app

    def open(self, context: Context) -> tuple[str | None, float]:
        """Read a site before anything starts: the text of its problem, or None; and the seconds that reading took."""
        assert self.app is not None  # imported before the clock starts: its seconds are none of this site's
        from trunkline.client.site import open_site

        start = time.perf_counter()
        try:
            open_site(context.node_config)
        except TrunklineError as error:
            return str(error), time.perf_counter() - start
        return None, time.perf_counter() - start

    def answer(self, message: Message, context: Context) -> Message:
        """The site's reply to `message`; if its folder is gone, an error reply that says where it was expected."""
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
    """Raise DataError with the problems of every site that cannot take part.

    In a simulation all sites are the researcher's own, so the text may be read here; a deployed site keeps it to itself.
    """
    if texts := [text for text in problems if text is not None]:
        raise DataError(f"{len(texts)} of {len(problems)} sites cannot take part.\n" + "\n".join(texts))
