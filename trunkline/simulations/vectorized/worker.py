"""A round of many sites at once: each process trains its own in stacks and sends one sum.

A message a site costs more than a small network's training, so in a simulation sites of equal kind (`sites.kind_of`) get
one request together. Their updates are checked and added where they are, in the exact sum the server uses, and their state
stays in memory until a checkpoint asks for it. Sites that fit no stack are left out of it and get their own message.
"""

import gc
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from trunkline.client.site import Site, open_site
from trunkline.protocol.arrays import Arrays
from trunkline.protocol.messages import TrainRequest
from trunkline.server.rounds.admission import LARGEST_CHANGE
from trunkline.simulations.vectorized.eligibility import Kind, kind_of
from trunkline.simulations.vectorized.sites import StackResult, VectorizedSites
from trunkline.strategies.exact_sum import largest_of
from trunkline.strategies.streaming import Streamed

FEWEST = 8  # sites of a kind below which a process trains them alone, byte for byte as at a plant
SWITCH = "TRUNKLINE_BATCH"  # "0" in the environment: every site alone


@dataclass(frozen=True)
class PartialRound:
    """What some sites of one process came to in one round.

    Args:
        total: the sum of their updates.
        metrics: node -> what it reports of the round, for each site in `total`.
        problems: node -> why its update is not in `total`.
    """

    total: Streamed
    metrics: dict[int, dict[str, float]] = field(default_factory=dict)
    problems: dict[int, str] = field(default_factory=dict)


def wanted() -> bool:
    return os.environ.get(SWITCH, "1") != "0"


class VectorizedWorker:
    """The sites of one process, by what can be trained together.

    Args:
        nodes: node id -> its `node_config`; all sites of this process.
    """

    def __init__(self, nodes: Mapping[int, Mapping[str, object]]) -> None:
        self.nodes = dict(nodes)
        self.pass_of: tuple[str, int] | None = None
        self.groups: list[VectorizedSites] = []
        self.group_of: dict[int, tuple[VectorizedSites, str]] = {}  # node -> its group, and its name in it

    def begin(self, request: TrainRequest) -> list[int]:
        """Load the groups for a pass of a run from what the vaults hold before `request`; returns the nodes in a group.

        Raises:
            StorageError: a vault cannot be read.
        """
        self.flush()
        self.pass_of, self.groups, self.group_of = (request.run, request.passed), [], {}
        kinds: dict[Kind, list[tuple[int, Site]]] = {}
        for node, config in self.nodes.items():
            site = open_site(config)
            kind = kind_of(site, request)
            if kind is not None:
                kinds.setdefault(kind, []).append((node, site))
            else:
                site.forget()
        for members in kinds.values():
            if len(members) < FEWEST:
                continue
            group = VectorizedSites([site for _, site in members], request)
            self.groups.append(group)
            self.group_of |= {node: (group, site.name) for node, site in members}
        gc.collect()
        gc.freeze()  # hundreds of sites are here for good: no need to look through them again at every collection
        return list(self.group_of)

    def answer(self, request: TrainRequest, arrays: Arrays, nodes: Sequence[int]) -> PartialRound:
        """One round of these nodes, all of them in a group."""
        round = PartialRound(Streamed())
        for group in self.groups:
            node_of = {self.group_of[node][1]: node for node in nodes if self.group_of[node][0] is group}
            if node_of:
                for stack in group.answer(list(node_of), request, arrays.only(group.lent)):
                    _admit(stack, request, node_of, round)
        return round

    def flush(self) -> None:
        """Every site's state into its vault."""
        for group in self.groups:
            group.flush()


def _admit(stack: StackResult, request: TrainRequest, node_of: Mapping[str, int], round: PartialRound) -> None:
    """Add the updates of a stack to `round`, but for those that the server would refuse."""
    largest = {name: largest_of(rows) for name, rows in stack.changes.items()}
    most = np.max(list(largest.values()), axis=0) if largest else np.zeros(len(stack.names))  # (sites,)
    good = []
    for row, (name, result) in enumerate(zip(stack.names, stack.results, strict=True)):
        if problem := _objection(float(most[row]), result.metrics):
            round.problems[node_of[name]] = problem
        else:
            good.append(row)
            round.metrics[node_of[name]] = result.metrics
    if not good:
        return
    changes = stack.changes
    if len(good) < len(stack.names):
        changes, largest = ({name: rows[good] for name, rows in arrays.items()} for arrays in (changes, largest))
    weights = np.array([stack.results[row].weight for row in good])
    metrics = [stack.results[row].metrics for row in good]
    round.total.add_stack(request.run, request.round, changes, weights, metrics, largest)


def _objection(largest: float, metrics: Mapping[str, float]) -> str:
    """Why `server.rounds.admission.admit` would refuse an update; "" where it would not."""
    if not np.isfinite(largest):
        return "it holds NaN or infinity. Look at the site's learning rate and its `trunkline check`"
    if largest > LARGEST_CHANGE:
        return f"a lent array changes by {largest:.3g} in one round; allowed is {LARGEST_CHANGE:g}. Lower the learning rate"
    for name, value in metrics.items():
        if not np.isfinite(value):
            return f"metric `{name}` is {value}. Look at the site's learning rate and its `trunkline check`"
    return ""


class InProcess:
    """The vectorized sites of a simulation without workers: in this process.

    Args:
        nodes: as of `VectorizedWorker`.
    """

    def __init__(self, nodes: Mapping[int, Mapping[str, object]]) -> None:
        self.worker = VectorizedWorker(nodes)

    def answer(self, request: TrainRequest, arrays: Arrays, nodes: Sequence[int]) -> Iterator[PartialRound]:
        """Parts of a round, one after the other; nodes that are in none are to be asked singly."""
        if not wanted():
            return
        if self.worker.pass_of != (request.run, request.passed):
            self.worker.begin(request)
        mine = [node for node in nodes if node in self.worker.group_of]
        for start in range(0, len(mine), 256):
            yield self.worker.answer(request, arrays, mine[start : start + 256])

    @property
    def holding(self) -> bool:
        return bool(self.worker.groups)

    def flush(self) -> None:
        self.worker.flush()
