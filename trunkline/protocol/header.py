"""Reading the header of a message, and what its errors report."""

import json
from typing import Literal, TypeVar

from pydantic import BaseModel, ValidationError

import trunkline
from trunkline.errors import ContractError
from trunkline.protocol.messages import PROTOCOL

Header = TypeVar("Header", bound=BaseModel)
Side = Literal["server", "site"]
UPDATE = "Update Trunkline at the {}"


def read_header(kind: type[Header], text: str, side: Side) -> Header:
    """A header from the wire.

    Two Trunklines that do not understand each other are told apart by who is older: the one that speaks the lower protocol,
    does not know a key, or left one out. That one has to be updated.

    Args:
        side: who reads it. The other side's version is told where its header has one (`Offer.version`); what it was when the
            run began is not taken for it, because it may have been updated since.

    Raises:
        ContractError: it cannot be understood; the text says which side has to be updated, or what else is wrong.
    """
    other: Side = "site" if side == "server" else "server"
    try:
        told = json.loads(text)
        protocol = told.get("protocol", PROTOCOL)
        said = told.get("version", "")
    except (ValueError, AttributeError, RecursionError):
        raise ContractError(f"its header is no JSON object, so the {other} is no Trunkline of ours") from None
    version = _shown(said) if isinstance(said, str) else ""

    def update(older: Side, why: str) -> ContractError:
        there, here = (
            f"the {other}'s Trunkline{' ' + version if version else ''}",
            f"the {side}'s Trunkline {trunkline.__version__}",
        )
        names = f"{here if older == side else there} is older than {there if older == side else here}"
        to = trunkline.__version__ if older == other else version
        return ContractError(f"{why}: {names}. {UPDATE.format(older)}{f' to {to}' if to else ''}")

    if type(protocol) is int and protocol != PROTOCOL:
        why = f"it speaks protocol {protocol}, and here {PROTOCOL} is spoken"
        raise update(side if protocol > PROTOCOL else other, why)
    try:
        return kind.model_validate_json(text)
    except ValidationError as error:
        problems = error.errors(include_input=False)
        first = next((one for one in problems if one["type"] not in ("extra_forbidden", "missing")), problems[0])
        key = _shown(".".join(map(str, first["loc"]))) or "header"
        if first["type"] == "extra_forbidden":
            raise update(side, f"its header has a key `{key}` that is not known here") from None
        if first["type"] == "missing":
            raise update(other, f"its header has no key `{key}`") from None
        raise ContractError(
            f"`{key}`: {first['msg']}. Both sides speak protocol {PROTOCOL}, so one of the two is no Trunkline of ours: install it again"
        ) from None


def _shown(text: str) -> str:
    """Words of the other side as they may stand in a log."""
    return "".join(sign if sign.isprintable() else "?" for sign in text[:64])
