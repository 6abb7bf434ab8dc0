"""What each part of the centre does now, since when, and what is wrong: `trunkline server status`."""

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trunkline.errors import DeploymentError, TrunklineError
from trunkline.flower.control import list_nodes, list_runs
from trunkline.runtime.health import Rows, base_of, child_words, clock, daemon_words, disk_words, print_page
from trunkline.runtime.incidents import Incidents, Kind, look_up
from trunkline.runtime.lock import read_status
from trunkline.runtime.progress import EVENTS
from trunkline.server.membership.authority import is_federation, read_federation, sites, warnings

if TYPE_CHECKING:
    from rich.console import Console

RUNS = "runs"  # below the state folder: a small file a run, beside the runs' own folders
HEAD, TAIL = 64 << 10, 256 << 10  # bytes read at both ends of a long run's events
MOST_RUNS, MOST_SITES = 8, 20  # that a page shows
GOING = ("running", "waiting", "wanted")  # states of a run that has not ended
DOES = {
    "superlink": "passes messages on",
    "superexec": "starts the runs",
    "registrar": "lets sites join and renews certificates",
}


def where(state: Path) -> tuple[str, bytes | None]:
    """Address and certificate authority of the SuperLink of the daemon that runs on `state`.

    Raises:
        DeploymentError: none runs there.
    """
    found = read_status(state.resolve())
    if not found["running"] or found.get("role") != "server":
        raise DeploymentError(
            f"{state}: no server runs on this state folder. `trunkline server start --state {state}`."
        )
    ca = Path(found["ca"]).read_bytes() if found.get("ca") else None
    return str(found["address"]), ca


def status(state: Path) -> dict[str, Any]:
    """How the centre stands, for a person or for monitoring.

    Returns:
        running, pid, since, listens, ready; children (name, pid, since, restarts, last_exit, trouble, log); nodes and runs as
        the SuperLink has them, problem if it is mute; listed (runs of this centre: key, name, out, state, since, note, and
        progress); sites (site, state, online, since, note) where there is a federation; disk; incidents; wrong (sentences,
        empty when all is well); well.

    Raises:
        DeploymentError: no daemon ever ran on this folder.
    """
    state = state.resolve()
    found = base_of(state)
    found.update(nodes=[], runs=[], problem="", listed=runs_of(state), sites=[], federation="")
    if found["running"]:
        try:
            address, ca = where(state)
            nodes = [node for node in list_nodes(address, ca=ca) if node["status"] != "unregistered"]
            found["nodes"] = [{key: node[key] for key in ("node", "status", "since")} for node in nodes]
            found["runs"] = list_runs(address, ca=ca)
        except DeploymentError as error:
            found["problem"] = str(error)
            found["wrong"].append(f"The SuperLink is mute: {error}")
    if is_federation(state):
        try:
            found["federation"] = read_federation(state).name
            online = {node["node"]: node["since"] for node in found["nodes"] if node["status"] == "online"}
            found["sites"] = [
                {**row, "online": row["node"] in online, "since": online.get(row["node"], row["since"])}
                for row in sites(state)
            ]
            found["wrong"] += warnings(state)
        except TrunklineError as error:
            found["wrong"].append(str(error))
    found["wrong"] += [
        f"Run {one['name']} has failed: {_why(one)}" for one in found["listed"] if one["state"] == "failed"
    ]
    found["well"] = not found["wrong"]
    return found


def runs_of(state: Path) -> list[dict[str, Any]]:
    """The runs that this centre was given, those under way first, each with its `progress`."""
    listed = []
    for path in sorted((state / RUNS).glob("*.json")):
        one = look_up(path)
        if isinstance(one.get("name"), str) and isinstance(one.get("state"), str):
            since, out = str(one.get("since") or ""), str(one.get("out") or "")
            listed.append(
                {"key": "", "note": "", **one, "since": since, "progress": progress_of(Path(out)) if out else {}}
            )
    listed.sort(key=lambda one: one["since"], reverse=True)
    return sorted(listed, key=lambda one: one["state"] not in GOING)


def progress_of(out: Path) -> dict[str, Any]:
    """Where a run stands, by what it has told: phase (gather, round, pause, score, end, error), and as far as known round,
    rounds, since, got, of, waiting (sites not heard of in this round), text."""
    now: dict[str, Any] = {}
    members: set[str] = set()
    heard: set[str] = set()
    for event in _events(out / EVENTS):
        name, at = event.get("event"), event.get("at")
        if name == "gather":
            there = event.get("sites")
            now = {
                "phase": "gather",
                "got": len(there) if isinstance(there, list) else there,
                "of": event.get("wanted"),
                "since": at,
            }
        elif name == "start":
            members = set(map(str, event.get("sites") or ()))
            now = {"phase": "pause", "round": event.get("resumed_at") or 0, "rounds": event.get("rounds"), "since": at}
        elif name == "round":
            heard = set()
            now = {
                "phase": "round",
                "round": event.get("round"),
                "rounds": event.get("rounds"),
                "since": at,
                "got": 0,
                "of": None,
            }
        elif name == "reply":
            heard.add(str(event.get("site")))
            members.add(str(event.get("site")))
            now |= {"got": event.get("in"), "of": event.get("of")}
        elif name == "round_end":
            now = {"phase": "pause", "round": event.get("round"), "rounds": event.get("rounds"), "since": at}
        elif name == "waiting":
            now = {**now, "phase": "waiting", "text": str(event.get("text", "")), "since": at}
        elif name == "evaluate":
            now = {**now, "phase": "score", "got": event.get("in"), "of": event.get("of"), "since": now.get("since")}
        elif name in ("end", "done", "error"):
            now = {
                **now,
                "phase": "error" if name == "error" else "end",
                "text": str(event.get("text", "")),
                "since": at,
            }
    waiting = sorted(members - heard - {""})
    # where only a share is asked, or somebody joined since, nobody can say from here who is missing
    if now.get("phase") == "round" and members and now["of"] in (None, len(members)):
        now |= {"waiting": waiting, "of": len(members)}
    return now


