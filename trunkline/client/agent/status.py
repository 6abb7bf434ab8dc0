"""The state of a site's daemon, since when, and every problem: `trunkline client status`."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trunkline.client.availability import in_words
from trunkline.runtime.health import clock_time, describe_child, describe_daemon, describe_disk, print_page, read_health
from trunkline.runtime.incidents import read_record
from trunkline.runtime.programs import accepts_connections

if TYPE_CHECKING:
    from rich.console import Console

ACTIVITY = "activity.json"  # in the state folder: the executor's task, written by `activity.py`
ROLES = {"supernode": "fetches the server's messages", "executor": "answers them"}


def state_of(site_dir: Path) -> Path:
    """The default state folder of a site's daemon."""
    return site_dir / ".trunkline"


def status(site_dir: Path, state: Path | None = None) -> dict[str, Any]:
    """The state of this site's daemon, for a person or for monitoring.

    Returns:
        running, pid, since, site, server, joined, link, connected, link_since, warnings; children (name, pid, since,
        restarts, last_exit, trouble, log); activity (doing, since, last); away (cause why it does not train, or empty); disk
        (free_bytes, low, problem, words); incidents; wrong (sentences, empty when all is well); well.

    Raises:
        DeploymentError: no daemon ever ran on this folder.
    """
    state = (state or state_of(site_dir)).resolve()
    summary = read_health(state)
    summary |= {
        "activity": read_record(state / ACTIVITY),
        "away": in_words(site_dir, state),
        "warnings": summary.get("warnings", []),
    }
    if summary["running"]:
        if not summary.get("joined"):
            summary["connected"] = accepts_connections(summary["server"])
            summary["link"] = "" if summary["connected"] else "nothing listens at this address"
        if summary.get("link") and not summary["connected"] and summary.get("ready"):
            summary["wrong"].append(f"No link to the server at {summary['server']}: {summary['link']}")
        summary["wrong"] += summary["warnings"]
    summary["well"] = not summary["wrong"]
    return summary


def link_words(summary: Mapping[str, Any]) -> str:
    """The connection to the server."""
    server, since = summary["server"], clock_time(summary["link_since"]) if summary.get("link_since") else ""
    if not summary.get("joined"):
        reached = "" if summary.get("connected", True) else ", where nothing listens; it is tried again"
        return f"asks {server} for work on this machine{reached}; not a member of a federation"
    if summary.get("connected"):
        return f"connected to {server} as {summary['site']} since {since}"
    return f"no link to {server} since {since}; it is tried again" if since else f"asks {server} for the first time"


def doing_words(activity: Mapping[str, Any], pid: int | None = None) -> str:
    """The executor's task; only its last one if another process than `pid` wrote the activity."""
    if not activity:
        return "starts"
    last = ""
    if last_task := activity.get("last"):
        how = "answered" if last_task.get("outcome") == "answered" else f"ended with {last_task.get('outcome')}"
        run = f" of {last_task['run']}" if last_task.get("run") else ""
        last = f"{last_task.get('what')}{run} {how} at {clock_time(last_task.get('at', ''))} after {last_task.get('seconds', 0):g} s"
    if pid is not None and activity.get("pid") != pid:
        return f"starts; before that: {last}" if last else "starts"
    if task := activity.get("doing"):
        run = f" of {task['run']}" if task.get("run") else ""
        return f"{task.get('what')}{run} since {clock_time(activity.get('since', ''))}"
    return f"idle since {clock_time(activity.get('since', ''))}" + (f"; last: {last}" if last else "")


def headline(info: Mapping[str, Any], state: Path) -> str:
    """The state of the daemon in one line, for systemd."""
    absence = in_words(Path(str(info.get("folder", ""))), state)
    return "; ".join(part for part in (link_words(info), absence or doing_words(read_record(state / ACTIVITY))) if part)


def print_status(summary: Mapping[str, Any], console: "Console") -> None:
    """The result of `status` as a page for a person."""
    rows = [("daemon", describe_daemon(summary))]
    if summary["running"]:
        pids = {child["name"]: child["pid"] for child in summary["children"]}
        rows += [("server", link_words(summary)), ("work", doing_words(summary["activity"], pids.get("executor")))]
        rows += [("training", summary["away"])] if summary["away"] else []
        rows += [(child["name"], describe_child(child, ROLES.get(child["name"], ""))) for child in summary["children"]]
    rows.append(("disk", describe_disk(summary)))
    print_page(f"site {summary['site']}", [("", rows)], summary, console)
