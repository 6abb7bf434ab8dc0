"""Which callers the gateway admits: current TLS contexts, the caller behind a certificate, signatures seen before."""

import base64
import binascii
import ssl
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature

from trunkline.errors import DeploymentError, StorageError
from trunkline.security import keys
from trunkline.server.gateway.connection import Denied
from trunkline.server.gateway.http_headers import printable
from trunkline.server.membership.registry import JOIN_AGAIN, REGISTRY, Book, Registry, explain_denial

# for so long a used or expired code still reaches the registrar, which explains what is wrong
REMEMBERED = timedelta(days=90)
REPLAY_S = 330.0  # Flower takes a signed timestamp from 5 s ahead until 305 s later; with some seconds of margin
SIGNATURES = 20_000  # of one site within that time: 60 calls a second, and 3 MB


def invitation_certificates(book: Book) -> str:
    """The certificates of the invitations that a caller may still show, in PEM."""
    oldest = keys.now() - REMEMBERED
    return "".join(code.certificate for code in book.invitations if parse_time(code.made) > oldest)


def parse_time(text: str) -> datetime:
    """A time of the registry (ISO 8601) in UTC; the distant past where the text is no time."""
    try:
        parsed = datetime.fromisoformat(text)
    except ValueError:
        return datetime.min.replace(tzinfo=UTC)
    return parsed if parsed.tzinfo else parsed.replace(tzinfo=UTC)


class TlsContexts:
    """The TLS contexts of the gateway; each is made again when one of its files has changed.

    Args:
        state: holds authority.crt, server.crt, server.key, loopback.crt and the registry.
        emit: gets a sentence when a new certificate is in use, or when one cannot be used and the former stays.
    """

    def __init__(self, state: Path, registry: Registry, emit: Callable[[str], None]) -> None:
        self.state, self.registry, self.emit = state, registry, emit
        self._marks: dict[str, object] = {}
        self._contexts: dict[str, ssl.SSLContext] = {}

    def for_callers(self) -> ssl.SSLContext:
        """For callers from outside: TLS 1.3 with a certificate of this federation, or of an invitation to it.

        Raises:
            DeploymentError: the files do not fit together, and never did.
        """
        # the day is part of it: invitations leave the list with time alone
        return self._current(
            "server.crt", ("server.crt", "server.key", "authority.crt", REGISTRY), self._make_for_callers
        )

    def for_superlink(self) -> ssl.SSLContext:
        """For the SuperLink on loopback: its own certificate and no other."""
        return self._current("loopback.crt", ("loopback.crt",), self._make_for_superlink)

    def _current(self, name: str, files: tuple[str, ...], make: Callable[[], ssl.SSLContext]) -> ssl.SSLContext:
        mark = (keys.now().date(), *(_mark(self.state / file) for file in files))
        if mark != self._marks.get(name):
            self._marks[name] = mark  # also where it fails: reported once, tried again when a file changes again
            try:
                context = make()
            except (OSError, ValueError, StorageError) as error:
                text = f"{', '.join(files)} in {self.state} do not fit together or cannot be read ({error})."
                if name in self._contexts:
                    self.emit(f"{text} The former certificate stays in use; the files are read again when one changes.")
                else:
                    del self._marks[name]
                    raise DeploymentError(
                        f"{text} `trunkline server init` makes them; a backup restores them."
                    ) from None
            else:
                if name in self._contexts:
                    self.emit(f"{', '.join(files)}: changed; the next connection uses the new ones.")
                self._contexts[name] = context
        return self._contexts[name]

    def _make_for_callers(self) -> ssl.SSLContext:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.minimum_version = ssl.TLSVersion.TLSv1_3
        context.num_tickets = 0  # a ticket would admit a caller again without another look at its certificate
        context.options |= ssl.OP_NO_TICKET
        context.set_alpn_protocols(["http/1.1"])
        context.load_cert_chain(self.state / "server.crt", self.state / "server.key")
        authority = (self.state / "authority.crt").read_text("ascii")
        context.load_verify_locations(cadata=authority + invitation_certificates(self.registry.read()))
        context.verify_mode = ssl.CERT_REQUIRED
        return context

    def _make_for_superlink(self) -> ssl.SSLContext:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.minimum_version = ssl.TLSVersion.TLSv1_3
        context.load_verify_locations(cadata=(self.state / "loopback.crt").read_text("ascii"))
        return context


def _mark(path: Path) -> tuple[int, int, int] | None:
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_mtime_ns, status.st_ino, status.st_size


@dataclass(frozen=True)
class Peer:
    """The other end of a connection, as its certificate describes it.

    Args:
        address: ip:port; host: without the port.
        header: the value that Flower's header flwr-public-key must have.
    """

    address: str
    host: str
    der: bytes
    name: str
    key: str
    header: bytes
    until: datetime

    @classmethod
    def from_certificate(cls, der: bytes, host: str, port: int) -> "Peer":
        certificate = x509.load_der_x509_certificate(der)
        public = certificate.public_key()
        return cls(
            address=f"[{host}]:{port}" if ":" in host else f"{host}:{port}",
            host=host,
            der=der,
            name=printable(keys.common_name(certificate), 64) or "no name",
            key=keys.key_id(public),
            header=base64.b64encode(keys.spki(public)),
            until=certificate.not_valid_after_utc,
        )


@dataclass(frozen=True)
class Caller:
    """A site, or the holder of an invitation to be one."""

    site: str
    invited: bool


