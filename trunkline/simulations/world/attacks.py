"""What Byzantine sites send instead of their update."""

import json
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from flwr.app import RecordDict
from numpy.typing import NDArray

from trunkline.flower.records import to_records
from trunkline.protocol.arrays import seed_of
from trunkline.protocol.messages import RoundRequest
from trunkline.server.rounds.admission import LARGEST_CHANGE

LIE_MOST = 0.9 * LARGEST_CHANGE  # a lie that intake refuses would test intake, and not the strategy
Deltas = dict[str, NDArray[Any]]


def _flip(deltas: Deltas, draw: np.random.Generator) -> Deltas:
    return {name: -array for name, array in deltas.items()}


def _hundredfold(deltas: Deltas, draw: np.random.Generator) -> Deltas:
    return {name: np.clip(-100.0 * array, -LIE_MOST, LIE_MOST).astype(array.dtype) for name, array in deltas.items()}


def _random(deltas: Deltas, draw: np.random.Generator) -> Deltas:
    return {name: draw.normal(size=array.shape).astype(array.dtype) for name, array in deltas.items()}


LIES: Mapping[str, Callable[[Deltas, np.random.Generator], Deltas]] = {
    "sign-flip": _flip,
    "scale": _hundredfold,
    "random": _random,
}


def lied(
    order: RoundRequest, lie: str, site: str, deltas: Deltas, header: dict[str, Any], metrics: Mapping[str, float]
) -> RecordDict:
    draw = np.random.default_rng(seed_of(order.seed, "world", site, order.round, "lie"))
    if (
        lie == "sign-flip"
    ):  # alone it would only slow a mean down, so who lies this way also claims all the weight there is
        header["weight"] = float(order.weight_cap)
    return to_records(LIES[lie](deltas, draw), json.dumps(header), metrics)
