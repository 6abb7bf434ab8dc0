"""The peers of some processes: their sockets as Linux lists them, sampled."""

import socket
import struct
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Self

PAUSE_S = 0.03
LISTENS = "0A"  # state of a TCP socket in /proc/net/tcp
Peer = tuple[str, str, int]  # tcp or udp, address, port


@dataclass(frozen=True)
class _Row:
    protocol: str
    own_address: str
    own_port: int
    address: str  # of the peer; port 0: there is none
    port: int
    state: str
    inode: str  # "0": no process holds it


class SocketWatch:
    """Samples the sockets of processes and all their children, as a context manager.

    Args:
        pids: of the processes; one that has ended is passed over.
    """

    def __init__(self, *pids: int) -> None:
        self.pids = pids
        self.samples = 0
        self.seen: set[Peer] = set()
        self.listening: set[int] = set()  # ports of these processes themselves
        self._callers: set[Peer] = set()  # seen once
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._run, name="sockets", daemon=True)

    @property
    def possible(self) -> bool:
        """Whether this system lists the sockets of a process."""
        return Path("/proc/self/net/tcp").exists()

    def strangers(self, *allowed: int) -> list[Peer]:
        """Peers that are neither a port of this machine in `allowed` nor one of these processes."""
        ports = self.listening | set(allowed)
        return sorted(
            peer for peer in self.seen if not (peer[0] == "tcp" and _is_loopback(peer[1]) and peer[2] in ports)
        )

    def __enter__(self) -> Self:
        if self.possible:
            self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._end.set()
        if self._thread.is_alive():
            self._thread.join(5.0)

    def _run(self) -> None:
        while not self._end.wait(PAUSE_S):
            self._sample()

    def _sample(self) -> None:
        pids = [pid for root in self.pids for pid in _tree(root)]
        rows = list(_rows(pids))
        inodes = {inode for pid in pids for inode in _inodes(pid)}
        holders = {(row.own_address, row.own_port): row.inode for row in rows}
        watched = [row for row in rows if row.inode in inodes]
        self.listening |= {row.own_port for row in watched if row.protocol == "tcp" and row.state == LISTENS}
        for row in watched:
            peer = (row.protocol, row.address, row.port)
            if not row.port or peer in self.seen:
                continue
            if row.own_port not in self.listening:
                self.seen.add(peer)
                continue
            # a process has connected to these: one of themselves, unless the other end's holder is a stranger. An end may
            # be closed between the two lists, so a caller counts when it was seen twice
            if holders.get((row.address, row.port)) not in {"0", *inodes}:
                (self.seen if peer in self._callers else self._callers).add(peer)
        self.samples += 1


def _is_loopback(address: str) -> bool:
    return address.startswith("127.") or address in ("::1", "::ffff:127.0.0.1")


def _tree(pid: int) -> Iterator[int]:
    yield pid
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        try:
            children = task.read_text().split()
        except OSError:
            continue
        for child in children:
            yield from _tree(int(child))


def _inodes(pid: int) -> Iterator[str]:
    try:
        links = list(Path(f"/proc/{pid}/fd").iterdir())
    except OSError:
        return
    for link in links:
        try:
            target = str(link.readlink())
        except OSError:
            continue
        if target.startswith("socket:["):
            yield target[8:-1]


def _rows(pids: list[int]) -> Iterator[_Row]:
    """Every socket in the processes' network, whichever process holds it."""
    for table in ("tcp", "tcp6", "udp", "udp6"):
        for pid in pids:
            try:
                lines = Path(f"/proc/{pid}/net/{table}").read_text().splitlines()[1:]
            except OSError:
                continue
            for line in lines:
                cells = line.split()
                yield _Row(table[:3], *_address(cells[1]), *_address(cells[2]), cells[3], cells[9])
            break  # one of them is enough: they share a network


def _address(text: str) -> tuple[str, int]:
    digits, _, port = text.partition(":")
    words = [struct.pack("=I", int(digits[start : start + 8], 16)) for start in range(0, len(digits), 8)]
    family = socket.AF_INET if len(words) == 1 else socket.AF_INET6
    return socket.inet_ntop(family, b"".join(words)), int(port, 16)
