"""The state of each part of the server, since when, and every problem: `trunkline server status` and `server sites`."""

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trunkline.errors import DeploymentError, TrunklineError
from trunkline.flower.control import list_nodes, list_runs
from trunkline.runtime.health import (
    Rows,
    clock_time,
    describe_child,
    describe_daemon,
    describe_disk,
    fold_rows,
    print_page,
    read_health,
)
from trunkline.runtime.incidents import Incidents, Kind, read_record
from trunkline.runtime.lock import read_status
from trunkline.runtime.progress import EVENTS
from trunkline.server.membership.authority import is_federation, read_federation, warnings
from trunkline.server.membership.registry import list_sites

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

RUNS = "runs"  # below the state folder: a small file a run, beside the runs' own folders
HEAD, TAIL = 64 << 10, 256 << 10  # bytes read at both ends of a long run's events
MOST_RUNS, MOST_SITES = 8, 20  # that a page shows
SITE_COLUMNS = ("site", "state", "since (UTC)", "valid until", "online", "key", "note")
NOTE_WIDTH = 20
GOING = ("running", "waiting", "wanted")  # states of a run that has not ended
ROLES = {
    "superlink": "passes messages on",
    "superexec": "starts the runs",
    "registrar": "lets sites join and renews certificates",
}


def superlink_of(state: Path) -> tuple[str, bytes | None]:
    """Address and certificate authority of the SuperLink of the daemon that runs on `state`.

    Raises:
        DeploymentError: no daemon runs on `state`.
    """
    daemon = read_status(state.resolve())
    if not daemon["running"] or daemon.get("role") != "server":
        raise DeploymentError(
            f"{state}: no server runs on this state folder. `trunkline server start --state {state}`."
        )
    ca = Path(daemon["ca"]).read_bytes() if daemon.get("ca") else None
    return str(daemon["address"]), ca


def status(state: Path) -> dict[str, Any]:
    """The state of the server, for a person or for monitoring.

    Returns:
        running, pid, since, listens, ready; children (name, pid, since, restarts, last_exit, trouble, log); nodes and runs as
        the SuperLink has them, problem if it does not answer; listed (runs of this server: key, name, out, state, since, note, and
        progress); sites (site, state, online, since, note) where there is a federation; disk; incidents; wrong (sentences,
        empty when all is well); well.

    Raises:
        DeploymentError: no daemon ever ran on this folder.
    """
    state = state.resolve()
    summary = read_health(state)
    summary.update(nodes=[], runs=[], problem="", listed=runs_of(state), sites=[], federation="")
    if summary["running"]:
        try:
            address, ca = superlink_of(state)
            nodes = [node for node in list_nodes(address, ca=ca) if node["status"] != "unregistered"]
            summary["nodes"] = [{key: node[key] for key in ("node", "status", "since")} for node in nodes]
            summary["runs"] = list_runs(address, ca=ca)
        except DeploymentError as error:
            summary["problem"] = str(error)
            summary["wrong"].append(f"The SuperLink does not answer: {error}")
    if is_federation(state):
        try:
            summary["federation"] = read_federation(state).name
            online = {node["node"]: node["since"] for node in summary["nodes"] if node["status"] == "online"}
            summary["sites"] = [
                {**row, "online": row["node"] in online, "since": online.get(row["node"], row["since"])}
                for row in list_sites(state)
            ]
            summary["wrong"] += warnings(state)
        except TrunklineError as error:
            summary["wrong"].append(str(error))
    summary["wrong"] += [
        f"Run {run['name']} has failed: {_cause(run)}" for run in summary["listed"] if run["state"] == "failed"
    ]
    summary["well"] = not summary["wrong"]
    return summary


def runs_of(state: Path) -> list[dict[str, Any]]:
    """The runs of this server, unfinished ones first, each with its `progress`."""
    listed = []
    for path in sorted((state / RUNS).glob("*.json")):
        run = read_record(path)
        if isinstance(run.get("name"), str) and isinstance(run.get("state"), str):
            since, out = str(run.get("since") or ""), str(run.get("out") or "")
            listed.append(
                {"key": "", "note": "", **run, "since": since, "progress": progress_of(Path(out)) if out else {}}
            )
    listed.sort(key=lambda run: run["since"], reverse=True)
    return sorted(listed, key=lambda run: run["state"] not in GOING)


