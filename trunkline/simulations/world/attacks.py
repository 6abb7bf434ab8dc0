"""What Byzantine sites send instead of their update."""

import json
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from flwr.app import RecordDict
from numpy.typing import NDArray

from trunkline.flower.records import to_records
from trunkline.protocol.arrays import seed_of
from trunkline.protocol.messages import TrainRequest
from trunkline.server.rounds.admission import LARGEST_CHANGE

LARGEST_ATTACK = 0.9 * LARGEST_CHANGE  # an attack that admission refuses would test admission, and not the strategy
Deltas = dict[str, NDArray[Any]]


def _flip(deltas: Deltas, draws: np.random.Generator) -> Deltas:
    return {name: -array for name, array in deltas.items()}


def _hundredfold(deltas: Deltas, draws: np.random.Generator) -> Deltas:
    return {
        name: np.clip(-100.0 * array, -LARGEST_ATTACK, LARGEST_ATTACK).astype(array.dtype)
        for name, array in deltas.items()
    }


def _random(deltas: Deltas, draws: np.random.Generator) -> Deltas:
    return {name: draws.normal(size=array.shape).astype(array.dtype) for name, array in deltas.items()}


ATTACKS: Mapping[str, Callable[[Deltas, np.random.Generator], Deltas]] = {
    "sign-flip": _flip,
    "scale": _hundredfold,
    "random": _random,
}


def byzantine_reply(
    request: TrainRequest, attack: str, site: str, deltas: Deltas, header: dict[str, Any], metrics: Mapping[str, float]
) -> RecordDict:
    """The content that a Byzantine site sends in the place of its update.

    Args:
        request: the one that it answers.
        attack: a key of `ATTACKS`.
        site: its name.
        deltas: its honest update, parameter name -> array of the parameter's shape.
        header: of its honest reply.
        metrics: of its honest reply, sent unchanged.
    """
    draws = np.random.default_rng(seed_of(request.seed, "world", site, request.round, "lie"))
    if attack == "sign-flip":  # alone it would only slow a mean down, so it also claims all the weight there is
        header = {**header, "weight": float(request.weight_cap)}
    return to_records(ATTACKS[attack](deltas, draws), json.dumps(header), metrics)
