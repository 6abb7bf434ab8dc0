"""The same port by nginx, for a server that already runs one: a configuration that replaces `gateway`.

Three differences. nginx reads nothing by itself: a change of the registry (a site joins, renews, is revoked) is effective
only after a new file and `nginx -s reload`. It knows a site by the fingerprint of its newest certificate. And it forgets
a signature after a minute, and does not recognise its second form, where the gateway remembers both for as long as Flower
accepts them.
"""

import base64
import pwd
import re
from collections.abc import Iterable
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes

from trunkline.runtime.storage import write_atomic
from trunkline.security import keys
from trunkline.security.enrolment import AUTHORITY_PATH, HELLO_PATH, JOIN_PATH, LIMIT, RENEW_PATH
from trunkline.server.gateway.authentication import invitation_certificates
from trunkline.server.gateway.gateway import parse_address
from trunkline.server.gateway.routes import CERTIFICATE, CERTIFICATE_PEM, FORWARDED, PEER, SOCKET, Limits, make_routes
from trunkline.server.membership.registry import JOIN_AGAIN, Book, Registry, explain_denial

TRUSTED = "trusted.pem"
FOLDER = "nginx"  # for its pid and its temporary files
UNFIT = re.compile(r"[^\w .,:;()/+@-]")  # characters of a reason that nginx would interpret: `$`, quotes, braces
PATH_KINDS = {
    AUTHORITY_PATH: "authority",
    JOIN_PATH: "join",
    RENEW_PATH: "renew",
    HELLO_PATH: "hello",
    "/health": "health",
}  # any other route is Flower's: "fleet"


def nginx_config(state: Path, listen: str, upstream: str) -> str:
    """A whole nginx.conf for `nginx -c FILE`, in the foreground; writes `STATE/trusted.pem` and makes its folders.

    Args:
        state: folder of the federation; absolute, because nginx would look beside its own files.
        listen, upstream: HOST:PORT, as the gateway takes them.

    Raises:
        StorageError, TrustError: the registry or a certificate cannot be read.
    """
    book, limits = Registry(state).read(), Limits()
    write_atomic(
        state / TRUSTED,
        keys.certificate_pem(keys.read_certificate(state / "authority.crt")) + invitation_certificates(book).encode(),
    )
    (state / FOLDER).mkdir(exist_ok=True, mode=0o700)
    return f"""{_process(state, limits)}
http {{
{_files(state)}

{_caller_maps(book)}
{_route_maps(limits)}

{_zones(state, upstream)}

  server {{
{_tls(state, *parse_address(listen))}

{_limits(limits)}

{REFUSALS}

{_locations(state, upstream)}
  }}
}}
"""


def _process(state: Path, limits: Limits) -> str:
    return f"""# made by Trunkline from {state}; made again, and `nginx -s reload`, whenever the registry changes
daemon off;
user {pwd.getpwuid(state.stat().st_uid).pw_name};  # who may read the state folder
pid {state / FOLDER}/nginx.pid;
error_log stderr warn;
worker_processes auto;
worker_rlimit_nofile {4 * limits.connections};
events {{ worker_connections {2 * limits.connections + 200}; }}"""


def _files(state: Path) -> str:
    return f"""  access_log {state / FOLDER}/access.log;
  client_body_temp_path {state / FOLDER}/body;
  proxy_temp_path {state / FOLDER}/proxy;
  fastcgi_temp_path {state / FOLDER}/fastcgi;
  uwsgi_temp_path {state / FOLDER}/uwsgi;
  scgi_temp_path {state / FOLDER}/scgi;
  server_tokens off;
  default_type text/plain;
  map_hash_bucket_size 1024;
  map_hash_max_size 16384;"""


def _caller_maps(book: Book) -> str:
    """Three maps by the fingerprint of a certificate: sort of caller, answer to a revoked site, value of its key header."""
    kinds: dict[str, str] = {}
    refusals: dict[str, str] = {}
    headers: dict[str, str] = {}
    for entry in book.enrolled:  # oldest first: a newer enrolment with the same certificate counts
        mark = _sha1(entry.certificate, entry.site)
        kinds[mark] = "revoked" if entry.revoked else "site"
        if entry.revoked:
            refusals[mark] = explain_denial(entry.model_copy(update={"reason": UNFIT.sub(" ", entry.reason)}))
        else:
            headers[mark] = base64.b64encode(entry.spki.encode()).decode()
    for code in book.invitations:
        kinds.setdefault(_sha1(code.certificate, code.site), "invited")
    return f"""  # who has this certificate
  map $ssl_client_fingerprint $who {{
    default unknown;
{_map_lines(kinds.items())}
  }}
  map $ssl_client_fingerprint $words {{
    default "this certificate is not enrolled here. {JOIN_AGAIN}";
{_map_lines(_quote(refusals))}
  }}
  # what Flower's key header must say
  map $ssl_client_fingerprint $key {{
    default "-";
{_map_lines(_quote(headers))}
  }}"""


def _map_lines(entries: Iterable[tuple[str, str]]) -> str:
    return "\n".join(f"    {key} {value};" for key, value in entries)


def _quote(entries: dict[str, str]) -> list[tuple[str, str]]:
    return [(key, f'"{value}"') for key, value in entries.items()]


