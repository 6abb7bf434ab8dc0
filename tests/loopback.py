"""The whole system in one process: real apps, real site folders, real messages; only the network is a call."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from flwr.app import Context, Message, RecordDict

from trunkline.client.app import app as client_app
from trunkline.client.policy.egress import EgressFilter
from trunkline.config.run import parse_run
from trunkline.flower.grid import LoopbackGrid
from trunkline.flower.records import open_records
from trunkline.models.tasks import describe_tasks
from trunkline.protocol.arrays import Arrays
from trunkline.runtime.progress import EVENTS
from trunkline.server.app import app as server_app
from trunkline.server.reporting.report import read_report
from trunkline.server.rounds.checkpoint import Checkpoint

Tamper = Callable[[Message, Callable[[], Message]], Message | None]
QUICK: dict[str, Any] = {
    "name": "quick",
    "rounds": 3,
    "seed": 5,
    "trunk": {"width": 16},
    "training": {"steps": 3, "batch_size": 32},
    "report": {"baseline": False},
    "cohort": {"min_sites": 1, "deadline_s": 20.0, "gather_s": 20.0},
}


class WatchedGrid(LoopbackGrid):
    """Loopback that records every message both ways, and lets one node lie.

    Args:
        tamper: node id -> function of (message, honest answer on demand) that gives the reply instead; None: silence.
        plant: the sites are real plants, whose replies go through their egress filter, whatever made them.
    """

    def __init__(
        self, folders: list[Path], out: Path, tamper: Mapping[int, Tamper] | None = None, plant: bool = False
    ) -> None:
        configs = [{"site": str(folder), "state": str(out / "state" / folder.name)} for folder in folders]
        super().__init__(client_app, [{**config, "plant": 1} for config in configs] if plant else configs)
        self.filters: dict[int, EgressFilter] = {}
        if plant:
            self.filters = {
                node: EgressFilter(Path(config["site"]), Path(config["state"]), "the test's centre", describe_tasks)
                for node, config in zip(self.contexts, configs, strict=True)
            }
        self.tamper = tamper or {}
        self.down: list[tuple[str, int, RecordDict]] = []
        self.up: list[tuple[str, int, RecordDict]] = []

    def _dispatch(self, message: Message, context: Context) -> None:
        kind, node = message.metadata.message_type, context.node_id
        self.down.append((kind, node, message.content))
        lie = self.tamper.get(node)

        def honest() -> Message:
            LoopbackGrid._dispatch(self, message, context)
            return self._answers.pop(message.metadata.message_id)

        reply = lie(message, honest) if lie else honest()
        if reply is not None:
            if node in self.filters:
                reply = self.filters[node].check(message, reply)
            self._answers[message.metadata.message_id] = reply
            if not reply.has_error():
                self.up.append((kind, node, reply.content))


def federate(
    folders: list[Path],
    out: Path,
    *,
    tamper: Mapping[int, Tamper] | None = None,
    resume: bool = False,
    grid: WatchedGrid | None = None,
    plant: bool = False,
    page: bool = False,
    centre: Path | None = None,
    **settings: Any,
) -> WatchedGrid:
    """One whole run through the ServerApp; raises what it raises.

    Args:
        page: draw report.html too, whose plots take a third of a small run.
        centre: its state folder, whose key signs the release.
    """
    torch.set_num_threads(1)
    table = {**QUICK, **settings}
    parse_run(dict(table), "test")
    grid = grid or WatchedGrid(folders, out, tamper, plant)
    config = {
        "run-toml": json.dumps(table),
        "out": str(out),
        "resume": int(resume),
        "state": str(centre or ""),
        "page": int(page),
    }
    context = Context(run_id=1, node_id=1, node_config={}, state=RecordDict(), run_config=config)
    server_app(grid=grid, context=context)
    return grid


def trunk_of(out: Path) -> Arrays:
    found = Checkpoint(out).load()
    assert found is not None
    return found[0].trunk


def events_of(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / EVENTS).read_text().splitlines()]


def refusals_of(out: Path) -> dict[int, dict[str, str]]:
    """round -> site -> cause."""
    return {
        one["round"]: {refusal["site"]: refusal["cause"] for refusal in one["refused"]}
        for one in read_report(out)["rounds"]
    }


def arrays_in(content: RecordDict) -> dict[str, np.ndarray]:
    return open_records(content)[0]
