"""When a plant's own machine is wanted for something else: its hours, and a pause that somebody asks for.

The request is a small file in the state folder, written by `trunkline client pause` and read by the process that trains.
Training looks between two optimiser steps and waits there, with nothing lost: it goes on where it stood.
"""

import json
import logging
import os
import time
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from trunkline.config.site import SiteConfig, read_site
from trunkline.errors import Away, ConfigError, DeploymentError, StorageError
from trunkline.protocol import opening_hours as hours
from trunkline.runtime.programs import account_name
from trunkline.runtime.storage import write_atomic

PAUSE = "pause.json"  # in the state folder, while a pause lasts
LOOK_S = 0.5  # between two looks at the clock and at that file
SHORT_S = 60.0  # a request waits for the end of a pause that is no older than this; after that the server is told

logger = logging.getLogger(__name__)


def pause(state: Path, minutes: float | None = None, by: str = "") -> datetime | None:
    """Ask the plant's daemon to stop training, from now on and for `minutes`, or until `resume`; when it ends by itself.

    Raises:
        DeploymentError: `state` is no state folder.
        StorageError: the request cannot be written, so nothing changed.
    """
    if not state.is_dir():
        raise DeploymentError(f"{state}: no such state folder, so no daemon to pause. Name it with --state.")
    since = datetime.now(UTC)
    until = since + timedelta(minutes=minutes) if minutes is not None else None
    record = {"since": since.isoformat(), "until": until.isoformat() if until else None, "by": by or account_name()}
    write_atomic(state / PAUSE, json.dumps(record).encode())
    return until


def resume(state: Path) -> bool:
    """End a pause; False where there was none.

    Raises:
        StorageError: the request cannot be removed.
    """
    was = _read(state) is not None
    try:
        (state / PAUSE).unlink(missing_ok=True)
    except OSError as error:
        raise StorageError(
            f"{state / PAUSE}: cannot be removed ({error.strerror}). Remove it by hand: it is the pause."
        ) from None
    return was


def _read(state: Path) -> dict[str, Any] | None:
    """The pause that lasts, if one does; what cannot be read is one, because somebody asked for something."""
    path = state / PAUSE
    try:
        record = json.loads(path.read_bytes())
        since = datetime.fromisoformat(record["since"])
        until = datetime.fromisoformat(record["until"]) if record["until"] else None
        over = until is not None and until <= datetime.now(UTC)
        return None if over else {"since": since, "until": until, "by": str(record["by"])}
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError):
        with suppress(OSError):  # or it has just gone
            written = datetime.fromtimestamp(path.stat().st_mtime, UTC)
            return {"since": written, "until": None, "by": "a file that cannot be read"}
        return None


def in_words(folder: Path, state: Path) -> str:
    """Why the plant does not train now, for a person; empty where it may."""
    sentences = []
    if (asked := _read(state)) is not None:
        end = f"until {asked['until']:%Y-%m-%d %H:%M:%S} UTC" if asked["until"] else "until `trunkline client resume`"
        sentences.append(f"paused since {asked['since']:%Y-%m-%d %H:%M:%S} UTC by request of {asked['by']}, {end}")
    own = None
    with suppress(ConfigError):  # who starts the daemon is told
        own = read_site(folder).hours
    if own is not None and (opens := hours.calendar_of(own).closed_until(hours.now())) is not None:
        sentences.append(f"outside its hours until {hours.calendar_of(own).in_words(opens)}")
    return "; ".join(sentences)


class Pauses:
    """What holds the training of one plant.

    Args:
        site: as site.toml has it when the daemon starts; the file is read again when it changes.
    """

    def __init__(self, site: SiteConfig, folder: Path, state: Path) -> None:
        self.name = site.name
        self.folder = folder
        self.state = state
        self._hours = site.hours
        self._written = _mark(folder / "site.toml")
        self._asked: dict[str, Any] | None = None
        self._pause = (0, 0)
        self._look_at = 0.0  # monotonic

    def wait_if_paused(self) -> None:
        """Between two steps: return at once where nothing is in the way, else when nothing is any more."""
        if time.monotonic() < self._look_at:
            return
        if why := self._why():
            logger.info("%s: training stands still: %s", self.name, why)
            free_memory()
            while self._why():
                time.sleep(LOOK_S)
            logger.info("%s: training goes on", self.name)
        self._look_at = time.monotonic() + LOOK_S

    def admit(self) -> None:
        """Before anything is trained or scored for an order. A pause that has just begun is waited for: it may be short.

        Raises:
            Away: the plant is outside its hours, or paused for longer.
        """
        while why := self._why():
            asked = self._asked
            now = datetime.now(UTC)
            short = timedelta(seconds=SHORT_S)
            if self._closed_until() is not None or asked is None or now - asked["since"] > short or (
                asked["until"] is not None and asked["until"] - now > short
            ):  # fmt: skip
                raise Away(f"{self.name}: {why}")
            time.sleep(LOOK_S)

    def _why(self) -> str:
        """What the server may read: `closed until 2026-11-23T06:00:00+01:00 by its hours`, or that it is paused; else empty."""
        if (opens := self._closed_until()) is not None:
            return f"closed until {_iso(opens)} by its hours"
        mark = _mark(self.state / PAUSE)
        if mark == (0, 0):
            self._asked = None
        elif mark != self._pause or self._asked is not None:  # one that has an end may be over by now
            self._asked = _read(self.state)
        self._pause = mark
        if self._asked is None:
            return ""
        end = f" until {_iso(self._asked['until'])}" if self._asked["until"] else ""
        return f"paused{end} by request at the plant"

    def _closed_until(self) -> datetime | None:
        mark = _mark(self.folder / "site.toml")
        if mark != self._written:
            self._written = mark
            try:
                self._hours = read_site(self.folder).hours
            except ConfigError as error:  # in the middle of an edit, perhaps
                logger.warning("%s The hours from before hold until it can be read.", error)
        if self._hours is None:
            return None
        opens = hours.calendar_of(self._hours).closed_until(hours.now())
        return opens.astimezone(hours.calendar_of(self._hours).zone) if opens is not None else None


def _mark(path: Path) -> tuple[int, int]:
    """What changes whenever a file is written anew; (0, 0) where there is none."""
    try:
        found = os.stat(path)  # noqa: PTH116 - half as dear as Path.stat, twice a second between two steps
    except OSError:
        return 0, 0
    return found.st_mtime_ns, found.st_size


def free_memory() -> None:
    """Give cached memory of the accelerator back to whoever asked for the pause."""
    import torch  # here, because `trunkline client pause` needs none of it

    torch.cuda.empty_cache()  # nothing where there is none


def _iso(moment: datetime) -> str:
    return moment.isoformat(timespec="seconds")
