"""Reading the header of a message, and what its errors report."""

import json
from typing import Any, Literal, TypeVar

from pydantic import BaseModel, ValidationError

import trunkline
from trunkline.errors import ContractError
from trunkline.protocol.messages import PROTOCOL, REQUESTS, Request

Header = TypeVar("Header", bound=BaseModel)
Side = Literal["server", "site"]
UPDATE = "Update Trunkline at the {}"


def read_header(kind: type[Header], text: str, side: Side) -> Header:
    """A header from the wire.

    The side that knows a field the other does not is newer; so is the side that expects a field the other did not send.
    The protocol numbers are compared before any field. The older side has to be updated.

    Args:
        side: who reads it. The error names the other side's version where its header has one (`Offer.version`). The
            version of the run's beginning is not used, because the other side may have been updated since.

    Raises:
        ContractError: it cannot be understood; the text says which side has to be updated, or what else is wrong.
    """
    other = _other(side)
    header = _compare_protocol(text, side)
    try:
        return kind.model_validate_json(text)
    except ValidationError as error:
        problems = error.errors(include_input=False)
        first = next(
            (problem for problem in problems if problem["type"] not in ("extra_forbidden", "missing")), problems[0]
        )
        key = _shown(".".join(map(str, first["loc"]))) or "header"
        if first["type"] == "extra_forbidden":
            raise _update(side, side, header, f"its header has a key `{key}` that is not known here") from None
        if first["type"] == "missing":
            raise _update(other, side, header, f"its header has no key `{key}`") from None
        raise ContractError(
            f"`{key}`: {first['msg']}. Both sides speak protocol {PROTOCOL}, so one of the two is no Trunkline of ours: install it again"
        ) from None


def read_request(text: str) -> Request:
    """The server's request as its own kind, at a site. Raises ContractError as `read_header` does."""
    header = _compare_protocol(text, "site")
    if "kind" not in header:
        raise _update("server", "site", header, "its header has no key `kind`")
    kind = str(header["kind"])
    if kind not in REQUESTS:
        raise _update("site", "site", header, f"its header asks for `{_shown(kind)}`, which is not known here")
    request: Any = read_header(REQUESTS[kind], text, "site")
    return request  # type: ignore[no-any-return]


def _compare_protocol(text: str, side: Side) -> dict[str, Any]:
    """The header as JSON has it. Raises ContractError where it is no object, or of another protocol."""
    try:
        header = json.loads(text)
        protocol = header.get("protocol", PROTOCOL)
    except (ValueError, AttributeError, RecursionError):
        raise ContractError(f"its header is no JSON object, so the {_other(side)} is no Trunkline of ours") from None
    if type(protocol) is int and protocol != PROTOCOL:
        older = side if protocol > PROTOCOL else _other(side)
        raise _update(older, side, header, f"it speaks protocol {protocol}, and here {PROTOCOL} is spoken")
    return dict(header)


def _update(older: Side, side: Side, header: dict[str, Any], cause: str) -> ContractError:
    """The error of the side that reads, which names the older of the two."""
    other, reported = _other(side), header.get("version", "")
    version = _shown(reported) if isinstance(reported, str) else ""
    theirs = f"the {other}'s Trunkline{' ' + version if version else ''}"
    ours = f"the {side}'s Trunkline {trunkline.__version__}"
    names = f"{ours} is older than {theirs}" if older == side else f"{theirs} is older than {ours}"
    to = trunkline.__version__ if older == other else version
    return ContractError(f"{cause}: {names}. {UPDATE.format(older)}{f' to {to}' if to else ''}")


def _other(side: Side) -> Side:
    return "site" if side == "server" else "server"


def _shown(text: str) -> str:
    """Words of the other side as they may stand in a log."""
    return "".join(sign if sign.isprintable() else "?" for sign in text[:64])
