"""Failures and recoveries of a daemon, each reported once and in words: `incidents.jsonl` in its state folder.

All processes of a daemon write to it, a line in one piece. Nothing here ever raises: that something went wrong must not
end the process that reports it.
"""

import contextlib
import json
import os
import threading
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from trunkline.runtime.log_files import LineLog

FILE = "incidents.jsonl"
LIMIT = 1 << 20  # bytes, then one generation is kept beside it
REMEMBERED = 500  # subjects whose last text is remembered
TEXT_LIMIT = 1000  # characters of a text: a peer may have had a hand in it

Kind = Literal["refusal", "failure", "recovery", "note"]


class Incidents:
    """The incidents of one daemon, as one of its processes writes them.

    Args:
        state: the daemon's state folder.
        site: the site that they concern, unless a call names another.
    """

    def __init__(self, state: Path, site: str = "") -> None:
        self.site = site
        self._lines = LineLog(state / FILE, LIMIT)
        self._last = ""
        self._lasting: dict[str, str] = {}
        self._lock = threading.Lock()
        # a failure that lasted when the process before this one was killed still lasts
        for incident in read_incidents(state, REMEMBERED):
            self._remember(str(incident.get("about", "")), incident["kind"], incident["text"])

    def note(
        self, kind: Kind, text: str, *, site: str = "", round: int | None = None, remedy: str = "", about: str = ""
    ) -> bool:
        """Write an incident, unless it repeats the last one; whether it was written or waits for room on the disk.

        Args:
            text: what happened, and why as far as it is known. remedy: what a person has to do, or that nothing is.
            about: the subject, "link" say. The same text about one subject is not written again until it is over. A
                recovery is written only after a failure. Without a subject, a text is not written twice in a row.
        """
        text = clean_line(text)
        with self._lock:
            if about and kind == "recovery" and about not in self._lasting:
                return False
            if (self._lasting.get(about) if about else self._last) == text:
                return False
            self._last = text
            self._remember(about, kind, text)
        record = {
            "at": datetime.now(UTC).isoformat(timespec="seconds"),
            "kind": kind,
            "site": site or self.site,
            "round": round,
            "text": text,
            "remedy": clean_line(remedy),
            **({"about": about} if about else {}),
        }
        self._lines.append(json.dumps(record, ensure_ascii=False))
        return True

    def flush(self) -> None:
        """Write the incidents that wait, now that there may be room."""
        self._lines.flush()

    def _remember(self, about: str, kind: str, text: str) -> None:
        if not about:
            return
        self._lasting.pop(about, None)
        if kind != "recovery":
            self._lasting[about] = text
        if len(self._lasting) > REMEMBERED:
            del self._lasting[next(iter(self._lasting))]


def read_incidents(state: Path, count: int) -> list[dict[str, Any]]:
    """The newest incidents of a state folder, oldest first: at, kind, site, round, text, remedy. Damaged lines are skipped."""
    incidents: list[dict[str, Any]] = []
    for name in (FILE, FILE + ".1"):
        if len(incidents) < count:
            incidents = [*_read(state / name, count - len(incidents)), *incidents]
    return incidents


def _read(path: Path, count: int) -> list[dict[str, Any]]:
    try:
        with path.open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - min(2 * LIMIT, count * 2 * TEXT_LIMIT)))
            lines = file.read().splitlines()
    except OSError:
        return []
    incidents: list[dict[str, Any]] = []
    for line in reversed(lines):
        with contextlib.suppress(ValueError):
            incident = json.loads(line)
            if isinstance(incident, dict) and all(isinstance(incident.get(key), str) for key in ("at", "kind", "text")):
                incidents.insert(0, incident)
        if len(incidents) >= count:
            break
    return incidents


def clean_line(text: str) -> str:
    """`text` as one line that cannot steer a terminal, and bounded."""
    return "".join(letter if letter.isprintable() else " " for letter in text[:TEXT_LIMIT])


def join_sentences(*texts: str) -> str:
    """The texts that are not empty, one after another, each with a full stop."""
    return " ".join(text if text[-1] in ".?!" else f"{text}." for text in texts if text)


def write_record(path: Path, record: Mapping[str, Any]) -> bool:
    """Write a small record, whole or not at all, and return whether it was written. It is not flushed to the disk."""
    aside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(os.open(aside, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as file:  # noqa: PTH123 - a mode
            json.dump(record, file)
        aside.replace(path)
    except OSError:
        with contextlib.suppress(OSError):
            aside.unlink(missing_ok=True)
        return False
    return True


def read_record(path: Path) -> dict[str, Any]:
    """The record that `write_record` has put there; empty where there is none that can be read."""
    try:
        record = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return {}
    return record if isinstance(record, dict) else {}