def _events(path: Path) -> Iterable[dict[str, Any]]:
    """The events of a run; of a long one those at both ends."""
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


def run_words(one: Mapping[str, Any]) -> str:
    """One run in words: `round 7 of 30 since 02:14, 3 of 4 sites in, waiting for mill-04`."""
    state, when = one["state"], clock(one["since"])
    if state == "wanted":
        return f"to be started, since {when}"
    if state in ("running", "waiting"):
        words = progress_words(one.get("progress") or {})
        return f"waiting since {when}: {one['note'] or words}" if state == "waiting" else words
    how = {"completed": "completed", "stopped": "stopped"}.get(state, state)
    return f"{how} {when}" + (f": {_why(one)}" if state != "completed" and _why(one) else "")


def progress_words(now: Mapping[str, Any]) -> str:
    """What a run under way does now."""
    phase, since = now.get("phase"), f" since {clock(now['since'])}" if now.get("since") else ""
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


def _why(one: Mapping[str, Any]) -> str:
    return str(one.get("note") or (one.get("progress") or {}).get("text") or "")


def note_event(incidents: Incidents, run: str, event: Mapping[str, Any]) -> None:
    """Put what a run tells among the centre's incidents, where it is one: a reply set aside, sites that are waited for or back."""
    name = event.get("event")
    kinds: dict[Any, Kind] = {"reply": "refusal", "waiting": "failure", "recovered": "recovery"}
    text = event.get("refused") if name == "reply" else event.get("text")
    if name in kinds and text:
        remedy = "" if name != "reply" else "The round goes on without it; mend what the text names at the site."
        site, round = str(event.get("site") or ""), event.get("round")
        incidents.note(kinds[name], f"run {run}: {text}", site=site, round=round, remedy=remedy)


def site_words(row: Mapping[str, Any]) -> str:
    if row["state"] == "enrolled":
        words = f"online since {clock(row['since'])}" if row["online"] else "offline"
    else:
        words = str(row["state"])
    return f"{words}; {row['note']}" if row["note"] else words


def headline(info: Mapping[str, Any], state: Path) -> str:
    """The whole in one line, for systemd."""
    runs = [f"{one['name']}: {run_words(one)}" for one in runs_of(state)[:MOST_RUNS] if one["state"] in GOING]
    return "; ".join([f"serving at {info['listens']}", *(runs or ["no run under way"])])


def print_status(found: Mapping[str, Any], console: "Console") -> None:
    """What `status` found, for a person."""
    rows: Rows = [("daemon", daemon_words(found))]
    does = dict(DOES)
    if found["running"]:
        online = sum(node["status"] == "online" for node in found["nodes"])
        known = len([one for one in found["sites"] if one["state"] == "enrolled"] or found["nodes"])
        serving = f"serving {online} of {known} sites at {found['listens']}"
        gated = any(one["name"] == "gateway" for one in found["children"])
        does["gateway" if gated else "superlink"] = serving if found.get("ready") else f"opens {found['listens']}"
        rows += [(one["name"], child_words(one, does.get(one["name"], ""))) for one in found["children"]]
    rows.append(("disk", disk_words(found)))
    runs: Rows = [(one["name"], run_words(one)) for one in found["listed"][:MOST_RUNS]]
    known_numbers = {str(number) for one in found["listed"] for number in (one.get("number"), *one.get("former", ()))}
    for one in found["runs"][: MOST_RUNS - len(runs)]:
        if str(one["run"]) not in known_numbers:
            told = f": {one['details']}" if one["details"] else ""
            runs.append((f"run {one['run']}", f"{one['status']} since {clock(one['started'])}{told}"))
    listed = found["sites"]
    if len(listed) > MOST_SITES:  # then those that are not there are the news
        listed = [one for one in listed if not one["online"]][:MOST_SITES]
    places: Rows = [(one["site"], site_words(one)) for one in listed]
    title = f"centre of {found['federation']}" if found["federation"] else f"centre at {found['listens']}"
    print_page(title, [("", rows), ("runs", runs), ("sites", places)], found, console)
