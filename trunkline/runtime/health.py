"""The state of a daemon in plain words: what `server status` and `client status` have in common."""

import textwrap
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trunkline.runtime import disk
from trunkline.runtime.incidents import clean_line, join_sentences, read_incidents
from trunkline.runtime.lock import read_status

if TYPE_CHECKING:
    from rich.console import Console

INCIDENTS_SHOWN = 6
Rows = list[tuple[str, str]]  # a part of the daemon and what it does


def read_health(state: Path) -> dict[str, Any]:
    """What every daemon's status begins with: status.json, `running`, `disk`, `incidents`, and `wrong`: sentences, empty when well.

    Raises:
        DeploymentError: no daemon ever ran on this folder.
    """
    status = read_status(state)
    problem = disk.find_visible_problem(state)
    low = disk.is_low(state)
    words = disk.describe_free(state)
    room = {"free_bytes": disk.free_bytes(state), "low": low, "problem": problem, "words": words}
    faults = []
    if not status["running"]:
        end = f"ended {clock_time(status['ended'])}" if status.get("ended") else "was killed, or its machine went down"
        faults.append(f"The daemon does not run (it {end}).")
    if problem:
        faults.append(f"{state}: {problem} ({words}). Free space there; everything goes on by itself.")
    elif low:
        faults.append(f"{state}: the disk is nearly full ({words}).")
    if status["running"]:
        faults += [
            join_sentences(child["trouble"], f"Its log: {child['log']}")
            for child in status["children"]
            if child.get("trouble")
        ]
    incidents = read_incidents(state, INCIDENTS_SHOWN)
    return {**status, "state": str(state), "disk": room, "incidents": incidents, "wrong": faults}


def describe_child(child: Mapping[str, Any], activity: str = "") -> str:
    """One process of a daemon that runs, in words; `activity` is what it does when all is well."""
    words = [child["trouble"].removeprefix(f"{child['name']} ") if child.get("trouble") else activity]
    if child["pid"]:
        words.append(f"up since {clock_time(child['since'])}")
    elif not child.get("trouble"):
        words.append("starts" if not child["since"] else f"ended ({child['last_exit']})")
    if child["restarts"]:
        times = "once" if child["restarts"] == 1 else f"{child['restarts']} times"
        words.append(f"started again {times}, last after {child['last_exit']}")
    return ", ".join(word for word in words if word)


def describe_daemon(status: Mapping[str, Any]) -> str:
    if not status["running"]:
        return f"does not run; it was started {clock_time(status['since'])}"
    return f"runs since {clock_time(status['since'])}, pid {status['pid']}"


def describe_disk(status: Mapping[str, Any]) -> str:
    room = status["disk"]
    problem = room["problem"] or ("nearly full" if room["low"] else "")
    return ", ".join(words for words in (problem, room["words"]) if words)


def clock_time(moment: str | float, seconds: bool = False) -> str:
    """A time (ISO 8601, or Unix seconds) in UTC as a person writes it: `02:14`, with the date unless that is today's."""
    try:
        if isinstance(moment, str):
            time = datetime.fromisoformat(moment).astimezone(UTC)
        else:
            time = datetime.fromtimestamp(moment, UTC)
    except (ValueError, TypeError, OverflowError, OSError):
        return "an unknown time"
    is_today = time.date() == datetime.now(UTC).date()
    return time.strftime(("" if is_today else "%Y-%m-%d ") + ("%H:%M:%S" if seconds else "%H:%M"))


def print_page(title: str, sections: Iterable[tuple[str, Rows]], status: Mapping[str, Any], console: "Console") -> None:
    """Print the title, named sections of rows (the first may have no name), what is wrong, and the last incidents.

    Written as plain lines, folded under their own text: a narrow terminal and a log file get the same words.
    """
    lines = [f"{title} (times in UTC)"]
    faults: Rows = [("", fault) for fault in status["wrong"]] or [("", "nothing")]
    incidents = [_incident_row(incident, status.get("site")) for incident in status["incidents"]]
    for name, rows in (*sections, ("wrong", faults), ("last incidents", incidents)):
        if rows:
            lines += [name] if name else []
            lines += fold_rows(rows, console.width)
    for line in lines:
        console.print(line, markup=False, highlight=False, soft_wrap=True)


def _incident_row(incident: Mapping[str, Any], page_site: str | None) -> tuple[str, str]:
    site = incident.get("site") if incident.get("site") != page_site else ""  # a plant's own page names it above
    round = f"round {incident['round']}" if incident.get("round") is not None else ""
    about = ", ".join(part for part in (site, round) if part)
    is_named = not about or about in incident["text"]  # the events of a run name site and round themselves
    text = incident["text"] if is_named else f"{about}: {incident['text']}"
    time = clock_time(incident["at"], seconds=True)
    return f"{time} {incident['kind']}", join_sentences(text, incident.get("remedy") or "")


def fold_rows(rows: Rows, width: int) -> list[str]:
    """Rows in two columns, the second folded to what is left of `width` characters.

    A site's name, a digest or a path is never cut, so that it can be searched and copied: a row whose name or longest word
    does not fit its column gets a line for its name, and its text below.
    """
    first = max((len(name) for name, _ in rows if len(name) <= width // 3), default=0)
    lines = []
    for name, text in rows:
        indent = "  " + (" " * (first + 2) if first else "")
        words = clean_line(text).split()
        stacked = bool(name) and (len(name) > first or max(map(len, words), default=0) >= width - len(indent))
        if stacked:
            indent = "    "
        wrapped = textwrap.wrap(
            " ".join(words), max(20, width - len(indent) - 1), break_on_hyphens=False, break_long_words=False
        )
        if stacked:
            lines += [f"  {name}", *(indent + line for line in wrapped)]
        else:
            start = "  " + name.ljust(first + 2 if first else 0)
            lines.append((start + (wrapped[0] if wrapped else "")).rstrip())
            lines += [indent + line for line in wrapped[1:]]
    return lines
