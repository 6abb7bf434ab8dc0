"""What a centre's status says of its runs, sites and troubles, by what lies in its folder."""

import io
import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from trunkline.errors import DeploymentError
from trunkline.runtime.incidents import Incidents, read_incidents
from trunkline.server.membership import authority
from trunkline.server.membership.authority import Authority
from trunkline.server.operations.status import (
    TAIL,
    note_event,
    print_sites,
    print_status,
    progress_of,
    progress_words,
    run_words,
    runs_of,
    status,
)

TODAY = datetime.now(UTC).strftime("%Y-%m-%dT")
START = {
    "event": "start",
    "run": "turbofans",
    "rounds": 30,
    "sites": ["mill-04", "press-07", "pump-02"],
    "resumed_at": None,
}


def at(event: dict[str, Any], time: str = "02:14:00") -> dict[str, Any]:
    return {**event, "at": f"{TODAY}{time}+00:00"}


def reply(site: str, got: int, round: int = 7) -> dict[str, Any]:
    return {"event": "reply", "round": round, "site": site, "refused": None, "in": got, "of": 3}


ROUND = {"event": "round", "round": 7, "rounds": 30}
END = {"event": "round_end", "round": 7, "rounds": 30, "sites": 3}


def folder(path: Path, *events: dict[str, Any], torn: str = "") -> Path:
    path.mkdir(parents=True, exist_ok=True)
    (path / "events.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events) + torn)
    return path


@pytest.mark.parametrize(
    ("events", "words"),
    [
        ([], "about to begin"),
        ([at({"event": "gather", "sites": ["press-07"], "wanted": 3})], "waiting for sites since 02:14, 1 of 3 sites here"),
        ([START, at(ROUND)], "round 7 of 30 since 02:14, 0 of 3 sites in, waiting for mill-04, press-07, pump-02"),
        ([START, at(ROUND), reply("press-07", 1), reply("pump-02", 2)], "round 7 of 30 since 02:14, 2 of 3 sites in, waiting for mill-04"),
        # a site that was refused is not in, and nobody waits for it
        ([START, at(ROUND), reply("press-07", 1), {**reply("mill-04", 1), "refused": "NaN"}], "round 7 of 30 since 02:14, 1 of 3 sites in, waiting for pump-02"),
        # where only a share is asked nobody can say who is missing
        ([START, at(ROUND), {**reply("press-07", 1), "of": 2}], "round 7 of 30 since 02:14, 1 of 2 sites in"),
        ([START, ROUND, at({"event": "waiting", "round": 7, "text": "2 of 3 sites"})], "waiting since 02:14: 2 of 3 sites"),
        ([START, ROUND, at(END)], "round 7 of 30 is done since 02:14, the next begins"),
        ([START, ROUND, END, {"event": "evaluate", "in": 2, "of": 3}], "scoring on test data, 2 of 3 sites in"),
        ([START, ROUND, END, {"event": "end"}], "writing its report"),
        ([START, ROUND, {"event": "error", "text": "no quorum"}], "stopped: no quorum"),
    ],
)  # fmt: skip
def test_a_run_under_way_in_words(tmp_path: Path, events: list[dict[str, Any]], words: str) -> None:
    out = folder(tmp_path / "out", *events, torn='{"event": "rou')
    assert progress_words(progress_of(out)) == words


def test_of_a_long_run_both_ends_are_read(tmp_path: Path) -> None:
    filler = [{"event": "note", "text": "x" * 200} for _ in range(4 * TAIL // 200)]
    out = folder(tmp_path / "out", START, *filler, at(ROUND), reply("press-07", 1))
    assert (out / "events.jsonl").stat().st_size > 3 * TAIL
    assert progress_words(progress_of(out)).endswith("1 of 3 sites in, waiting for mill-04, pump-02")


def centre(state: Path, **more: Any) -> Path:
    state.mkdir(parents=True, exist_ok=True)
    child = {"name": "gateway", "pid": 7, "since": f"{TODAY}02:10:00+00:00", "restarts": 0, "last_exit": "", "trouble": "", "log": "gateway.log"}  # fmt: skip
    found = {"role": "server", "pid": 6, "since": f"{TODAY}02:10:00+00:00", "ended": "", "listens": "0.0.0.0:9140", "address": "127.0.0.1:9", "ca": "", "children": [child]}  # fmt: skip
    (state / "status.json").write_text(json.dumps({**found, **more}))
    return state


def run(state: Path, name: str, how: str, since: str, note: str = "", out: Path | None = None) -> None:
    (state / "runs").mkdir(exist_ok=True)
    record = {"key": f"{name}-1", "name": name, "out": str(out or ""), "state": how, "number": 1, "since": f"{TODAY}{since}+00:00", "note": note}  # fmt: skip
    (state / "runs" / f"{name}-1.json").write_text(json.dumps(record))


def page(found: dict[str, Any], width: int = 80) -> str:
    console = Console(file=io.StringIO(), width=width)
    print_status(found, console)
    return console.file.getvalue()  # type: ignore[attr-defined, no-any-return]


def test_runs_under_way_come_first_and_a_failed_one_is_wrong(tmp_path: Path) -> None:
    state = centre(tmp_path / "s")
    run(state, "old", "completed", "01:00:00")
    run(state, "bad", "failed", "02:30:00", "2 of 5 sites answered")
    run(state, "held", "waiting", "02:00:00", "too few sites")
    run(state, "turbofans", "running", "01:30:00", out=folder(tmp_path / "out", START, at(ROUND), reply("press-07", 1)))
    (state / "runs" / "damaged.json").write_text("{")
    assert [one["name"] for one in runs_of(state)] == ["held", "turbofans", "bad", "old"]
    words = {one["name"]: run_words(one) for one in runs_of(state)}
    assert words["held"] == "waiting since 02:00: too few sites" and words["old"] == "completed 01:00"
    assert words["turbofans"] == "round 7 of 30 since 02:14, 1 of 3 sites in, waiting for mill-04, pump-02"
    assert words["bad"] == "failed 02:30: 2 of 5 sites answered"
    found = status(state)
    assert not found["well"] and "Run bad has failed: 2 of 5 sites answered" in found["wrong"]
    json.dumps(found)


def test_a_daemon_that_was_killed_and_one_that_ended_are_told_apart(tmp_path: Path) -> None:
    with pytest.raises(DeploymentError, match="no daemon has run"):
        status(tmp_path)
    found = status(centre(tmp_path / "killed"))
    assert not found["well"] and "it was killed, or its machine went down" in found["wrong"][0]
    found = status(centre(tmp_path / "ended", ended=f"{TODAY}03:00:00+00:00"))
    assert not found["well"] and "it ended 03:00" in found["wrong"][0]


def test_a_page_names_sites_and_incidents_within_its_width(tmp_path: Path) -> None:
    state = tmp_path / "s"
    authority.init(state, "North presses", (), key=f"file:{tmp_path / 'key'}")
    centre(state)
    Authority.open(state).invite("press-07", 1.0)
    notes = Incidents(state)
    notes.note(
        "refusal",
        "an update was set aside because " + "it is wrong " * 20,
        site="mill-04",
        round=7,
        remedy="Mend \x1b[2J it.",
    )
    for number in range(9):
        notes.note("note", f"note {number}")
    found = status(state)
    assert [one["site"] for one in found["sites"]] == ["press-07"]
    said = page(found)
    assert "server of North presses" in said and "press-07  invited; code out until" in said and "note 8" in said
    assert "note 2" not in said, "the last six"
    found["incidents"] = [
        *found["incidents"][:1],
        {**found["incidents"][0], "text": "\x1b[2J", "round": 7, "site": "mill-04"},
    ]
    for width in (40, 80, 120):
        lines = page(found, width).splitlines()
        assert max(map(len, lines)) <= width and all(line.isprintable() for line in lines)
    assert "mill-04, round 7:" in page(found, 120)


def test_what_a_run_tells_is_among_the_incidents_where_it_is_one(tmp_path: Path) -> None:
    notes = Incidents(tmp_path)
    events: list[dict[str, Any]] = [
        START,
        ROUND,
        reply("press-07", 1),
        {**reply("mill-04", 1), "refused": "mill-04, round 7: update set aside. NaN."},
        {"event": "waiting", "round": 7, "text": "1 of 3 sites"},
        {"event": "recovered", "round": 7, "site": "pump-02", "text": "asked twice"},
        END,
    ]
    for event in events:
        note_event(notes, "turbofans", event)
    told = [(one["kind"], one["site"], one["round"]) for one in read_incidents(tmp_path, 10)]
    assert told == [("refusal", "mill-04", 7), ("failure", "", 7), ("recovery", "pump-02", 7)]
    assert read_incidents(tmp_path, 10)[0]["text"] == "run turbofans: mill-04, round 7: update set aside. NaN."


LONG = "press-07." + "x" * 55  # 64 characters, the longest name a site may have


@pytest.mark.parametrize("width", [40, 80, 200])
def test_no_site_name_is_cut_however_narrow_the_terminal(tmp_path: Path, width: int) -> None:
    state = tmp_path / "s"
    authority.init(state, "north", (), key=f"file:{tmp_path / 'key'}")
    server = Authority.open(state)
    for site in (LONG, "kiln-02"):
        server.invite(site, 1.0)
    console = Console(file=io.StringIO(), width=width)
    print_sites(state, console)
    listed = console.file.getvalue()  # type: ignore[attr-defined]
    assert LONG in listed and "kiln-02" in listed and "invited" in listed and "…" not in listed
    run(centre(state), "turbofans", "waiting", "02:00:00", f"waiting for {LONG}")
    summary = page(status(state), width).splitlines()
    assert any(line.strip() == LONG or line.startswith(f"  {LONG}  ") for line in summary), "as a row of its own"
    assert sum(LONG in line for line in summary) == 2, "in the run's note as well"


def test_few_short_names_are_shown_as_a_table(tmp_path: Path) -> None:
    state = tmp_path / "s"
    authority.init(state, "north", (), key=f"file:{tmp_path / 'key'}")
    Authority.open(state).invite("press-07", 1.0)
    console = Console(file=io.StringIO(), width=100)
    print_sites(state, console)
    lines = console.file.getvalue().splitlines()  # type: ignore[attr-defined]
    assert max(map(len, lines)) <= 100 and any("site" in line and "valid until" in line for line in lines)
