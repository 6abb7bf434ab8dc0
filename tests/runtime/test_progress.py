"""The progress of a run on a terminal, in a log file, and read from a file that is still being written."""

import io
import json
import math
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from trunkline.runtime.events import SitesGathering
from trunkline.runtime.progress import Progress, tail

NAMES = ("gather", "start", "round", "reply", "round_end", "evaluate", "end", "note")
KEYS = (
    "sites", "wanted", "run", "strategy", "rounds", "trunk_parameters", "resumed_at", "round", "site", "refused", "in", "of",
    "train_loss", "validation_loss", "local_validation_loss", "seconds", "bytes_up", "bytes_down", "text",
)  # fmt: skip


def run(rounds: int, bad: str = "", resumed_at: int = 0) -> Iterator[dict[str, Any]]:
    """The events of a run of three sites; `bad` is refused every round."""
    names = ["coil-1", "kiln-02", "press-07"]
    yield {"event": "gather", "sites": names, "wanted": 3}
    yield {"event": "start", "run": "turbofans", "strategy": "fedrep", "rounds": rounds, "sites": names,
           "trunk_parameters": 61234, "resumed_at": resumed_at}  # fmt: skip
    for at in range(resumed_at + 1, rounds + 1):
        yield {"event": "round", "round": at, "rounds": rounds}
        for place, name in enumerate(names, 1):
            cause = "`head` holds NaN" if name == bad else None
            taken = place - (bad in names[:place])  # the server counts admitted replies
            yield {"event": "reply", "round": at, "site": name, "refused": cause, "in": taken, "of": 3}
        yield {"event": "round_end", "round": at, "rounds": rounds, "sites": [name for name in names if name != bad],
               "train_loss": 1 / at, "validation_loss": 2 / at, "local_validation_loss": 3 / at, "seconds": 1.5,
               "bytes_up": 3000, "bytes_down": 6000,
               "refused": [{"site": bad, "cause": "`head` holds NaN"}] if bad else []}  # fmt: skip
    yield {"event": "evaluate", "in": 3, "of": 3}
    yield {"event": "end", "seconds": 61.0}


def plain(events: Iterator[dict[str, Any]]) -> list[str]:
    file = io.StringIO()
    with Progress(Console(file=file, width=80)) as progress:
        for event in events:
            progress(event)
    return file.getvalue().splitlines()


def test_a_log_file_gets_one_line_a_round_without_control_characters() -> None:
    lines = plain(run(12))
    assert all("\x1b" not in line and "\r" not in line for line in lines)
    rounds = [line for line in lines if line.startswith("round ")]
    assert [line.split(";")[0] for line in rounds] == [f"round {at} of 12" for at in range(1, 13)]
    assert "3 of 3 sites" in rounds[3]
    assert "loss train 0.25, validation 0.5, 0.75 when trained alone" in rounds[3]
    assert "3.0 kB up, 6.0 kB down" in rounds[3]
    assert lines[-1].startswith("12 of 12 rounds done in 0:01:01")


@pytest.mark.parametrize("rounds", [51, 100, 999])
def test_a_long_run_gets_about_ten_lines_the_first_and_the_last_among_them(rounds: int) -> None:
    lines = [line for line in plain(run(rounds)) if line.startswith("round ")]
    assert 10 <= len(lines) <= 12
    assert lines[0].startswith(f"round 1 of {rounds};")
    assert lines[-1].startswith(f"round {rounds} of {rounds};")


def test_a_refusal_is_said_once_however_often_it_happens_and_is_told() -> None:
    lines = plain(run(9, bad="kiln-02"))
    assert [line for line in lines if "refused" in line] == ["refused kiln-02 in round 1: `head` holds NaN"]
    assert any(line.startswith("round 2 of 9; 2 of 3 sites;") for line in lines)


def test_two_sites_with_the_same_fault_are_both_named() -> None:
    told = [{"event": "reply", "round": 1, "site": site, "refused": "too late"} for site in ("a", "b", "a")]
    assert plain(iter(told)) == ["refused a in round 1: too late", "refused b in round 1: too late"]


def test_a_resumed_run_says_where_it_goes_on() -> None:
    lines = plain(run(6, resumed_at=4))
    assert any("resumed after round 4" in line for line in lines)
    assert [line.split(";")[0] for line in lines if line.startswith("round ")] == ["round 5 of 6", "round 6 of 6"]


def test_a_run_that_waits_for_plants_names_them_and_repeats_it() -> None:
    waits = SitesGathering(("mill-04", "press-01"), 4, ("kiln-02", "pump-03")).to_json()
    text = (
        "waiting for plants: 2 of 4 are here (mill-04, press-01); missing: kiln-02, pump-03. "
        "The run starts when 4 are online."
    )
    nobody = {"event": "gather", "sites": [], "wanted": 2}  # as an older server writes it
    assert plain(iter([nobody, waits, waits])) == [
        "waiting for plants: 0 of 2 are here. The run starts when 2 are online.", text, text
    ]  # fmt: skip
    named = SitesGathering(("mill-04",), 1, ("kiln-02",)).to_json()
    assert plain(iter([named]))[0].endswith("The run starts when the plants that run.toml names are online.")


def test_of_an_event_of_an_unknown_kind_the_text_is_shown() -> None:
    newer = [{"event": "rebalanced", "text": "2 sites moved", "site": 3}, {"event": "rebalanced", "text": 7}]
    assert plain(iter(newer)) == ["2 sites moved"]
    assert plain(iter([{"event": "error", "text": "no quorum"}, {"event": "late", "text": "x"}])) == []