def progress_of(out: Path) -> dict[str, Any]:
    """The progress of a run, from its events: phase (gather, round, pause, waiting, score, end, error), and as far as the
    events have them round, rounds, since, got, of, waiting (sites without a reply in this round), text."""
    now: dict[str, Any] = {}
    members: set[str] = set()
    heard: set[str] = set()
    for event in _events(out / EVENTS):
        name, time = event.get("event"), event.get("at")
        if name == "gather":
            sites = event.get("sites")
            now = {
                "phase": "gather",
                "got": len(sites) if isinstance(sites, list) else sites,
                "of": event.get("wanted"),
                "since": time,
            }
        elif name == "start":
            members = set(map(str, event.get("sites") or ()))
            now = {
                "phase": "pause",
                "round": event.get("resumed_at") or 0,
                "rounds": event.get("rounds"),
                "since": time,
            }
        elif name == "round":
            heard = set()
            now = {
                "phase": "round",
                "round": event.get("round"),
                "rounds": event.get("rounds"),
                "since": time,
                "got": 0,
                "of": None,
            }
        elif name == "reply":
            heard.add(str(event.get("site")))
            members.add(str(event.get("site")))
            now |= {"got": event.get("in"), "of": event.get("of")}
        elif name == "round_end":
            now = {"phase": "pause", "round": event.get("round"), "rounds": event.get("rounds"), "since": time}
        elif name == "waiting":
            now = {**now, "phase": "waiting", "text": str(event.get("text", "")), "since": time}
        elif name == "evaluate":
            now = {**now, "phase": "score", "got": event.get("in"), "of": event.get("of"), "since": now.get("since")}
        elif name in ("end", "done", "error"):
            now = {
                **now,
                "phase": "error" if name == "error" else "end",
                "text": str(event.get("text", "")),
                "since": time,
            }
    waiting = sorted(members - heard - {""})
    # with a sampled cohort, or after a site has joined, the events do not tell which sites are missing
    if now.get("phase") == "round" and members and now["of"] in (None, len(members)):
        now |= {"waiting": waiting, "of": len(members)}
    return now


def _events(path: Path) -> Iterable[dict[str, Any]]:
    """The events of a run; of a long run only those at its start and end."""
    try:
        with path.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(0)
            data = file.read(min(size, HEAD + TAIL))
            if size > HEAD + TAIL:
                file.seek(size - TAIL)
                data = data[:HEAD].rpartition(b"\n")[0] + b"\n" + file.read().partition(b"\n")[2]
    except OSError:
        return
    for line in data.splitlines():
        try:
            event = json.loads(line)
        except ValueError:  # a line cut short by a kill, or still being written
            continue
        if isinstance(event, dict):
            yield event


def run_words(run: Mapping[str, Any]) -> str:
    """One run in words: `round 7 of 30 since 02:14, 3 of 4 sites in, waiting for mill-04`."""
    state, when = run["state"], clock_time(run["since"])
    if state == "wanted":
        return f"to be started, since {when}"
    if state in ("running", "waiting"):
        words = progress_words(run.get("progress") or {})
        return f"waiting since {when}: {run['note'] or words}" if state == "waiting" else words
    how = {"completed": "completed", "stopped": "stopped"}.get(state, state)
    return f"{how} {when}" + (f": {_cause(run)}" if state != "completed" and _cause(run) else "")


def progress_words(now: Mapping[str, Any]) -> str:
    """The phase of an unfinished run."""
    phase, since = now.get("phase"), f" since {clock_time(now['since'])}" if now.get("since") else ""
    rounds = f" of {now['rounds']}" if now.get("rounds") else ""
    got = f", {now['got'] or 0} of {now['of']} sites in" if now.get("of") else ""
    if phase == "gather":
        return f"waiting for sites{since}{got.replace(' in', ' here')}"
    if phase == "round":
        missing = now.get("waiting") or []
        names = ", ".join(missing[:3]) + (f" and {len(missing) - 3} more" if len(missing) > 3 else "")
        return f"round {now['round']}{rounds}{since}{got}" + (f", waiting for {names}" if names else "")
    if phase == "waiting":
        return f"waiting{since}: {now['text']}"
    if phase == "pause":
        return f"round {now['round']}{rounds} is done{since}, the next begins"
    if phase == "score":
        return f"scoring on test data{got}"
    return {"end": "writing its report", "error": f"stopped: {now.get('text')}"}.get(str(phase), "about to begin")


def _cause(run: Mapping[str, Any]) -> str:
    return str(run.get("note") or (run.get("progress") or {}).get("text") or "")


def note_event(incidents: Incidents, run: str, event: Mapping[str, Any]) -> None:
    """Add a run's event to the server's incidents if it is one: a refused reply, a wait for sites, sites that are back."""
    name = event.get("event")
    kinds: dict[Any, Kind] = {"reply": "refusal", "waiting": "failure", "recovered": "recovery"}
    text = event.get("refused") if name == "reply" else event.get("text")
    if name in kinds and text:
        remedy = "" if name != "reply" else "The round continues without it; fix the cause at the site."
        site, round = str(event.get("site") or ""), event.get("round")
        incidents.note(kinds[name], f"run {run}: {text}", site=site, round=round, remedy=remedy)


