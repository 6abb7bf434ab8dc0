"""Requests of one kind made from those of another."""

from typing import Any, TypeVar

from trunkline.protocol.messages import OfferRequest, RoundRequest, TrainRequest

Kind = TypeVar("Kind", bound=RoundRequest)


def as_kind(kind: type[Kind], request: RoundRequest, **changes: Any) -> Kind:
    """A request of this kind with the terms, and what else it has in common, of another. `changes` are not checked."""
    shared = {name: getattr(request, name) for name in kind.model_fields if name != "kind" and hasattr(request, name)}
    if kind is OfferRequest:
        shared["round"] = 0
    return kind(**shared).model_copy(update=changes)


def request_of(round: int, **terms: Any) -> Any:
    """The request of a round of training; of round 0, which asks for an offer."""
    return OfferRequest(**terms) if round == 0 else TrainRequest(round=round, **terms)