def _route_maps(limits: Limits) -> str:
    # patterns, because a map takes other letters than these for the same where only their case differs
    routes = make_routes(limits)
    methods = _map_lines((f'"~^{route.method} {path}\\z"', "1") for path, route in routes.items())
    kinds = _map_lines((f'"~^{path}\\z"', PATH_KINDS.get(path, "fleet")) for path in routes)
    return f"""  # as it was sent: nginx itself would decode and merge first, and take many spellings for one path
  map $request_uri $kind {{
    default none;
{kinds}
  }}
  map "$request_method $request_uri" $method {{
    default 0;
{methods}
  }}
  map "$who $kind" $may {{
    default 0;
    "site fleet" 1; "site health" 1; "site authority" 1; "site renew" 1; "site hello" 1;
    "invited authority" 1; "invited join" 1;
  }}"""


def _zones(state: Path, upstream: str) -> str:
    return f"""  limit_conn_zone $binary_remote_addr zone=peers:10m;
  limit_req_zone $binary_remote_addr zone=rates:10m rate=200r/s;
  limit_req_zone $http_flwr_signature zone=signatures:32m rate=1r/m;  # the slowest there is: a signature twice in a minute
  upstream superlink {{ server {upstream}; keepalive 32; keepalive_timeout 3s; }}  # uvicorn closes after 5 s
  upstream registrar {{ server unix:{state / SOCKET}; }}"""


def _tls(state: Path, host: str, port: int) -> str:
    address = f"[{host}]" if ":" in host else host
    return f"""    listen {address}:{port} ssl backlog=512;
    ssl_protocols TLSv1.3;
    ssl_session_tickets off;
    ssl_session_cache off;
    ssl_certificate {state}/server.crt;
    ssl_certificate_key {state}/server.key;
    ssl_client_certificate {state}/authority.crt;  # whose name is sent to callers
    ssl_trusted_certificate {state / TRUSTED};  # and the invitations, which nobody needs to be told of
    ssl_verify_client on;
    ssl_verify_depth 1;
    # no certificate, a wrong one, no TLS: the connection ends without a word of HTTP
    error_page 495 496 497 = @drop;
    location @drop {{ return 444; }}"""


def _limits(limits: Limits) -> str:
    return f"""    client_header_timeout {limits.head_s:.0f}s;
    client_body_timeout {limits.body_s:.0f}s;
    send_timeout {limits.body_s:.0f}s;
    keepalive_timeout {limits.idle_s:.0f}s;
    client_header_buffer_size 4k;
    large_client_header_buffers 4 {limits.head // 4096}k;
    client_max_body_size {limits.body};
    limit_conn peers {limits.per_host};
    limit_req zone=rates burst=400 nodelay;
    proxy_http_version 1.1;
    proxy_request_buffering off;
    proxy_buffering off;
    proxy_next_upstream off;
    proxy_read_timeout {limits.answer_s:.0f}s;
    proxy_send_timeout {limits.body_s:.0f}s;
    proxy_pass_request_headers off;  # only what is set below"""


REFUSALS = """\
    # never 403: a SuperNode takes it for "this run has ended"
    if ($who = unknown) { return 401 "$words\\n"; }
    if ($who = revoked) { return 401 "$words\\n"; }
    if ($kind = none) { return 404 "there is nothing at this path.\\n"; }
    if ($method = 0) { return 405; }
    if ($may = 0) { return 401 "this certificate does not open this path: an invitation opens joining, a site's certificate the rest.\\n"; }
    if ($server_protocol != HTTP/1.1) { return 400; }
    if ($http_transfer_encoding != "") { return 411; }
    if ($http_expect != "") { return 417; }
    if ($http_upgrade != "") { return 400; }"""


def _locations(state: Path, upstream: str) -> str:
    identity = "\n".join(
        f'    proxy_set_header {name.decode()} "$http_{name.decode().replace("-", "_")}";' for name in FORWARDED
    )
    proxied = f"""{identity}
      proxy_set_header Connection "";
      proxy_set_header Host "{upstream}";
      proxy_ssl_protocols TLSv1.3;
      proxy_ssl_trusted_certificate {state}/loopback.crt;
      proxy_ssl_verify on;
      proxy_ssl_verify_depth 0;
      proxy_ssl_name {_dns_name(keys.read_certificate(state / "loopback.crt"))};
      proxy_pass https://superlink;"""
    return f"""    location /v1/fleet/ {{
      if ($http_flwr_public_key != $key) {{ return 401 "the header flwr-public-key does not hold the key of this certificate.\\n"; }}
      if ($http_content_length = "") {{ return 411; }}
      limit_req zone=signatures;
      limit_req zone=rates burst=400 nodelay;
{proxied}
    }}
    location = /health {{
      client_max_body_size 1;
{proxied}
    }}
    location /v1/enrolment/ {{
      client_max_body_size {LIMIT};
      error_page 502 504 = @absent;
{identity}
      proxy_set_header Connection "";
      proxy_set_header Host registrar;
      proxy_set_header {CERTIFICATE} "";
      proxy_set_header {CERTIFICATE_PEM} $ssl_client_escaped_cert;
      proxy_set_header {PEER} "$remote_addr:$remote_port";
      proxy_pass http://registrar;
    }}
    location @absent {{ return 503 "the registrar does not answer; joining and renewing wait until it does. Try again.\\n"; }}
    location / {{ return 404; }}"""


def _dns_name(certificate: x509.Certificate) -> str:
    """A name that nginx finds in the certificate: nginx does not look at IP addresses."""
    try:
        extension = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        names = extension.get_values_for_type(x509.DNSName)
    except x509.ExtensionNotFound:
        names = []
    return names[0] if names else keys.common_name(certificate)


def _sha1(pem: str, owner: str) -> str:
    """A fingerprint as nginx writes it; the authority signed the certificate, so no caller chose its bytes."""
    certificate = keys.load_certificate(pem.encode(), f"the registry's certificate of {owner}")
    return certificate.fingerprint(hashes.SHA1()).hex()
