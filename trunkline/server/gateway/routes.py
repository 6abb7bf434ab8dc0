"""The paths that a server answers from outside: for whom, and how large a body may be."""

import os
from dataclasses import dataclass
from pathlib import Path

from trunkline.errors import DeploymentError
from trunkline.security.enrolment import AUTHORITY_PATH, HELLO_PATH, JOIN_PATH, LIMIT, RENEW_PATH

PORT = 9140  # that a server listens on unless it is started with another
SOCKET = "registrar.sock"  # in the server's state folder
SOCKET_LIMIT = 100  # bytes of its path: the system allows 107
# headers in which the gateway (or nginx) describes a verified caller to the registrar; both drop them from outside
CERTIFICATE = "x-trunkline-certificate"  # base64 of the DER of the caller's certificate
CERTIFICATE_PEM = "x-trunkline-certificate-pem"  # the same as escaped PEM: nginx cannot write base64 of DER
PEER = "x-trunkline-peer"  # ip:port
FLEET = tuple(
    f"/v1/fleet/{name}"
    for name in (
        *("activate-node", "deactivate-node", "send-node-heartbeat", "pull-messages", "push-messages", "get-run"),
        *("get-fab", "push-object", "pull-object", "confirm-message-received"),
    )
)
# what Flower 1.41's FleetHttpClient and its two interceptors send and its SuperLink reads
FORWARDED = (
    *(b"content-type", b"content-encoding", b"accept", b"accept-encoding"),
    *(b"flwr-public-key", b"flwr-timestamp", b"flwr-signature"),
    *(b"flwr-package-name", b"flwr-package-version", b"flwr-component-name"),
)
RETURNED = (
    *(b"content-type", b"content-encoding", b"date", b"retry-after", b"www-authenticate"),
    b"flwr-version-incompatibility-message",
)


def socket_path(state: Path) -> Path:
    """Where the registrar listens.

    Raises:
        DeploymentError: the folder's path is too long for a Unix socket.
    """
    path = state / SOCKET
    if (size := len(os.fsencode(path))) > SOCKET_LIMIT:
        raise DeploymentError(
            f"{path}: too long for a unix socket ({size} bytes, at most {SOCKET_LIMIT}). Move the state folder to a shorter path."
        )
    return path


@dataclass(frozen=True)
class Route:
    """Which callers may use a path, and which process answers.

    Args:
        site, invited: whether a certificate, or an invitation, may use it.
        registrar: the registrar answers; otherwise the SuperLink.
        body: bytes of the largest one. signed: Flower's identity headers are part of it.
    """

    method: str
    site: bool
    invited: bool
    registrar: bool
    body: int
    signed: bool = False


@dataclass(frozen=True)
class Limits:
    """Limits on what one caller, or all of them, may use; names that end in `_s` are in seconds."""

    connections: int = 1000
    per_host: int = 64
    body: int = 32 << 20  # Flower sends arrays in chunks of 5 MiB
    head: int = 32 << 10
    handshake_s: float = 10.0
    head_s: float = 30.0
    idle_s: float = 120.0  # between two requests
    body_s: float = 60.0  # without a byte of a body, either way
    answer_s: float = 120.0  # for the SuperLink to begin its answer
    linger_s: float = 2.0
    sweep_s: float = 10.0  # a revoked site's idle connection is closed at the next sweep
    quiet_s: float = 1.0  # between two lines of one sort about one peer
    full_s: float = 60.0  # between two lines about connections that were not taken


def make_routes(limits: Limits) -> dict[str, Route]:
    """Path -> route. A path that is not a key does not exist."""
    fleet = Route("POST", site=True, invited=False, registrar=False, body=limits.body, signed=True)
    return {
        **dict.fromkeys(FLEET, fleet),
        "/health": Route("GET", site=True, invited=False, registrar=False, body=0),
        AUTHORITY_PATH: Route("GET", site=True, invited=True, registrar=True, body=0),
        JOIN_PATH: Route("POST", site=False, invited=True, registrar=True, body=LIMIT),
        RENEW_PATH: Route("POST", site=True, invited=False, registrar=True, body=LIMIT),
        HELLO_PATH: Route("GET", site=True, invited=False, registrar=True, body=0),
    }