def test_words_from_elsewhere_are_neither_markup_nor_control() -> None:
    lines = plain(iter([{"event": "note", "text": "\x1b[2J[red]gone[/red]"}]))
    assert lines == ["\ufffd[2J[red]gone[/red]"]


@pytest.mark.parametrize("width", [40, 80, 200])
def test_a_terminal_sees_the_run_move_and_keeps_only_what_stays_true(width: int) -> None:
    file = io.StringIO()
    console = Console(file=file, width=width, force_terminal=True, _environ={"TERM": "xterm"})
    drawn = ""
    with Progress(console) as progress:
        for event in run(8, bad="coil-1"):
            progress(event)
            with console.capture() as capture:
                console.print(progress._render())
            drawn += capture.get()
    for sight in ("round 5 of 8", "2 of 3 are in", "left", "3.0 kB up", "█"):
        assert sight in drawn
    text = file.getvalue()
    assert text.count("refused coil-1") == 1
    assert "8 of 8 rounds done" in text
    assert text.index("8 of 8 rounds done") > text.index("refused coil-1")


def test_the_time_left_follows_the_rounds_seen() -> None:
    progress = Progress(Console(file=io.StringIO(), width=80))
    for event in run(10):
        if event["event"] == "round" and event["round"] == 5:
            break
        progress(event)
    console = Console(file=io.StringIO(), width=80)
    with console.capture() as capture:
        console.print(progress._render())
    assert "0:00:09 left" in capture.get()  # six rounds of 1.5 s


anything = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=5), st.lists(st.text(max_size=3), max_size=3),
    st.lists(st.dictionaries(st.sampled_from(["site", "cause"]), st.text(max_size=3)), max_size=2),
)  # fmt: skip
events = st.builds(
    lambda name, values: {"event": name} | values,
    st.sampled_from([*NAMES, "unknown", "", None, 3]),
    st.dictionaries(st.sampled_from(KEYS), anything, max_size=6),
)


@settings(max_examples=150, deadline=None)
@given(st.lists(events, max_size=6), st.booleans())
def test_no_event_however_odd_stops_the_run(told: list[dict[str, Any]], terminal: bool) -> None:
    console = Console(file=io.StringIO(), width=80, force_terminal=terminal, _environ={"TERM": "xterm"})
    progress = Progress(console)  # not entered: no thread, but every line and every picture is made
    progress({})
    for event in told:
        progress(event)
        console.print(progress._render())


def test_losses_that_diverge_are_left_out_and_the_display_goes_on() -> None:
    console = Console(file=io.StringIO(), width=80)
    progress = Progress(console)
    losses = (0.5, math.nan, math.inf, 1e300, 0.25)
    for at, loss in enumerate(losses, 1):
        progress({"event": "round_end", "round": at, "rounds": 9, "validation_loss": loss, "seconds": loss})
    with console.capture() as capture:
        console.print(progress._render())
    assert "validation 0.25  ▁█▁" in capture.get()


# --- tail --------------------------------------------------------------------------------------------------------


def test_each_event_comes_once_and_only_when_its_line_is_complete(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    looks: list[str] = ['{"n": 1}\n{"n":', " 2}\n", "", '{"n": 3}\n{"n": 4}\n', '{"half']
    after: list[int] = []
    seen: list[dict[str, Any]] = []

    def stop() -> bool:  # asked before each look: what is written here is what the look finds
        after.append(len(seen))
        if looks:
            with path.open("a", encoding="utf-8") as file:
                file.write(looks.pop(0))
        return not looks

    seen.extend(tail(path, stop, poll_s=0.0))  # `extend` appends one by one, so `stop` sees how far it is
    assert seen == [{"n": 1}, {"n": 2}, {"n": 3}, {"n": 4}]
    assert after == [0, 1, 2, 2, 4]


def test_what_is_written_before_stop_is_never_missed(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    done = threading.Event()

    def write() -> None:
        with path.open("a", encoding="utf-8") as file:
            for n in range(2000):
                file.write(json.dumps({"n": n}) + "\n")
                if n % 100 == 0:
                    file.flush()
        done.set()

    writer = threading.Thread(target=write)
    writer.start()
    assert [event["n"] for event in tail(path, done.is_set, poll_s=0.001)] == list(range(2000))
    writer.join()


def test_a_missing_file_is_waited_for_and_a_damaged_line_passed_over(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    assert list(tail(path, lambda: True, poll_s=0.0)) == []
    path.write_bytes(b'{"n": 1}\n{"rou{"n": 9}\n\xff\xfe\n[1]\n\n{"n": 2}\n')
    assert list(tail(path, lambda: True, poll_s=0.0)) == [{"n": 1}, {"n": 2}]


def test_a_file_written_anew_is_read_from_its_start(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    path.write_text('{"n": 1}\n{"n": 2}\n')
    turns = iter([lambda: None, lambda: path.write_text('{"n": 7}\n')])

    def stop() -> bool:
        turn = next(turns, None)
        if turn is None:
            return True
        turn()
        return False

    assert list(tail(path, stop, poll_s=0.0)) == [{"n": 1}, {"n": 2}, {"n": 7}]


def test_what_an_earlier_run_left_is_passed_over(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    path.write_text('{"n": 1}\n')
    seen = path.stat().st_size
    with path.open("a") as file:
        file.write('{"n": 2}\n')
    assert list(tail(path, lambda: True, start=seen)) == [{"n": 2}]
