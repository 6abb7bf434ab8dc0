"""How a daemon stands, in plain words: what `server status` and `client status` have in common."""

import textwrap
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trunkline.runtime import disk
from trunkline.runtime.incidents import clean, recent, sentences
from trunkline.runtime.lock import read_status

if TYPE_CHECKING:
    from rich.console import Console

SHOWN = 6  # incidents
Rows = list[tuple[str, str]]  # a part and what it does


def base_of(state: Path) -> dict[str, Any]:
    """What every daemon's status begins with: status.json, `running`, `disk`, `incidents`, and `wrong`: sentences, empty when well.

    Raises:
        DeploymentError: no daemon ever ran on this folder.
    """
    found = read_status(state)
    problem = disk.seen(state)
    low = disk.is_low(state)
    words = disk.in_words(state)
    room = {"free_bytes": disk.free(state), "low": low, "problem": problem, "words": words}
    wrong = []
    if not found["running"]:
        how = f"ended {clock(found['ended'])}" if found.get("ended") else "was killed, or its machine went down"
        wrong.append(f"The daemon does not run (it {how}).")
    if problem:
        wrong.append(f"{state}: {problem} ({words}). Free space there; everything goes on by itself.")
    elif low:
        wrong.append(f"{state}: the disk is nearly full ({words}).")
    if found["running"]:
        wrong += [
            sentences(one["trouble"], f"Its log: {one['log']}") for one in found["children"] if one.get("trouble")
        ]
    return {**found, "state": str(state), "disk": room, "incidents": recent(state, SHOWN), "wrong": wrong}


def child_words(child: Mapping[str, Any], does: str = "") -> str:
    """One process of a daemon that runs."""
    words = [child["trouble"].removeprefix(f"{child['name']} ") if child.get("trouble") else does]
    if child["pid"]:
        words.append(f"up since {clock(child['since'])}")
    elif not child.get("trouble"):
        words.append("starts" if not child["since"] else f"ended ({child['last_exit']})")
    if child["restarts"]:
        times = "once" if child["restarts"] == 1 else f"{child['restarts']} times"
        words.append(f"started again {times}, last after {child['last_exit']}")
    return ", ".join(one for one in words if one)


def daemon_words(found: Mapping[str, Any]) -> str:
    if not found["running"]:
        return f"does not run; it was started {clock(found['since'])}"
    return f"runs since {clock(found['since'])}, pid {found['pid']}"


def disk_words(found: Mapping[str, Any]) -> str:
    room = found["disk"]
    how = room["problem"] or ("nearly full" if room["low"] else "")
    return ", ".join(one for one in (how, room["words"]) if one)


def clock(moment: str | float, seconds: bool = False) -> str:
    """A time (ISO 8601, or Unix seconds) as a person says it, in UTC: `02:14`, with the date where that is not today's."""
    try:
        if isinstance(moment, str):
            at = datetime.fromisoformat(moment).astimezone(UTC)
        else:
            at = datetime.fromtimestamp(moment, UTC)
    except (ValueError, TypeError, OverflowError, OSError):
        return "an unknown time"
    today = at.date() == datetime.now(UTC).date()
    return at.strftime(("" if today else "%Y-%m-%d ") + ("%H:%M:%S" if seconds else "%H:%M"))


def print_page(title: str, sections: Iterable[tuple[str, Rows]], found: Mapping[str, Any], console: "Console") -> None:
    """The title, a section of rows each with a name (the first may have none), what is wrong, and the last incidents.

    Written as plain lines, folded under their own text: a narrow terminal and a log file get the same words.
    """
    lines = [f"{title} (times in UTC)"]
    wrong: Rows = [("", one) for one in found["wrong"]] or [("", "nothing")]
    incidents: Rows = []
    for one in found["incidents"]:
        site = one.get("site") if one.get("site") != found.get("site") else ""  # a plant's own page names it above
        about = ", ".join(
            part for part in (site, f"round {one['round']}" if one.get("round") is not None else "") if part
        )
        named = not about or about in one["text"]  # what a run tells says it in its own words
        text = sentences(one["text"] if named else f"{about}: {one['text']}", one.get("remedy") or "")
        incidents.append((f"{clock(one['at'], seconds=True)} {one['kind']}", text))
    for name, rows in (*sections, ("wrong", wrong), ("last incidents", incidents)):
        if rows:
            lines += [name] if name else []
            lines += folded(rows, console.width)
    for line in lines:
        console.print(line, markup=False, highlight=False, soft_wrap=True)


def folded(rows: Rows, width: int) -> list[str]:
    """Rows in two columns, the second folded to what is left of `width` characters; no name is ever cut.

    A name that would leave the second column too narrow gets a line of its own.
    """
    first = max((len(name) for name, _ in rows if len(name) <= width // 3), default=0)
    indent = "  " + (" " * (first + 2) if first else "")
    lines = []
    for name, text in rows:
        # a word longer than the column is a site's name, a path or an address: whole, it can be searched and copied
        wrapped = textwrap.wrap(
            clean(text), max(20, width - len(indent) - 1), break_on_hyphens=False, break_long_words=False
        ) or [""]
        if len(name) > first:
            lines += [f"  {name}", (indent + wrapped[0]).rstrip()]
        else:
            lines.append(("  " + name.ljust(first + 2 if first else 0) + wrapped[0]).rstrip())
        lines += [indent + one for one in wrapped[1:]]
    return lines
