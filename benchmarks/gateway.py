"""What the gateway costs: the same calls to the same SuperLink-like server, straight to it and through the gateway, in turns.

python benchmarks/gateway.py [--megabytes 50] [--calls 200] [--repeats 5] [--out FILE.json]

The server is uvicorn over TLS, as a SuperLink is. `store` does with a call what a SuperLink does (check the signature,
collect the body, hash it, put it into a database, or take it out of there), and the caller hashes what it gets, as a
SuperNode does. `bare` throws bodies away: no real call is as light, so that ratio is the worst there can be. Bodies go in
chunks of 5 MiB, two at a time, each call with a fresh signature, as a SuperNode sends them.
"""

import argparse
import base64
import hashlib
import ipaddress
import json
import os
import socket
import sqlite3
import ssl
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from typing import Any

import httpx
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric.ec import ECDSA
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from trunkline.security import keys
from trunkline.server.membership.registry import REGISTRY, Book, Enrolled

CHUNK = 5 << 20
PUSH, PULL, BEAT = "/v1/fleet/push-object", "/v1/fleet/pull-object", "/v1/fleet/send-node-heartbeat"


async def app(scope: dict[str, Any], receive: Any, send: Any) -> None:
    """The other end: an ASGI app on uvicorn."""
    if scope["type"] != "http":
        return
    headers = dict(scope["headers"])
    work = headers.get(b"flwr-component-name") == b"store"
    if work:
        public = keys.load_public(base64.b64decode(headers[b"flwr-public-key"]), "header")
        public.verify(base64.b64decode(headers[b"flwr-signature"]), headers[b"flwr-timestamp"], ECDSA(hashes.SHA256()))
    parts = []
    while True:
        event = await receive()
        if work:
            parts.append(event.get("body", b""))
        if not event.get("more_body"):
            break
    answer = b"ok"
    database = sqlite3.connect(os.environ["BENCH_DATABASE"]) if work else None
    if scope["path"] == PUSH and database is not None:
        body = b"".join(parts)
        with database:
            database.execute("replace into objects values (?, ?)", (hashlib.sha256(body).hexdigest(), body))
    elif scope["path"] == PULL:
        answer = (
            STORED
            if database is None
            else database.execute("select body from objects order by id limit 1").fetchone()[0]
        )
    if database is not None:
        database.close()
    sent = [(b"content-length", b"%d" % len(answer)), (b"content-type", b"application/protobuf")]
    await send({"type": "http.response.start", "status": 200, "headers": sent})
    await send({"type": "http.response.body", "body": answer})


STORED = bytes(CHUNK)


def certificate(key: Any, name: str, issuer: tuple[Any, str], *, server: bool = False, authority: bool = False) -> Any:
    usage = ExtendedKeyUsageOID.SERVER_AUTH if server else ExtendedKeyUsageOID.CLIENT_AUTH
    builder = (
        x509.CertificateBuilder()
        .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)]))
        .issuer_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, issuer[1])]))
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(keys.now() - timedelta(hours=1))
        .not_valid_after(keys.now() + timedelta(days=1))
        .add_extension(x509.BasicConstraints(authority, 0 if authority else None), critical=True)
    )
    if not authority:
        builder = builder.add_extension(x509.ExtendedKeyUsage([usage]), critical=False)
        address = x509.IPAddress(ipaddress.ip_address("127.0.0.1"))
        builder = builder.add_extension(x509.SubjectAlternativeName([address]), critical=False)
    return builder.sign(issuer[0], hashes.SHA384())


def prepare(state: Path) -> Any:
    """A federation of one site; its key."""
    authority, server, loopback, site = (keys.new_site_key() for _ in range(4))
    root = (authority, "bench")
    own = certificate(site, "press-07", root)
    for name, found in (
        ("authority", certificate(authority, "bench", root, authority=True)),
        ("server", certificate(server, "centre", root, server=True)),
        ("loopback", certificate(loopback, "loopback", (loopback, "loopback"), server=True)),
        ("site", own),
    ):
        (state / f"{name}.crt").write_bytes(keys.certificate_pem(found))
    for name, key in (("server", server), ("loopback", loopback), ("site", site)):
        (state / f"{name}.key").write_bytes(keys.key_pem(key))
    entry = Enrolled(
        site="press-07",
        key=keys.key_id(site.public_key()),
        spki=keys.spki(site.public_key()).decode(),
        records="",
        serial=f"{own.serial_number:x}",
        certificate=keys.certificate_pem(own).decode(),
        since=keys.now().isoformat(),
        until=own.not_valid_after_utc.isoformat(),
    )
    (state / REGISTRY).write_text(Book(enrolled=(entry,)).model_dump_json())
    database = sqlite3.connect(state / "objects.db")
    with database:
        database.execute("pragma journal_mode=wal")
        database.execute("create table objects (id text primary key, body blob)")
        database.execute("insert into objects values ('', ?)", (STORED,))
    database.close()
    return site


