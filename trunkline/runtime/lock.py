"""The lock that keeps a state folder to one daemon, and the daemon's status file."""

import contextlib
import fcntl
import json
import os
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

from trunkline.errors import DeploymentError


@dataclass
class Lock:
    """Keeps a state folder to one daemon: a file lock, which the system drops with the process however it dies.

    Raises:
        DeploymentError: another process holds it; the text names its pid.
    """

    state: Path
    _descriptor: int = field(default=-1, init=False)

    def __enter__(self) -> Self:
        try:
            self.state.mkdir(parents=True, exist_ok=True, mode=0o700)
            self._descriptor = os.open(self.state / "pid", os.O_RDWR | os.O_CREAT, 0o600)
        except OSError as error:
            raise DeploymentError(
                f"{self.state}: cannot keep state here ({error.strerror}). Give another folder, or the right to write."
            ) from None
        if not self._take():
            holder = os.pread(self._descriptor, 32, 0).decode(errors="replace").strip()
            os.close(self._descriptor)
            raise DeploymentError(
                f"{self.state}: a daemon with pid {holder or 'unknown'} already runs on this state folder. "
                f"End it first (kill {holder or 'PID'}), or give the second one a state folder of its own."
            ) from None
        with contextlib.suppress(OSError):  # on a full disk the pid is missing; the lock holds all the same
            os.ftruncate(self._descriptor, 0)
            os.pwrite(self._descriptor, f"{os.getpid()}\n".encode(), 0)
        return self

    def _take(self) -> bool:
        for pause in (0.05, 0.2, 0.0):  # `read_status` holds it for an instant
            try:
                fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return True
            except OSError:
                time.sleep(pause)
        return False

    def __exit__(self, *exc: object) -> None:
        os.close(self._descriptor)


def read_status(state: Path) -> dict[str, Any]:
    """The last `status.json` of a supervisor, with `running`: whether one holds the folder now.

    Raises:
        DeploymentError: no supervisor ever ran on this folder.
    """
    try:
        status: dict[str, Any] = json.loads((state / "status.json").read_bytes())
    except FileNotFoundError:
        raise DeploymentError(
            f"{state}: no daemon has run on this state folder yet. Start one, or name its folder."
        ) from None
    except (OSError, ValueError) as error:
        raise DeploymentError(
            f"{state / 'status.json'}: cannot be read: {error}. It is written anew at a start."
        ) from None
    try:
        with (state / "pid").open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        status["running"] = False
    except FileNotFoundError:
        status["running"] = False
    except OSError:
        status["running"] = True
    return status


def listening_port(state: Path) -> int | None:
    """The port that the server of this folder listens on, or that the last one did; None where there was none."""
    try:
        return int(str(read_status(state)["listens"]).rpartition(":")[2])
    except (DeploymentError, KeyError, ValueError):  # no server has run here, or its status is damaged
        return None
