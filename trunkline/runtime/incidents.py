"""What went wrong and what was mended, each once and in words: `incidents.jsonl` in a daemon's state folder.

All processes of a daemon write to it, a line in one piece. Nothing here ever raises: that something went wrong must not
be what ends the process that says so.
"""

import contextlib
import fcntl
import json
import os
import threading
from collections import deque
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

FILE = "incidents.jsonl"
LIMIT = 1 << 20  # bytes, then one generation is kept beside it
HELD = 200  # lines kept in memory while the disk takes none
REMEMBERED = 500  # subjects of which it is known what was said last
TEXT_LIMIT = 1000  # characters of a text: a peer may have had a hand in it

Kind = Literal["refusal", "failure", "recovery", "note"]


class Lines:
    """A file that many processes append lines to; one that grew beyond `limit` bytes becomes `<file>.1`.

    What could not be written is held, and comes before the next line that can be.
    """

    def __init__(self, path: Path, limit: int = LIMIT) -> None:
        self.path = path
        self.limit = limit
        self._held: deque[str] = deque(maxlen=HELD)
        self._lock = threading.Lock()

    def append(self, line: str) -> bool:
        """Whether it is in the file now."""
        with self._lock:
            self._held.append(line)
        return self.flush()

    def flush(self) -> bool:
        """Write what was held; whether nothing is held any more."""
        with self._lock:
            while self._held:
                if not self._write(self._held[0]):
                    return False
                self._held.popleft()
            return True

    def _write(self, line: str) -> bool:
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            descriptor = os.open(self.path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
            try:
                size = os.fstat(descriptor).st_size
                torn = (
                    size and os.pread(descriptor, 1, size - 1) != b"\n"
                )  # of a writer that was killed, or a full disk
                data = b"\n" * bool(torn) + line.encode(errors="replace") + b"\n"
                whole = os.write(descriptor, data) == len(data)
                if whole and size + len(data) > self.limit:
                    self._set_aside(descriptor)
                return whole
            finally:
                os.close(descriptor)
        except OSError:
            return False

    def _set_aside(self, descriptor: int) -> None:
        """Rename it, unless another process does that at this moment, or has done it already."""
        with contextlib.suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.fstat(descriptor).st_ino == self.path.stat().st_ino:
                self.path.replace(self.path.with_name(self.path.name + ".1"))


class Incidents:
    """The incidents of one daemon, as one of its processes writes them.

    Args:
        state: the daemon's state folder.
        site: whom they are about unless a call says otherwise.
    """

    def __init__(self, state: Path, site: str = "") -> None:
        self.site = site
        self._lines = Lines(state / FILE)
        self._last = ""
        self._lasting: dict[str, str] = {}
        self._lock = threading.Lock()
        for one in recent(state, REMEMBERED):  # what lasted when the process before this one was killed still does
            self._remember(str(one.get("about", "")), one["kind"], one["text"])

    def note(
        self, kind: Kind, text: str, *, site: str = "", round: int | None = None, remedy: str = "", about: str = ""
    ) -> bool:
        """Write a line, unless it was said already; whether it was written or is held until there is room.

        Args:
            text: what happened, and why as far as it is known. remedy: what a person has to do, or that nothing is.
            about: the subject, "link" say. The same text about the same subject is not said again until it is over, and a
                recovery only where there was something to recover from. Without one, not twice in a row.
        """
        text = clean(text)
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
            "remedy": clean(remedy),
            **({"about": about} if about else {}),
        }
        self._lines.append(json.dumps(record, ensure_ascii=False))
        return True

    def flush(self) -> None:
        """Write what is held, now that there may be room."""
        self._lines.flush()

    def _remember(self, about: str, kind: str, text: str) -> None:
        if not about:
            return
        self._lasting.pop(about, None)
        if kind != "recovery":
            self._lasting[about] = text
        if len(self._lasting) > REMEMBERED:
            del self._lasting[next(iter(self._lasting))]


def recent(state: Path, count: int) -> list[dict[str, Any]]:
    """The newest incidents of a state folder, oldest first: at, kind, site, round, text, remedy. Damaged lines are passed over."""
    found: list[dict[str, Any]] = []
    for name in (FILE, FILE + ".1"):
        if len(found) < count:
            found = [*_read(state / name, count - len(found)), *found]
    return found


def _read(path: Path, count: int) -> list[dict[str, Any]]:
    try:
        with path.open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - min(2 * LIMIT, count * 2 * TEXT_LIMIT)))
            lines = file.read().splitlines()
    except OSError:
        return []
    found: list[dict[str, Any]] = []
    for line in reversed(lines):
        with contextlib.suppress(ValueError):
            one = json.loads(line)
            if isinstance(one, dict) and all(isinstance(one.get(key), str) for key in ("at", "kind", "text")):
                found.insert(0, one)
        if len(found) >= count:
            break
    return found


def clean(text: str) -> str:
    """`text` as one line that cannot steer a terminal, and bounded."""
    return "".join(letter if letter.isprintable() else " " for letter in text[:TEXT_LIMIT])


def sentences(*texts: str) -> str:
    """Texts as sentences after one another, each with its stop."""
    return " ".join(one if one[-1] in ".?!" else f"{one}." for one in texts if one)


def keep(path: Path, record: Mapping[str, Any]) -> bool:
    """Put a small record for somebody who looks at `path`: whole or not at all. Not flushed to the disk, and never an error."""
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


def look_up(path: Path) -> dict[str, Any]:
    """What `keep` has put there; empty where there is nothing that can be read."""
    try:
        found = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
