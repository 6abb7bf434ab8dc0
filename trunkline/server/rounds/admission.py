"""Replies -> admitted Updates, or a refusal that names its site. Nothing a site sends is trusted before it passed here."""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import TypeVar

import numpy as np
from pydantic import BaseModel

from trunkline.errors import ContractError, Refused
from trunkline.privacy.guards import Settings, at_server, at_sum, guards_of
from trunkline.protocol import header as headers
from trunkline.protocol.arrays import Arrays
from trunkline.protocol.contract import Contract
from trunkline.protocol.messages import FitQuery, Reply, TrainRequest, Update

LARGEST_CHANGE = 1e4  # of one weight in one round; far beyond useful training, far within the exact sum's range

Header = TypeVar("Header", bound=BaseModel)


def read_header(kind: type[Header], text: str, site: str, round: int) -> Header:
    """A wire header, or Refused saying what is wrong with it and which side to update."""
    try:
        return headers.read_header(kind, text, "server")
    except ContractError as error:
        raise Refused(f"{site}, round {round}: reply set aside. {str(error)[0].upper()}{str(error)[1:]}.") from None


def admit(
    site: str,
    contract: Contract,
    request: TrainRequest | FitQuery,
    arrays: Arrays,
    header: str,
    metrics: dict[str, float],
) -> Update:
    """An Update that may enter the sum, or the answer to a FitQuery.

    Args:
        site: the name the server knows this node by, from its Offer.
        contract: this site's allow-list in this run; for a FitQuery `FIT_CONTRACT`.
        request: what was asked.

    Raises:
        Refused: anything at all is not as the contract and the request have it; the text names site, round, cause, remedy.
    """
    reply = read_header(Reply, header, site, request.round)
    try:
        if reply.site != site:
            raise ContractError(
                f"it calls itself {reply.site!r}; the node was enrolled as {site!r}. Two daemons may share one site folder"
            )
        if reply.run != request.run:
            raise ContractError(f"it answers run {reply.run!r}; this is {request.run!r}. Nothing to do: it is late")
        if reply.round != request.round:
            raise ContractError(f"it answers round {reply.round}. Nothing to do: a late reply is never added")
        if reply.contract != request.contract:
            raise ContractError(
                "it was made for another contract. Restart the site's daemon so that it asks for the run anew"
            )
        if not math.isfinite(reply.weight) or not 0 < reply.weight <= request.weight_cap:
            raise ContractError(
                f"its weight is {reply.weight:g}; allowed is more than 0, at most {request.weight_cap} training windows"
            )
        contract.check(arrays, metrics)
        for name, array in arrays.items():
            largest = float(np.max(np.abs(array), initial=0.0))
            if not math.isfinite(largest):
                raise ContractError(
                    f"`{name}` holds NaN or infinity. Look at the site's learning rate and its `trunkline check`"
                )
            if largest > LARGEST_CHANGE:
                raise ContractError(
                    f"`{name}` changes by {largest:.3g} in one round; allowed is {LARGEST_CHANGE:g}. Lower the learning rate"
                )
        for name, number in metrics.items():
            if not math.isfinite(number):
                raise ContractError(
                    f"metric `{name}` is {number}. Look at the site's learning rate and its `trunkline check`"
                )
        arrays = at_server(guards_of(request.about.guards), arrays)
    except ContractError as error:
        what = "answer" if isinstance(request, FitQuery) else "update"
        raise Refused(f"{site}, round {request.round}: {what} set aside. {error}.") from None
    return Update(site=site, run=reply.run, round=reply.round, delta=arrays, weight=reply.weight, metrics=metrics)


def finish_sum(guards: Settings, mean: Update, survivors: Sequence[str]) -> Update:
    """The mean of a round as the guards of the run let it move a trunk.

    Args:
        guards: their settings.
        survivors: the sites whose updates are in the mean.
    """
    return replace(mean, delta=at_sum(guards_of(guards), mean.delta, survivors))