class Caller:
    """What a SuperNode's client does, as far as it takes time."""

    def __init__(self, state: Path, port: int, key: Any, work: str) -> None:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        for name in ("authority.crt", "loopback.crt"):
            context.load_verify_locations(state / name)
        context.load_cert_chain(state / "site.crt", state / "site.key")
        self.client = httpx.Client(base_url=f"https://127.0.0.1:{port}", verify=context, timeout=60.0)
        self.key, self.work = key, work
        self.header = base64.b64encode(keys.spki(key.public_key())).decode()

    def call(self, path: str, body: bytes) -> bytes:
        stamp = keys.now().isoformat()
        signature = self.key.sign(stamp.encode(), ECDSA(hashes.SHA256()))
        headers = {
            "content-type": "application/protobuf",
            "accept": "application/protobuf",
            "flwr-component-name": self.work,
            "flwr-public-key": self.header,
            "flwr-timestamp": stamp,
            "flwr-signature": base64.b64encode(signature).decode(),
        }
        answer = self.client.post(path, content=body, headers=headers)
        answer.raise_for_status()
        if self.work == "store":
            hashlib.sha256(answer.content).hexdigest()  # an object is known by it, at both ends
        return answer.content

    def move(self, path: str, bodies: list[bytes]) -> float:
        """Seconds for all, two at a time."""
        start = time.perf_counter()
        with ThreadPoolExecutor(2) as pool:
            list(pool.map(lambda body: self.call(path, body), bodies))
        return time.perf_counter() - start


def cpu(process: "subprocess.Popen[bytes]") -> float:
    """Seconds of processor time a process has taken."""
    fields = Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


def start(argv: list[str], port: int, **environment: str) -> "subprocess.Popen[bytes]":
    process = subprocess.Popen(
        [sys.executable, *argv], env={**os.environ, **environment}, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline and process.poll() is None:
        with socket.socket() as one:
            if one.connect_ex(("127.0.0.1", port)) == 0:
                return process
        time.sleep(0.05)
    process.kill()
    raise SystemExit(f"{argv} did not start")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--megabytes", type=int, default=50)
    parser.add_argument("--calls", type=int, default=200)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    total = options.megabytes * 1_000_000
    big = [os.urandom(min(CHUNK, total - at)) for at in range(0, total, CHUNK)]
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        state = Path(folder)
        key = prepare(state)
        ports = {"direct": free_port(), "gateway": free_port()}
        link = [
            *("-m", "uvicorn", "gateway:app", "--app-dir", str(Path(__file__).parent), "--port", str(ports["direct"])),
            *("--ssl-keyfile", str(state / "loopback.key"), "--ssl-certfile", str(state / "loopback.crt")),
            *("--no-access-log", "--lifespan", "off"),
        ]
        gateway = [
            *("-m", "trunkline.server.gateway.gateway", "--state", folder, "--listen", f"127.0.0.1:{ports['gateway']}"),
            *("--upstream", f"127.0.0.1:{ports['direct']}"),
        ]
        processes = []
        try:
            processes.append(start(link, ports["direct"], BENCH_DATABASE=str(state / "objects.db")))
            processes.append(start(gateway, ports["gateway"]))
            for work in ("store", "bare"):
                callers = {name: Caller(state, port, key, work) for name, port in ports.items()}
                for what, path, bodies in (
                    ("push 50 MB", PUSH, big),
                    ("pull 50 MB", PULL, [b"x"] * len(big)),
                    ("small calls", BEAT, [b"x" * 100] * options.calls),
                ):
                    seconds: dict[str, list[float]] = {name: [] for name in callers}
                    for caller in callers.values():
                        caller.move(path, bodies[:2])  # connections open, caches warm
                    before = cpu(processes[1])
                    for _ in range(options.repeats):
                        for name, caller in callers.items():
                            seconds[name].append(caller.move(path, bodies))
                    spent = (cpu(processes[1]) - before) / options.repeats
                    pairs = [d / g for d, g in zip(seconds["direct"], seconds["gateway"], strict=True)]
                    rows.append(
                        {
                            "server": work,
                            "what": what.replace("50", str(options.megabytes)),
                            "throughput_ratio": statistics.median(pairs),
                            "best_ratio": min(seconds["direct"]) / min(seconds["gateway"]),
                            "ratio_low": min(pairs),
                            "ratio_high": max(pairs),
                            "direct_s": statistics.median(seconds["direct"]),
                            "gateway_s": statistics.median(seconds["gateway"]),
                            "gateway_cpu_s": spent,
                        }
                    )
        finally:
            for process in processes:
                process.kill()
                process.wait(10)
    print(
        f"{'server':8}{'what':14}{'throughput':>12}{'range':>14}{'of the best':>13}{'direct s':>10}{'gateway s':>11}{'gateway cpu s':>15}"
    )
    for row in rows:
        span = f"{row['ratio_low']:.2f}-{row['ratio_high']:.2f}"
        print(
            f"{row['server']:8}{row['what']:14}{row['throughput_ratio']:12.2f}{span:>14}{row['best_ratio']:13.2f}"
            f"{row['direct_s']:10.3f}{row['gateway_s']:11.3f}{row['gateway_cpu_s']:15.3f}"
        )
    print(
        f"throughput: of the gateway, as a part of the direct one; medians of {options.repeats} turns on {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}"
    )
    if options.out:
        options.out.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
