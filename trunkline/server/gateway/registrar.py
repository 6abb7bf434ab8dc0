"""The registrar: the only process of the server that has the authority's key open, behind a Unix socket.

The gateway passes it the plants' requests about certificates, with the verified client certificate in a header; no other
account can reach the socket. The registrar also keeps Flower's SuperLink and the register of sites in step, and renews
the server's certificate in time.

Run as `python -m trunkline.server.gateway.registrar`, by `trunkline server start`.
"""

import argparse
import asyncio
import base64
import binascii
import contextlib
import logging
import os
import socket
import sys
import threading
import urllib.parse
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import TypeVar

import uvicorn
from cryptography import x509
from pydantic import BaseModel, ValidationError
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

import trunkline
from trunkline.errors import DeploymentError, TrunklineError, TrustError
from trunkline.flower.control import list_nodes, register_node, unregister_node
from trunkline.security.enrolment import (
    AUTHORITY_PATH,
    HELLO_PATH,
    JOIN_PATH,
    LIMIT,
    RENEW_PATH,
    AuthorityInfo,
    Hello,
    JoinRequest,
    RenewRequest,
)
from trunkline.security.keys import certificate_pem, key_id, needs_renewal, now, read_certificate
from trunkline.server.gateway.routes import CERTIFICATE, CERTIFICATE_PEM, PEER, socket_path
from trunkline.server.membership import audit_log as audit
from trunkline.server.membership.authority import Authority
from trunkline.server.membership.registry import Book, Enrolled, explain_denial

STEP_S = 1.0  # between two looks at the register: Flower learns of a revoked site within this time
DUE_S = 60.0  # between two looks at the server's certificate

logger = logging.getLogger("trunkline.registrar")
Body = TypeVar("Body", bound=BaseModel)


def build_app(authority: Authority, address: str, ca: bytes) -> Starlette:
    """The registrar as a web application.

    Args:
        address: host:port of the SuperLink on loopback; ca: its certificate, PEM.
    """

    def describe_authority(request: Request) -> Response:
        key = key_id(_certificate(request).public_key())
        book = authority.registry.read()
        invitation, entry = book.invitation(key), book.by_key(key)
        if invitation is None and entry is None:
            raise TrustError(explain_denial(None))
        site = entry.site if entry is not None else invitation.site if invitation is not None else ""
        pem = certificate_pem(authority.certificate).decode()
        return _json(AuthorityInfo(authority=pem, federation=authority.federation.name, site=site))

    def join(request: Request, body: bytes) -> Response:
        admitted = authority.admit(
            _read(JoinRequest, body), key_id(_certificate(request).public_key()), request.headers.get(PEER, "")
        )
        logger.info("%s enrolled, from %s", admitted.site, request.headers.get(PEER, "unknown"))
        with contextlib.suppress(DeploymentError):  # a SuperLink that is just starting learns of it at the next step
            reconcile(authority, address, ca)
        return _json(admitted)

    def renew(request: Request, body: bytes) -> Response:
        admitted = authority.renew(_read(RenewRequest, body).request, key_id(_certificate(request).public_key()))
        logger.info("%s has another certificate", admitted.site)
        return _json(admitted)

    def hello(request: Request) -> Response:
        entry = authority.registry.read().by_key(key_id(_certificate(request).public_key()))
        if entry is None or entry.revoked:
            raise TrustError(explain_denial(entry))
        stamp = now().isoformat(timespec="milliseconds")
        return _json(Hello(site=entry.site, now=stamp, until=entry.until, version=trunkline.__version__))

    return Starlette(
        routes=[
            Route(AUTHORITY_PATH, _get_endpoint(describe_authority), methods=["GET"]),
            Route(HELLO_PATH, _get_endpoint(hello), methods=["GET"]),
            Route(JOIN_PATH, _post_endpoint(join), methods=["POST"]),
            Route(RENEW_PATH, _post_endpoint(renew), methods=["POST"]),
        ],
        lifespan=lambda app: _keep_in_step(authority, address, ca),
    )


def _get_endpoint(answer: Callable[[Request], Response]) -> Callable[[Request], Awaitable[Response]]:
    async def endpoint(request: Request) -> Response:
        return await asyncio.to_thread(_respond, lambda: answer(request))

    return endpoint


def _post_endpoint(answer: Callable[[Request, bytes], Response]) -> Callable[[Request], Awaitable[Response]]:
    async def endpoint(request: Request) -> Response:
        body = b""
        async for part in request.stream():
            body += part
            if len(body) > LIMIT:
                return JSONResponse({"error": f"the request is larger than {LIMIT} bytes"}, 413)
        return await asyncio.to_thread(_respond, lambda: answer(request, body))

    return endpoint


def _respond(answer: Callable[[], Response]) -> Response:
    try:
        return answer()
    except TrustError as error:  # 401, not 403: a SuperNode takes 403 for a run that has ended
        logger.warning("refused: %s", error)
        return JSONResponse({"error": str(error)}, 401)
    except TrunklineError as error:
        logger.error("%s", error)
        return JSONResponse({"error": "the server cannot do this now; its registrar's log has the reason"}, 503)


