"""A run over plants that close and open: nobody waits for the absent, nobody who is away is refused, everybody comes back."""

import shutil
import time
from collections.abc import Callable, Collection, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from flwr.app import DEFAULT_TTL, Message, RecordDict

from tests.loopback import events_of, federate, refusals_of, trunk_of
from trunkline.client.app import app as client_app
from trunkline.flower.errors import AWAY
from trunkline.flower.grid import LoopbackGrid, stamp
from trunkline.flower.records import open_records, to_records
from trunkline.protocol import opening_hours as hours
from trunkline.server.reporting.report import read_report
from trunkline.server.rounds import availability as presence
from trunkline.server.rounds.messaging import ask

MONDAY = datetime(2026, 11, 23, 4, tzinfo=UTC)


class FakeClock:
    """The calendar's clock in the hand of a test; waiting at the centre moves it on."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.at = MONDAY
        monkeypatch.setattr(hours, "now", lambda: self.at)
        monkeypatch.setattr(presence, "pause", lambda grid, seconds, most: self.go_on(minutes=10))

    def go_on(self, **span: float) -> None:
        self.at += timedelta(**span)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> FakeClock:
    return FakeClock(monkeypatch)


@pytest.fixture
def two(plants: list[Path], tmp_path: Path) -> list[Path]:
    """Two of the factories, in folders of their own."""
    return [shutil.copytree(folder, tmp_path / folder.name) for folder in plants[:2]]


def gives_hours(folder: Path, text: str) -> None:
    path = folder / "site.toml"
    path.write_text(path.read_text().split("\n[hours]")[0] + f"\n[hours]\n{text}\n")


def trains(message: Message) -> bool:
    return message.metadata.message_type == "train"


def notes(out: Path) -> list[str]:
    return [one["text"] for one in events_of(out) if one["event"] == "note" and "release.key" not in one["text"]]


def sites_by_round(out: Path) -> list[list[str]]:
    return [one["sites"] for one in read_report(out)["rounds"]]


def hour_by_hour(clock: FakeClock, then: Callable[[], object] = lambda: None) -> Callable[..., Message]:
    """A site at which an hour passes with each of its rounds."""

    def tamper(message: Message, honest: Callable[[], Message]) -> Message:
        reply = honest()
        if trains(message):
            clock.go_on(hours=1)
            then()
        return reply

    return tamper


def test_a_site_is_asked_in_its_hours_only_and_both_ends_of_an_absence_are_told_once(
    two: list[Path], tmp_path: Path, clock: FakeClock
) -> None:
    shift, always = two
    gives_hours(shift, 'hours = [[7, 9]]\nzone = "Europe/Berlin"')  # 6 and 7 by UTC
    out = tmp_path / "out"
    grid = federate(two, out, rounds=6, plant=True, tamper={3: hour_by_hour(clock)})
    both = sorted(one.name for one in two)
    assert sites_by_round(out) == [[always.name]] * 2 + [both] * 2 + [[always.name]] * 2
    assert refusals_of(out) == {number: {} for number in range(1, 7)}
    assert [node for kind, node, _ in grid.down if kind == "train"].count(2) == 2
    assert notes(out) == [
        f"{shift.name} is closed until Mon 2026-11-23 07:00 CET (its hours); rounds go on without it.",
        f"{shift.name} is back, at Mon 2026-11-23 07:00 CET.",
        f"{shift.name} is closed until Tue 2026-11-24 07:00 CET (its hours); rounds go on without it.",
        f"Scoring waits: {shift.name} is away, and {shift.name} is the first to be back, at Tue 2026-11-24 07:00 CET (its hours).",
        f"{shift.name} is back, at Tue 2026-11-24 07:00 CET.",
    ]
    assert {row["site"] for row in read_report(out)["sites"]} == set(both)


def test_while_all_are_closed_the_run_waits_and_says_so_once(two: list[Path], tmp_path: Path, clock: FakeClock) -> None:
    early, late = two
    gives_hours(early, 'hours = [[6, 7]]\nzone = "UTC"')
    gives_hours(late, 'hours = [[8, 9]]\nzone = "UTC"')
    out = tmp_path / "out"
    federate(two, out, rounds=3, plant=True, tamper={node: hour_by_hour(clock) for node in (2, 3)})
    assert sites_by_round(out) == [[early.name], [late.name], [early.name]]
    waits = [text for text in notes(out) if text.startswith("The run waits")]
    assert waits == [
        f"The run waits: all 2 sites are away, and {early.name} is the first to be back, at Mon 2026-11-23 06:00 UTC (its hours).",
        f"The run waits: all 2 sites are away, and {late.name} is the first to be back, at Mon 2026-11-23 08:00 UTC (its hours).",
        f"The run waits: all 2 sites are away, and {early.name} is the first to be back, at Tue 2026-11-24 06:00 UTC (its hours).",
    ]
    assert {row["site"] for row in read_report(out)["sites"]} == {early.name, late.name}  # though never open at once


def test_the_scores_of_a_site_that_stays_closed_are_not_waited_for_beyond_a_day(
    two: list[Path], tmp_path: Path, clock: FakeClock
) -> None:
    shift, always = two
    gives_hours(shift, 'zone = "UTC"\nclosed = ["2026-11-23 05:00 to 2026-12-10 00:00"]')
    out = tmp_path / "out"
    federate(two, out, rounds=2, plant=True, tamper={3: hour_by_hour(clock)})
    assert {row["site"] for row in read_report(out)["sites"]} == {always.name}
    assert notes(out)[-2].startswith(f"Scoring waits no longer for {shift.name}: ")
    assert notes(out)[-1].startswith(f"{shift.name}: no scorecard. ")


def test_hours_that_the_centre_was_not_told_cost_the_site_its_rounds_and_are_no_refusal(
    two: list[Path], tmp_path: Path, clock: FakeClock
) -> None:
    changed, _ = two
    asked = []

    def closes_meanwhile() -> None:
        asked.append(clock.at)
        if len(asked) == 1:
            first, then = "2026-11-23 05:00 to 2026-11-23 05:30", "2026-11-23 06:00 to 2026-11-23 07:30"
            gives_hours(changed, f'zone = "UTC"\nclosed = ["{first}", "{then}"]')

    out = tmp_path / "out"
    cohort = {"min_sites": 2, "quorum": 1.0, "deadline_s": 20.0, "gather_s": 20.0}
    grid = federate(two, out, rounds=5, plant=True, cohort=cohort, tamper={3: hour_by_hour(clock, closes_meanwhile)})
    assert [len(sites) for sites in sites_by_round(out)] == [2, 1, 1, 1, 2]
    assert refusals_of(out) == {number: {} for number in range(1, 6)}
    # in rounds 2 and 3 it is asked and says until when; it is not asked before, as in round 4 it was not
    assert [node for kind, node, _ in grid.down if kind == "train"].count(2) == 4
    assert [text.partition(" is ")[2] for text in notes(out)] == [
        "closed until Mon 2026-11-23 05:30 UTC (its hours); rounds go on without it.",
        "back, at Mon 2026-11-23 08:00 UTC.",
    ]


def test_away_every_site_after_all_the_same_round_comes_again(
    two: list[Path], tmp_path: Path, clock: FakeClock
) -> None:
    folders = two[:1]
    federate(folders, tmp_path / "undisturbed", plant=True)
    out = tmp_path / "out"

    def closes_before_round_2() -> None:
        gives_hours(folders[0], 'hours = [[9, 24]]\nzone = "UTC"')

    federate(folders, out, plant=True, tamper={2: hour_by_hour(clock, closes_before_round_2)})
    assert sites_by_round(out) == [[folders[0].name]] * 3
    assert len([text for text in notes(out) if "waits" in text]) == 1
    assert trunk_of(out).digest() == trunk_of(tmp_path / "undisturbed").digest()


def test_what_was_trained_before_closing_is_answered_from_the_vault_after(
    two: list[Path], tmp_path: Path, clock: FakeClock
) -> None:
    grid = federate(two[:1], tmp_path / "out", rounds=2, plant=True)
    gives_hours(two[0], 'hours = [[6, 7]]\nzone = "UTC"')
    down = [content for kind, _, content in grid.down if kind == "train"]
    up = [content for kind, _, content in grid.up if kind == "train"]

    def ask(content: Any, kind: str = "train") -> Message:
        (number,) = grid.push_messages([Message(content, dst_node_id=2, message_type=kind, ttl=DEFAULT_TTL)])
        return grid.pull_messages([number])[0]

    again = ask(down[1])
    assert {name: array.tobytes() for name, array in open_records(again.content)[0].items()} == {
        name: array.tobytes() for name, array in open_records(up[1])[0].items()
    }
    scores = next(content for kind, _, content in grid.down if kind == "evaluate")
    refused = ask(scores, "evaluate")
    assert refused.has_error()
    assert refused.error.code == AWAY
    assert refused.error.reason == f"{two[0].name}: closed until 2026-11-23T06:00:00+00:00 by its hours"


@pytest.mark.parametrize(
    ("said", "again_in"),
    [
        ("press: closed until 2026-11-23T09:30:00+01:00 by its hours", timedelta(hours=4, minutes=30)),
        ("press: closed until 2026-11-23T03:59:00+00:00 by its hours", timedelta(seconds=15)),  # its clock is late
        ("press: paused by request at the plant", timedelta(minutes=1)),
        ("press: paused until 2026-11-23T04:02:00+00:00 by request at the plant", timedelta(minutes=2)),
        ("press: closed until 9999-12-31T23:59:59+00:00 by its hours", timedelta(days=400)),
        ("press: closed until 9999-12-31T23:59:59-23:00 by its hours", timedelta(days=400)),
        ("press: closed until 0001-01-01T00:00:00+23:00 by its hours", timedelta(seconds=15)),
        ("press: closed until 2026-11-23T09:30:00 by its hours", timedelta(minutes=1)),
        ("press: closed until \x1b[2J-and-other-rubbish by its hours", timedelta(minutes=1)),
    ],
)
def test_whatever_a_site_says_of_its_absence_it_is_asked_again(
    clock: FakeClock, said: str, again_in: timedelta
) -> None:
    from types import SimpleNamespace

    told: list[dict[str, Any]] = []
    own = presence.Availability(lambda event: told.append(event.to_json()))
    member: Any = SimpleNamespace(site="press", offer=SimpleNamespace(hours=None))
    own.note_absence(member, said)
    assert own.away(member) == MONDAY + again_in
    own.note_absence(member, said)
    assert len(told) == 1
    assert told[0]["text"].isprintable()
    clock.at = MONDAY + again_in
    assert own.away(member) is None
    own.note_presence(member)
    own.note_presence(member)
    assert len(told) == 2


def test_over_selected_a_round_ends_with_the_share_and_waits_for_no_straggler(
    plants: list[Path], tmp_path: Path
) -> None:
    def mute(message: Message, honest: Callable[[], Message]) -> Message | None:
        return None if trains(message) else honest()

    out = tmp_path / "out"
    cohort = {"min_sites": 4, "deadline_s": 60.0, "gather_s": 20.0, "share": 0.5, "over_select": 1.5, "quorum": 1.0}
    began = time.monotonic()
    grid = federate(plants, out, rounds=6, cohort=cohort, tamper={2: mute})
    assert time.monotonic() - began < 30.0
    asked = [node for kind, node, _ in grid.down if kind == "train"]
    assert 2 in asked  # it was drawn, and nobody waited for it
    assert [len(sites) for sites in sites_by_round(out)] == [2] * 6
    assert len(asked) <= 3 * 6
    assert refusals_of(out) == {number: {} for number in range(1, 7)}


class Telephone:
    """A transport on a clock of its own: nodes 2 and 4 answer at once, node 3 never; what was sent to whom, and when."""

    durable = local = complete = journalled = waits = False
    stacks = None

    def __init__(self) -> None:
        LoopbackGrid(client_app, [])  # Flower wants to know who sends
        self.clock, self.at = self, 0.0
        self.sent: list[tuple[int, float]] = []
        self.replies: dict[str, Message] = {}

    def monotonic(self) -> float:
        return self.at

    def pause(self, seconds: float, most: float) -> None:
        self.at += max(most, 0.01)

    def room(self) -> bool:
        return True

    def get_node_ids(self) -> list[int]:
        return [2, 3, 4]

    def send(self, node: int, kind: str, group: str, content: RecordDict, keep_s: float) -> str:
        message = Message(content, node, kind, ttl=keep_s, group_id=group)
        self.sent.append((node, self.at))
        stamp(message, f"message-{len(self.sent)}")
        if node != 3:
            self.replies[message.metadata.message_id] = Message(message.content, reply_to=message)
        return message.metadata.message_id

    def inbox(self) -> Callable[[Collection[str]], Iterator[Message]]:
        return lambda ids: iter([self.replies.pop(asked) for asked in list(ids) if asked in self.replies])


def test_a_site_that_closes_in_the_middle_of_a_round_is_not_waited_for_and_not_asked_again() -> None:
    def answers_of(grid: Any, nodes: tuple[int, ...] = (2, 3), **how: Any) -> list[tuple[int, bool]]:
        requests = {node: lambda: to_records({}, "{}") for node in nodes}
        answers = ask(grid, "train", requests, round=1, deadline_s=600.0, resend_s=4.0, **how)
        return [(answer.node, answer.silent) for answer in answers]

    grid = Telephone()
    assert answers_of(grid, is_away=lambda node: node == 3 and grid.at >= 10.0) == [(2, False)]
    assert 10.0 <= grid.at < 13.0
    assert [at for node, at in grid.sent if node == 3] == pytest.approx([0.0, 4.0], abs=0.3)
    grid = Telephone()
    assert answers_of(grid) == [(2, False), (3, True)]
    assert grid.at >= 600.0
    grid = Telephone()
    heard = answers_of(grid, (2, 3, 4), enough=lambda: len(grid.sent) == 3)
    assert heard == [(2, False)]  # nothing is said of who came too late, at the same moment or never
    assert grid.at < 1.0