def identify_caller(book: Book, peer: Peer) -> Caller:
    """The caller behind a certificate, by the registry as it is now.

    Raises:
        Denied: 401, for a certificate that is unknown, revoked or expired.
    """
    entry = book.by_key(peer.key)
    if entry is None:
        invitation = book.invitation(peer.key)
        if invitation is not None:
            return Caller(invitation.site, invited=True)
        raise Denied(401, explain_denial(None, peer.name), "not enrolled")
    if entry.revoked:
        raise Denied(401, explain_denial(entry), "revoked")
    if keys.now() >= peer.until:
        raise Denied(401, f"{entry.site}: this certificate expired on {_day(peer.until)}. {JOIN_AGAIN}", "expired")
    return Caller(entry.site, invited=False)


def _day(moment: datetime) -> str:
    return moment.astimezone(UTC).strftime("%Y-%m-%d %H:%M UTC")


class Replays:
    """Signatures of the last minutes.

    Flower signs a timestamp and nothing of the call. One set of its headers, once captured, would serve for any call
    until the timestamp is too old. Here each signature serves for one call; an honest SuperNode signs each attempt anew.

    A signature older than this object may have been used before, and is refused too. In the first seconds that leaves
    room for a plant whose clock is up to 5 s ahead, which Flower allows.

    Args:
        clock: seconds, monotonic.
    """

    def __init__(
        self, keep_s: float = REPLAY_S, cap: int = SIGNATURES, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.keep_s, self.cap, self.clock = keep_s, cap, clock
        self.since = keys.now()
        self._seen: dict[str, OrderedDict[int, float]] = {}

    def check(self, site: str, key: str, signature: bytes, timestamp: bytes) -> None:
        """Remember this signature.

        Raises:
            Denied: 401 where it was used before or is none; 503, so that the caller tries again, where that cannot be known.
        """
        try:
            # r, not the text: (r, n - s) is as good a signature as (r, s), and base64 has spare bits
            r, _ = decode_dss_signature(base64.b64decode(signature, validate=True))
            signed = datetime.fromisoformat(timestamp.decode("ascii")).astimezone(UTC)
        except (binascii.Error, ValueError, OverflowError):
            raise Denied(
                401, f"{site}: the headers flwr-signature and flwr-timestamp are absent or damaged.", "no signature"
            ) from None
        if signed < self.since:
            raise Denied(
                503,
                f"{site}: signed at {signed:%H:%M:%S} UTC, before this gateway started; whether it was used before is not known. "
                "Try again with a fresh signature; if that does not help, set the clock (NTP).",
                "signed before the start",
            )
        seen, now = self._seen.setdefault(key, OrderedDict()), self.clock()
        self._forget(seen, now)
        if r in seen:
            raise Denied(
                401,
                f"{site}: this signature was used before. Somebody may be repeating captured headers; an honest call is never repeated.",
                "replayed",
            )
        if len(seen) >= self.cap:
            raise Denied(503, f"{site}: more than {self.cap:,} calls in {self.keep_s:.0f} s. Wait.", "too many calls")
        seen[r] = now + self.keep_s

    def prune(self) -> None:
        """Forget signatures that are too old to be used again."""
        now = self.clock()
        for key in list(self._seen):
            self._forget(self._seen[key], now)
            if not self._seen[key]:
                del self._seen[key]

    @staticmethod
    def _forget(seen: OrderedDict[int, float], now: float) -> None:
        while seen and next(iter(seen.values())) <= now:
            seen.popitem(last=False)


# X509_V_ERR_*: self-signed, issued by an authority that is not trusted here, or by one that only has the same name
UNKNOWN_ISSUER = frozenset({2, 7, 18, 19, 20, 21})


def explain_handshake_failure(error: BaseException) -> str:
    """Why a handshake failed, for a person who reads the log."""
    if isinstance(error, ssl.SSLCertVerificationError):
        if error.verify_code == 10:
            return f"its certificate has expired. {JOIN_AGAIN}"
        if error.verify_code == 9:
            return "its certificate is not valid yet. Set the clocks of both machines (NTP)."
        if error.verify_code in UNKNOWN_ISSUER:
            return f"its certificate is of another authority, or of a code that is unknown here. {JOIN_AGAIN}"
        return f"its certificate is not good here: {error.verify_message}."
    if isinstance(error, ssl.SSLError):
        reason = error.reason or ""
        if reason == "PEER_DID_NOT_RETURN_A_CERTIFICATE":
            return "showed no client certificate. Only a site that has joined (`trunkline client join`) has one."
        if reason in ("UNSUPPORTED_PROTOCOL", "VERSION_TOO_LOW"):
            return "offers no TLS 1.3. Its TLS library is too old, or set to older versions."
        if reason == "HTTP_REQUEST":
            return "speaks plain HTTP; this port takes TLS only (https://)."
        if "UNKNOWN_CA" in reason or "ALERT_BAD_CERTIFICATE" in reason or "CERTIFICATE_UNKNOWN" in reason:
            return "does not trust this server's certificate: it joined another federation, or calls by a name that is not in it."
        if "ALERT" in reason:
            return f"gave up the handshake ({reason.lower().replace('_', ' ')})."
        return f"does not speak TLS, or not as it should ({reason.lower().replace('_', ' ')})."
    if isinstance(error, TimeoutError | ConnectionAbortedError):
        return "did not finish the TLS handshake in time."
    return "closed the connection during the TLS handshake."
