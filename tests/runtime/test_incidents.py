"""Every incident once, by however many processes, across restarts and full disks; and never an error."""

import json
import multiprocessing
from pathlib import Path

import pytest

from trunkline.runtime import incidents
from trunkline.runtime.incidents import FILE, Incidents, read_incidents, read_record, write_record
from trunkline.runtime.log_files import PENDING_LINES, LineLog


def texts(state: Path) -> list[str]:
    return [one["text"] for one in read_incidents(state, 1000)]


def test_what_lasts_is_said_once_and_again_after_it_was_over(tmp_path: Path) -> None:
    notes = Incidents(tmp_path, "press-07")
    for _ in range(3):
        notes.note("failure", "no link", about="link", round=7, remedy="wait")
        notes.note("failure", "disk full", about="disk")
    notes.note("failure", "no link: turned away", about="link")
    notes.note("recovery", "linked", about="link")
    notes.note("recovery", "linked", about="link")
    notes.note("failure", "no link", about="link")
    assert texts(tmp_path) == ["no link", "disk full", "no link: turned away", "linked", "no link"]
    first = read_incidents(tmp_path, 100)[0]
    assert first | {"at": ""} == {"at": "", "kind": "failure", "site": "press-07", "round": 7, "text": "no link", "remedy": "wait", "about": "link"}  # fmt: skip


def test_what_lasts_is_not_said_again_by_a_process_that_was_restarted(tmp_path: Path) -> None:
    Incidents(tmp_path).note("failure", "no link", about="link")
    again = Incidents(tmp_path)
    again.note("failure", "no link", about="link")
    again.note("recovery", "linked", about="link")
    Incidents(tmp_path).note("recovery", "linked", about="link")
    assert texts(tmp_path) == ["no link", "linked"]


def test_without_a_subject_not_twice_in_a_row(tmp_path: Path) -> None:
    notes = Incidents(tmp_path)
    for text in ("a", "a", "b", "a"):
        notes.note("note", text)
    assert texts(tmp_path) == ["a", "b", "a"]


def test_a_text_is_one_line_and_bounded(tmp_path: Path) -> None:
    Incidents(tmp_path).note("refusal", "a\nb\x1b[2J" + "x" * 5000)
    (text,) = texts(tmp_path)
    assert text.startswith("a b [2J") and len(text) == incidents.TEXT_LIMIT


def test_a_disk_that_takes_nothing_loses_nothing(tmp_path: Path) -> None:
    state = tmp_path / "state"
    state.write_text("a file where a folder should be")  # no account, root neither, can write below it
    notes = Incidents(state)
    for number in range(PENDING_LINES + 5):
        notes.note("note", f"line {number}")
    notes.flush()
    state.unlink()
    notes.note("note", "room again")
    assert texts(state)[-3:] == ["line 203", "line 204", "room again"] and len(texts(state)) == PENDING_LINES


def test_a_line_torn_by_a_kill_costs_itself_only(tmp_path: Path) -> None:
    Incidents(tmp_path).note("note", "before")
    with (tmp_path / FILE).open("ab") as file:
        file.write(b'{"at": "2026-11-23T02:10:00+00:00", "kind": "no')
    Incidents(tmp_path).note("note", "after")
    assert texts(tmp_path) == ["before", "after"]


def write(path: str, name: str) -> None:
    lines = LineLog(Path(path), limit=20_000)
    for number in range(300):
        lines.append(json.dumps({"by": name, "n": number, "text": "x" * 100}))


def test_many_processes_write_whole_lines_and_keep_two_generations(tmp_path: Path) -> None:
    path = tmp_path / "lines"
    context = multiprocessing.get_context("fork")
    writers = [context.Process(target=write, args=(str(path), name)) for name in "ab"]
    for one in writers:
        one.start()
    for one in writers:
        one.join(20.0)
    files = sorted(tmp_path.iterdir())
    assert [file.name for file in files] == ["lines", "lines.1"]
    assert all(file.stat().st_size < 21_000 for file in files)
    found = [json.loads(line) for file in reversed(files) for line in file.read_text().splitlines()]
    for name in "ab":
        numbers = [one["n"] for one in found if one["by"] == name]
        assert numbers == list(range(300 - len(numbers), 300)), "in order, the newest all there"


def test_recent_reads_over_the_seam_of_two_generations(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    notes = Incidents(tmp_path)
    notes._lines.limit = 2000
    for number in range(40):
        notes.note("note", f"line {number}")
    assert (tmp_path / (FILE + ".1")).exists()
    assert texts(tmp_path)[-15:] == [f"line {number}" for number in range(25, 40)]
    assert [one["text"] for one in read_incidents(tmp_path, 3)] == ["line 37", "line 38", "line 39"]


def test_a_record_is_whole_or_absent(tmp_path: Path) -> None:
    assert write_record(tmp_path / "a.json", {"x": 1}) and read_record(tmp_path / "a.json") == {"x": 1}
    assert not write_record(tmp_path / "none" / "a.json", {"x": 1}) and read_record(tmp_path / "none" / "a.json") == {}
    (tmp_path / "a.json").write_text("[1")
    assert read_record(tmp_path / "a.json") == {}
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]
