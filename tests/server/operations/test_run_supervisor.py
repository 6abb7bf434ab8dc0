"""A run goes on until it has ended by itself, whatever became of what carried it."""

import contextlib
import json
import os
import sqlite3
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from trunkline.errors import DeploymentError
from trunkline.runtime.storage import Shelf
from trunkline.server.operations import daemon, run_supervisor
from trunkline.server.operations.run_store import (
    OUTCOME,
    RUN_LOCK,
    RunLock,
    RunStore,
    lock_holder,
    read_outcome,
    write_outcome,
)


class SuperLink:
    """What the supervisor asks of Flower, by hand: the runs it knows, and whether it answers."""

    def __init__(self) -> None:
        self.runs: dict[int, str] = {}
        self.submitted: list[dict[str, object]] = []
        self.away = False

    def submit(self, address: str, app: Path, values: dict[str, object], *, ca: bytes | None) -> int:
        self._answer()
        self.submitted.append(values)
        number = 100 + len(self.submitted)
        self.runs[number] = "running"
        return number

    def run_status(self, address: str, number: int, *, ca: bytes | None) -> tuple[str, str]:
        self._answer()
        if number not in self.runs:
            raise DeploymentError(f"{address}: no run {number} here.")
        return self.runs[number], ""

    def stop_run(self, address: str, number: int, *, ca: bytes | None) -> None:
        self._answer()
        self.runs[number] = "finished:stopped"

    def _answer(self) -> None:
        if self.away:
            raise DeploymentError("127.0.0.1:1: asking failed")


@pytest.fixture
def link(monkeypatch: pytest.MonkeyPatch) -> SuperLink:
    made = SuperLink()
    for name in ("submit", "run_status", "stop_run"):
        monkeypatch.setattr(run_supervisor, name, getattr(made, name))
    return made


class Centre:
    def __init__(self, state: Path) -> None:
        self.state = state
        self.said: list[str] = []
        self.store = RunStore(state)
        self.out = state / "out"
        self.key = self.store.add("r", "{}", self.out, resume=False).key
        self.restart()

    def restart(self) -> None:
        self.supervisor = run_supervisor.RunSupervisor(
            self.state,
            "127.0.0.1:1",
            None,
            Path("app"),
            self.said.append,
            timing=run_supervisor.Timing(first_pause_s=0.0),
        )

    def look(self, times: int = 1) -> str:
        for _ in range(times):
            self.supervisor.look()
        return self.store.get(self.key).state


@pytest.fixture
def centre(tmp_path: Path, link: SuperLink) -> Iterator[Centre]:
    made = Centre(tmp_path)
    assert made.look() == "running"
    yield made


def done(out: Path, round: int) -> None:
    Shelf(out / "checkpoint").put(round, {"w": np.zeros(1, np.float32)}, {})


def test_a_serverapp_that_was_killed_is_stopped_and_submitted_again_and_goes_on(
    centre: Centre, link: SuperLink
) -> None:
    RunLock(centre.out, 101).release()
    done(centre.out, 2)
    assert centre.look() == "waiting"
    assert link.runs[101] == "finished:stopped"
    assert centre.look() == "running"
    assert [one["resume"] for one in link.submitted] == [0, 1]
    assert centre.said == [
        "run r: its ServerApp was killed; it is submitted again in 0 s and resumes after round 2.",
        "run r: resumed after round 2.",
    ]


def test_one_that_has_ended_by_itself_is_not(centre: Centre, link: SuperLink) -> None:
    hold = RunLock(centre.out, 101)
    assert centre.look() == "running"
    write_outcome(centre.out, 101, "")
    assert centre.look() == "running"  # it still holds the folder
    hold.release()
    assert centre.look(3) == "completed"
    assert len(link.submitted) == 1


def test_one_that_could_go_no_further_says_why_and_is_not_tried_again(centre: Centre, link: SuperLink) -> None:
    write_outcome(centre.out, 101, "2 of 5 sites answered")
    link.runs[101] = "finished:failed"
    assert centre.look(3) == "failed"
    assert centre.store.get(centre.key).note == "2 of 5 sites answered"
    assert len(link.submitted) == 1


@pytest.mark.parametrize("lost", ["finished:failed", "unknown"])
def test_a_run_that_flower_gave_up_or_forgot_is_submitted_again(centre: Centre, link: SuperLink, lost: str) -> None:
    RunLock(centre.out, 101).release()
    if lost == "unknown":
        del link.runs[101]
    else:
        link.runs[101] = lost
    assert centre.look() == "waiting"
    assert centre.look() == "running"
    assert link.submitted[1]["resume"] == 1