def site_words(row: Mapping[str, Any]) -> str:
    if row["state"] == "enrolled":
        words = f"online since {clock_time(row['since'])}" if row["online"] else "offline"
    else:
        words = str(row["state"])
    return f"{words}; {row['note']}" if row["note"] else words


def headline(info: Mapping[str, Any], state: Path) -> str:
    """The state of the server in one line, for systemd."""
    runs = [f"{run['name']}: {run_words(run)}" for run in runs_of(state)[:MOST_RUNS] if run["state"] in GOING]
    return "; ".join([f"serving at {info['listens']}", *(runs or ["no run under way"])])


def print_status(summary: Mapping[str, Any], console: "Console") -> None:
    """The result of `status` as a page for a person."""
    rows: Rows = [("daemon", describe_daemon(summary))]
    roles = dict(ROLES)
    if summary["running"]:
        online = sum(node["status"] == "online" for node in summary["nodes"])
        members = len([site for site in summary["sites"] if site["state"] == "enrolled"] or summary["nodes"])
        serving = f"serving {online} of {members} sites at {summary['listens']}"
        gated = any(child["name"] == "gateway" for child in summary["children"])
        roles["gateway" if gated else "superlink"] = serving if summary.get("ready") else f"opens {summary['listens']}"
        rows += [(child["name"], describe_child(child, roles.get(child["name"], ""))) for child in summary["children"]]
    rows.append(("disk", describe_disk(summary)))
    listed = summary["listed"]
    runs: Rows = [(run["name"], run_words(run)) for run in listed[:MOST_RUNS]]
    run_ids = {str(run_id) for run in listed for run_id in (run.get("number"), *run.get("former", ()))}
    for run in summary["runs"][: MOST_RUNS - len(runs)]:
        if str(run["run"]) not in run_ids:
            details = f": {run['details']}" if run["details"] else ""
            runs.append((f"run {run['run']}", f"{run['status']} since {clock_time(run['started'])}{details}"))
    shown = summary["sites"]
    if len(shown) > MOST_SITES:  # the page has no room for all, and the missing sites are the news
        shown = [site for site in shown if not site["online"]][:MOST_SITES]
    site_rows: Rows = [(site["site"], site_words(site)) for site in shown]
    federation = summary["federation"]
    title = f"server of {federation}" if federation else f"server at {summary['listens']}"
    print_page(title, [("", rows), ("runs", runs), ("sites", site_rows)], summary, console)


def print_sites(state: Path, console: "Console") -> None:
    """Every site of the federation, and whether it is online if the server runs; no site name is ever cut.

    A table where all of its columns fit the console beside a note of NOTE_WIDTH characters, else a block of lines a site.
    """
    online: set[int] = set()
    title = f"sites of {read_federation(state).name}"
    try:
        address, ca = superlink_of(state)
        online = {node["node"] for node in list_nodes(address, ca=ca) if node["status"] == "online"}
    except DeploymentError:
        title += " (the server is not running, so no site is online)"
    rows = [
        (
            row["site"],
            row["state"],
            row["since"][:10],
            row["until"][:10],
            "yes" if row["node"] in online else "no" if row["state"] == "enrolled" else "",
            row["key"][:8],
            row["note"],
        )
        for row in list_sites(state)
    ]
    widths = [max(map(len, column)) for column in zip(SITE_COLUMNS, *rows, strict=True)]
    if sum(widths[:-1]) + min(widths[-1], NOTE_WIDTH) + 3 * len(widths) + 1 <= console.width:
        console.print(_sites_table(title, rows))
        return
    console.print(title, markup=False, highlight=False, soft_wrap=True)
    for name, *cells in rows:
        console.print(name, style="bold", markup=False, highlight=False, soft_wrap=True)
        text = ", ".join(f"{column} {cell}" for column, cell in zip(SITE_COLUMNS[1:], cells, strict=True) if cell)
        for line in fold_rows([("", text)], console.width):
            console.print(line, markup=False, highlight=False, soft_wrap=True)


def _sites_table(title: str, rows: Iterable[tuple[str, ...]]) -> "Table":
    from rich.table import Table
    from rich.text import Text

    table = Table(title=title, title_justify="left")
    for name in SITE_COLUMNS:
        table.add_column(name, overflow="fold", no_wrap=name != "note")
    for row in rows:
        table.add_row(*map(Text, row))
    return table
