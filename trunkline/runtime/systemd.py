"""The protocol of sd_notify(3): a daemon reports to systemd that it serves, and that its loop still turns."""

import contextlib
import os
import socket
import time
from collections.abc import Mapping

VARIABLES = ("NOTIFY_SOCKET", "WATCHDOG_USEC", "WATCHDOG_PID")


class Service:
    """Notifications to systemd; nothing is sent where systemd did not ask for them.

    Args:
        environ: where systemd's variables are looked up.
    """

    def __init__(self, environ: Mapping[str, str] = os.environ) -> None:
        self._address = environ.get("NOTIFY_SOCKET", "")
        if self._address.startswith("@"):  # the abstract namespace of Linux
            self._address = "\0" + self._address[1:]
        microseconds, pid = environ.get("WATCHDOG_USEC", ""), environ.get("WATCHDOG_PID", "")
        is_watched = microseconds.isdigit() and pid in ("", str(os.getpid()))
        self._interval_s = int(microseconds) / 2e6 if is_watched else 0.0
        self._due = 0.0

    def notify(self, *lines: str) -> None:
        """Send lines such as `READY=1` in one datagram. A datagram that nobody receives is no error."""
        if not self._address:
            return
        with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sender:
            sender.settimeout(1.0)
            sender.sendto("\n".join(lines).encode(), self._address)

    def beat(self) -> None:
        """Send `WATCHDOG=1` twice in the time that systemd allows. The loop under watch calls this at every turn."""
        if self._interval_s and time.monotonic() >= self._due:
            self._due = time.monotonic() + self._interval_s
            self.notify("WATCHDOG=1")


def remove_variables(environ: Mapping[str, str]) -> dict[str, str]:
    """An environment for a child: without systemd's variables, so that it cannot report in the daemon's name."""
    return {name: value for name, value in environ.items() if name not in VARIABLES}