def test_a_superlink_that_is_away_costs_no_attempt(centre: Centre, link: SuperLink) -> None:
    RunLock(centre.out, 101).release()
    link.away = True
    assert centre.look(5) == "running"
    link.away = False
    assert centre.look() == "waiting"
    assert centre.store.get(centre.key).tries == 1


def test_a_daemon_that_is_killed_anywhere_loses_no_run_and_starts_none_twice(centre: Centre, link: SuperLink) -> None:
    hold = RunLock(centre.out, 101)
    centre.store.change(centre.key, state="wanted", run_id=0)  # killed between the submission and its line
    centre.restart()
    assert centre.look() == "running"
    assert centre.store.get(centre.key).run_id == 101
    assert len(link.submitted) == 1
    hold.release()
    centre.store.change(centre.key, state="waiting")  # killed between the line and the stop
    centre.restart()
    assert centre.look() == "running"
    assert len(link.submitted) == 2


def test_a_run_that_comes_no_further_is_given_up_with_its_last_reason(centre: Centre, link: SuperLink) -> None:
    for number in range(101, 101 + run_supervisor.TRIES + 1):
        RunLock(centre.out, number).release()
        centre.look(2)
    record = centre.store.get(centre.key)
    assert record.state == "failed"
    assert "No round after 0 was done in 12 attempts; the last cause: its ServerApp was killed" in record.note


def test_a_new_round_makes_the_attempts_count_anew(centre: Centre, link: SuperLink) -> None:
    for number in range(101, 101 + 2 * run_supervisor.TRIES):
        RunLock(centre.out, number).release()
        done(centre.out, number - 100)
        centre.look(2)
    assert centre.store.get(centre.key).state == "running"


def test_an_operator_can_stop_it(centre: Centre, link: SuperLink) -> None:
    RunLock(centre.out, 101).release()
    centre.store.change(centre.key, stop=True)
    assert centre.look(2) == "stopped"
    assert link.runs[101] == "finished:stopped"
    assert len(link.submitted) == 1


def test_two_unfinished_runs_do_not_share_a_folder(tmp_path: Path) -> None:
    store = RunStore(tmp_path)
    first = store.add("one", "{}", tmp_path / "out", resume=False)
    with pytest.raises(DeploymentError, match=rf"the run {first.key} uses this folder.*server stop {first.key}"):
        store.add("two", "{}", tmp_path / "out", resume=False)
    store.change(first.key, state="completed")
    store.add("two", "{}", tmp_path / "out", resume=False)


def test_one_serverapp_at_a_time_works_in_a_folder(tmp_path: Path) -> None:
    hold = RunLock(tmp_path, 7)
    assert lock_holder(tmp_path) == (True, 7)
    with pytest.raises(DeploymentError, match=f"the process {os.getpid()} works there"):
        RunLock(tmp_path, 8, seconds=0.2)
    hold.release()
    assert lock_holder(tmp_path) == (False, 7)


def test_a_damaged_list_or_outcome_is_named_and_nothing_is_made_of_it(centre: Centre, link: SuperLink) -> None:
    (centre.out).mkdir(exist_ok=True)
    (centre.out / OUTCOME).write_text('{"number": 101, "err')
    (centre.out / RUN_LOCK).write_bytes(b"\xff\xfe")
    assert read_outcome(centre.out, 101) is None
    assert lock_holder(centre.out) == (False, 0)
    path = centre.state / "runs" / f"{centre.key}.json"
    path.write_text(path.read_text()[:-20])
    before = path.read_bytes()
    centre.supervisor.look()
    assert any(str(path) in one and "damaged" in one for one in centre.said)
    assert path.read_bytes() == before
    with pytest.raises(DeploymentError, match="no run"):
        centre.store.get(centre.key)
    assert json.loads(json.dumps([one.key for one in centre.store.records()])) == []


def test_a_damaged_database_is_set_aside_and_a_sound_one_is_left(tmp_path: Path) -> None:
    path = tmp_path / "superlink.db"
    with contextlib.closing(sqlite3.connect(path)) as database:
        database.execute("create table t (x)")
        database.executemany("insert into t values (?)", [(str(n) * 50,) for n in range(500)])
        database.commit()
    said: list[str] = []
    daemon.mend_database(path, said.append)
    assert path.exists() and not said
    data = bytearray(path.read_bytes())
    data[4096:9000] = os.urandom(4904)
    path.write_bytes(data)
    daemon.mend_database(path, said.append)
    assert not path.exists()
    assert len(said) == 1 and "renamed to superlink.db.damaged-" in said[0]
    (aside,) = tmp_path.glob("superlink.db.damaged-*")
    assert aside.read_bytes() == bytes(data)