def _json(answer: BaseModel) -> Response:
    return Response(answer.model_dump_json(), media_type="application/json")


def _certificate(request: Request) -> x509.Certificate:
    """The client certificate that the gateway, or nginx, has verified."""
    try:
        if (text := request.headers.get(CERTIFICATE)) is not None:
            return x509.load_der_x509_certificate(base64.b64decode(text, validate=True))
        text = urllib.parse.unquote(request.headers.get(CERTIFICATE_PEM, ""))
        return x509.load_pem_x509_certificate(text.encode())
    except (binascii.Error, ValueError):
        raise TrustError("no client certificate came with the request.") from None


def _read(kind: type[Body], body: bytes) -> Body:
    try:
        return kind.model_validate_json(body)
    except ValidationError as error:
        first = error.errors()[0]
        location = ".".join(str(part) for part in first["loc"]) or "the body"
        raise TrustError(
            f"the request cannot be read ({location}: {first['msg']}). Update Trunkline at the site."
        ) from None


def reconcile(authority: Authority, address: str, ca: bytes) -> None:
    """Register every enrolled site with Flower's SuperLink, and unregister every revoked one.

    Raises:
        DeploymentError: the SuperLink does not answer; the changes made so far are kept.
    """
    for entry in authority.registry.read().enrolled:
        if not entry.revoked and entry.node is None:
            node = register_node(address, entry.spki.encode(), entry.site, ca=ca)
            _set_node(authority, entry, node)
            logger.info("%s is node %d", entry.site, node)
        elif entry.revoked and entry.node is not None:
            try:
                unregister_node(address, entry.node, ca=ca)
            except DeploymentError as error:
                if "404" not in str(error) and "not found" not in str(error).lower():
                    raise
            _set_node(authority, entry, None)
            logger.warning("%s is shut out: %s", entry.site, entry.reason)


def forget_unknown(authority: Authority, address: str, ca: bytes) -> None:
    """Forget the node of a site that the SuperLink no longer knows, so that the next step registers the site again.

    The SuperLink's database was lost then, or an older one was restored.
    """
    nodes = {node["node"] for node in list_nodes(address, ca=ca) if node["status"] != "unregistered"}
    for entry in authority.registry.read().enrolled:
        if entry.node is not None and entry.node not in nodes:
            _set_node(authority, entry, None)
            logger.warning("the SuperLink does not know %s any more", entry.site)


def _set_node(authority: Authority, entry: Enrolled, node: int | None) -> None:
    def put(book: Book) -> Book:
        return book.model_copy(
            update={
                "enrolled": tuple(
                    other.model_copy(update={"node": node}) if other.key == entry.key else other
                    for other in book.enrolled
                )
            }
        )

    authority.registry.write(put)


@contextlib.asynccontextmanager
async def _keep_in_step(authority: Authority, address: str, ca: bytes) -> AsyncIterator[None]:
    stop = threading.Event()

    def loop() -> None:
        last_error, since_due = "", DUE_S
        while not stop.wait(STEP_S):
            try:
                reconcile(authority, address, ca)
                since_due += STEP_S
                if since_due >= DUE_S:
                    since_due = 0.0
                    forget_unknown(authority, address, ca)
                    if needs_renewal(read_certificate(authority.state / "server.crt")):
                        authority.rotate_server("it was due")
                        logger.info("the server has a new certificate")
                last_error = ""
            except TrunklineError as error:
                if str(error) != last_error:  # once, not every second
                    last_error = str(error)
                    logger.warning("%s", error)

    thread = threading.Thread(target=loop, name="in step", daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        await asyncio.to_thread(thread.join, 2.0)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m trunkline.server.gateway.registrar", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--state", required=True, type=Path)
    parser.add_argument("--superlink", required=True, help="host:port on loopback")
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, stream=sys.stdout, format="%(asctime)s %(levelname)s %(message)s")
    logging.getLogger("httpx").setLevel(logging.WARNING)
    state = options.state.resolve()
    try:
        authority = Authority.open(state)
        path = socket_path(state)
        app = build_app(authority, options.superlink, (state / "loopback.crt").read_bytes())
        for _ in audit.read(state):  # an altered log is reported at the start, not at the first line to write
            pass
    except (TrunklineError, OSError) as error:
        logger.error("%s", error)
        sys.exit(1)
    path.unlink(missing_ok=True)
    os.umask(0o077)
    with socket.socket(socket.AF_UNIX) as listener:  # bound here, because uvicorn would let every account connect
        listener.bind(str(path))
        listener.listen(64)
        logger.info("ready: the authority of %s", authority.federation.name)
        config = uvicorn.Config(app, log_level="warning", access_log=False, lifespan="on", timeout_graceful_shutdown=3)
        uvicorn.Server(config).run(sockets=[listener])


if __name__ == "__main__":
    main()
