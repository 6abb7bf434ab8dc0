"""Heads of HTTP messages: parsed strictly, and built anew.

h11 parses heads and nothing else: a body's length is known before its first byte, so it is passed on as it arrives.
"""

import re
from dataclasses import dataclass

import h11

from trunkline.server.gateway.connection import Connection, Denied

DIGITS = re.compile(rb"[0-9]{1,12}\Z")


@dataclass(frozen=True)
class Request:
    """A head that has been read. Names are lower case, and none comes twice."""

    method: str
    target: str
    headers: dict[bytes, bytes]

    @property
    def length(self) -> int | None:
        """Bytes of the body; None where the request states no length."""
        length = self.headers.get(b"content-length")
        return None if length is None else int(length)

    @property
    def is_last(self) -> bool:
        """Whether the caller wants the connection closed afterwards."""
        return b"close" in self.headers.get(b"connection", b"").lower()


def printable(text: str, most: int) -> str:
    """Text that a caller sent, fit for a line of a log."""
    return ascii(text)[1:-1][:most]


def parse_request(raw: bytes) -> Request:
    """A request's head, by h11 and by stricter rules: two readers of one head must not see two requests in it.

    Raises:
        Denied: anything that could be read in two ways.
    """
    lines = raw[:-4].split(b"\r\n")
    if any(b"\r" in line or b"\n" in line or line[:1] in (b"", b" ", b"\t") for line in lines):
        raise Denied(400, "lines of a request end in CR LF and do not continue.", "not HTTP")
    names = [line.partition(b":")[0].lower() for line in lines[1:]]
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise Denied(400, f"the header {printable(twice.decode('latin-1'), 40)} comes twice.", "header twice")
    values = dict(zip(names, (line.partition(b":")[2].strip() for line in lines[1:]), strict=True))
    if b"transfer-encoding" in values:
        raise Denied(
            400 if b"content-length" in values else 411,
            "Transfer-Encoding is not taken here; say how long the body is (Content-Length).",
            "transfer-encoding",
        )
    if not DIGITS.match(values.get(b"content-length", b"0")):
        raise Denied(400, "Content-Length is not a number of bytes.", "content-length")
    for name, status in ((b"expect", 417), (b"upgrade", 400)):
        if name in values:
            raise Denied(status, f"{name.decode().title()} is not taken here.", name.decode())
    parser = h11.Connection(h11.SERVER, max_incomplete_event_size=len(raw))
    try:
        parser.receive_data(raw)
        event = parser.next_event()
    except h11.RemoteProtocolError as error:
        raise Denied(400, f"this is not an HTTP/1.1 request ({str(error)[:60]}).", "not HTTP") from None
    if not isinstance(event, h11.Request) or event.http_version != b"1.1":
        raise Denied(400, "this is not an HTTP/1.1 request.", "not HTTP")
    headers = dict(event.headers)
    return Request(event.method.decode("ascii"), event.target.decode("latin-1"), headers)


def build_request_head(method: str, target: str, headers: list[tuple[bytes, bytes]]) -> tuple[bytes, h11.Connection]:
    """A head built anew, and the h11 connection that reads the answer to it."""
    parser = h11.Connection(h11.CLIENT, max_incomplete_event_size=1 << 17)
    request = h11.Request(method=method, target=target, headers=headers)
    return bytes(parser.send(request) or b""), parser


async def read_answer_head(
    connection: Connection, parser: h11.Connection, patience: float
) -> tuple[int, dict[bytes, bytes], int]:
    """Status, headers and length of the body of an answer from the SuperLink or the registrar.

    Raises:
        ConnectionLost, Denied: no answer came, or it is none.
    """
    while True:
        try:
            parser.receive_data(await connection.read_head(1 << 17, patience, patience))
            event = parser.next_event()
        except (h11.RemoteProtocolError, Denied) as error:
            raise Denied(502, f"what answers behind the gateway does not speak HTTP ({error}).", "upstream") from None
        if isinstance(event, h11.Response):
            break
    headers = dict(event.headers)
    length = headers.get(b"content-length")
    if event.status_code in (204, 304):
        length = b"0"
    if length is None:
        raise Denied(502, "what answers behind the gateway does not say how long its answer is.", "upstream")
    return event.status_code, headers, int(length)
