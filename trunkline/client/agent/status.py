"""What a plant's daemon does now, since when, and what is wrong: `trunkline client status`."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trunkline.client.availability import in_words
from trunkline.runtime.health import clock_time, describe_child, describe_daemon, describe_disk, print_page, read_health
from trunkline.runtime.incidents import read_record
from trunkline.runtime.programs import accepts_connections

if TYPE_CHECKING:
    from rich.console import Console

ACTIVITY = "activity.json"  # in the state folder: what the worker does, as `activity` keeps it
DOES = {"supernode": "fetches what the centre asks", "executor": "answers it"}


def state_of(site_dir: Path) -> Path:
    """Where a site's daemon keeps its state unless told otherwise."""
    return site_dir / ".trunkline"


def status(site_dir: Path, state: Path | None = None) -> dict[str, Any]:
    """How this site's daemon stands, for a person or for monitoring.

    Returns:
        running, pid, since, site, server, joined, link, connected, link_since, warnings; children (name, pid, since,
        restarts, last_exit, trouble, log); activity (doing, since, last); away (why it does not train, or empty); disk
        (free_bytes, low, problem, words); incidents; wrong (sentences, empty when all is well); well.

    Raises:
        DeploymentError: no daemon ever ran on this folder.
    """
    state = (state or state_of(site_dir)).resolve()
    found = read_health(state)
    found |= {
        "activity": read_record(state / ACTIVITY),
        "away": in_words(site_dir, state),
        "warnings": found.get("warnings", []),
    }
    if found["running"]:
        if not found.get("joined"):
            found["connected"] = accepts_connections(found["server"])
            found["link"] = "" if found["connected"] else "nobody listens there"
        if found.get("link") and not found["connected"] and found.get("ready"):
            found["wrong"].append(f"No link to the centre at {found['server']}: {found['link']}")
        found["wrong"] += found["warnings"]
    found["well"] = not found["wrong"]
    return found


def link_words(found: Mapping[str, Any]) -> str:
    """The way to the centre."""
    server, since = found["server"], clock_time(found["link_since"]) if found.get("link_since") else ""
    if not found.get("joined"):
        reached = "" if found.get("connected", True) else ", where nobody listens; it is tried again"
        return f"asks {server} for work on this machine{reached}; not a member of a federation"
    if found.get("connected"):
        return f"connected to {server} as {found['site']} since {since}"
    return f"no link to {server} since {since}; it is tried again" if since else f"asks {server} for the first time"


def doing_words(activity: Mapping[str, Any], pid: int | None = None) -> str:
    """What the worker does; of another process than `pid`, only what it did last."""
    if not activity:
        return "starts"
    last = ""
    if was := activity.get("last"):
        how = "answered" if was.get("outcome") == "answered" else f"ended with {was.get('outcome')}"
        run = f" of {was['run']}" if was.get("run") else ""
        last = f"{was.get('what')}{run} {how} at {clock_time(was.get('at', ''))} after {was.get('seconds', 0):g} s"
    if pid is not None and activity.get("pid") != pid:
        return f"starts; before that: {last}" if last else "starts"
    if doing := activity.get("doing"):
        run = f" of {doing['run']}" if doing.get("run") else ""
        return f"{doing.get('what')}{run} since {clock_time(activity.get('since', ''))}"
    return f"idle since {clock_time(activity.get('since', ''))}" + (f"; last: {last}" if last else "")


def headline(info: Mapping[str, Any], state: Path) -> str:
    """The same in one line, for systemd."""
    held = in_words(Path(str(info.get("folder", ""))), state)
    return "; ".join(one for one in (link_words(info), held or doing_words(read_record(state / ACTIVITY))) if one)


def print_status(found: Mapping[str, Any], console: "Console") -> None:
    """What `status` found, for a person."""
    rows = [("daemon", describe_daemon(found))]
    if found["running"]:
        workers = {one["name"]: one["pid"] for one in found["children"]}
        rows += [("centre", link_words(found)), ("work", doing_words(found["activity"], workers.get("executor")))]
        rows += [("training", found["away"])] if found["away"] else []
        rows += [(one["name"], describe_child(one, DOES.get(one["name"], ""))) for one in found["children"]]
    rows.append(("disk", describe_disk(found)))
    print_page(f"site {found['site']}", [("", rows)], found, console)
