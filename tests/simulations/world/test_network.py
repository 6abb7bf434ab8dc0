"""[world]: sites that come and go on a virtual clock; what may depend on it, and what must not."""

import json
import math
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
from flwr.app import Context, Message
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.loopback import QUICK, WatchedGrid, events_of, federate, refusals_of, trunk_of
from trunkline.client.site import open_site
from trunkline.config.run import RunConfig, parse_run
from trunkline.config.world import CalendarConfig
from trunkline.errors import ConfigError, DeploymentError, QuorumError, StorageError
from trunkline.flower.records import to_records
from trunkline.protocol.messages import TrainRequest, parse_request
from trunkline.protocol.opening_hours import DAYS
from trunkline.protocol.plan import Conditions, LocalPlan, TrunkSpec
from trunkline.server.reporting.report import read_report
from trunkline.simulations.simulate import simulate
from trunkline.simulations.vectorized.eligibility import kind_of
from trunkline.simulations.world.clock import HOUR, SECOND, WEEK, Hours
from trunkline.simulations.world.journal import JOURNAL
from trunkline.simulations.world.network import WorldGrid
from trunkline.simulations.world.sites import draw_sites, rows_seen

NIGHT = [{"share": 1.0, "hours": [[22, 6]]}]
SHIFTS = [{"share": 0.5, "hours": [[6, 14]], "days": ["mon", "tue", "wed", "thu", "fri"]}]
BUSY: dict[str, Any] = {
    "calendars": SHIFTS, "zones": [0.0, 5.5], "row_seconds": 20.0, "speed_spread": 0.7, "speeds": [[0.25, 0.5]],
    "up_mb_s": 0.001, "down_mb_s": 0.002, "links": [[0.5, 0.3]], "link_spread": 0.5, "drop_out": 0.15, "reply_loss": 0.3,
}  # fmt: skip
DAY_S = 86400.0
PATIENT = {"min_sites": 2, "deadline_s": 3 * DAY_S, "gather_s": 7 * DAY_S, "resend_s": 3600.0, "quorum": 0.3}
LINEAR: dict[str, Any] = {
    "lend": ["trunk", "heads"],
    "trunk": {"backbone": "linear", "columns": 6, "width": 4},
}


@pytest.fixture(scope="module")
def benches(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Twenty benches that measure the same thing: six inputs, one answer, and noise that nobody can predict."""
    root = tmp_path_factory.mktemp("benches")
    for number in range(20):
        rng = np.random.default_rng(number)
        x = rng.normal(size=(160, 6))
        y = x @ np.array([2.0, -1.0, 0.5, 0.0, 1.0, -0.5]) + rng.normal(size=160)
        folder = root / f"bench-{number:02d}"
        folder.mkdir()
        table = pl.DataFrame({**{f"x{column}": x[:, column] for column in range(6)}, "y": y})
        table.write_parquet(folder / "log.parquet")
        channels = ", ".join(f'"x{column}"' for column in range(6))
        (folder / "site.toml").write_text(
            f'name = "bench-{number:02d}"\n[data]\nfiles = "log.parquet"\nchannels = [{channels}]\n'
            '[tasks.y]\nkind = "regression"\ntarget = "y"\nloss = "mse"\n'
        )
    return sorted(root.iterdir())


class Inner(WatchedGrid):
    """What reaches the sites, with the virtual time at which it was sent."""

    world: WorldGrid

    def _dispatch(self, message: Message, context: Context) -> None:
        metadata = message.metadata
        self.sent.append((metadata.message_type, context.node_id, int(metadata.group_id), self.world.clock.monotonic()))
        super()._dispatch(message, context)

    def __init__(self, *args: Any, **more: Any) -> None:
        super().__init__(*args, **more)
        self.sent: list[tuple[str, int, int, float]] = []


def run_of(world: dict[str, Any], **changes: Any) -> RunConfig:
    return parse_run({**QUICK, **changes, "world": world}, "test")


def live(
    folders: list[Path], out: Path, world: dict[str, Any], *, resume: bool = False, tamper: Any = None, **changes: Any
) -> WorldGrid:
    """A whole run on loopback in a world; the grid around it, whose `inner` has seen what reached the sites."""
    inner = Inner(folders, out, tamper)
    grid = inner.world = WorldGrid(inner, run_of(world, **changes), out, resume=resume, patience_s=5.0)
    federate(folders, out, grid=grid, resume=resume, world=world, **changes)  # type: ignore[arg-type]
    return grid


def ends_of(out: Path) -> list[float]:
    return [one["virtual_seconds"] for one in events_of(out) if one["event"] == "round_end"]


# --- the clock, the calendar and the draw --------------------------------------------------------------------------

intervals = st.lists(st.tuples(st.integers(0, 23), st.integers(0, 24)).filter(lambda one: one[0] != one[1]), min_size=1)


@settings(max_examples=60, deadline=None)
@given(intervals, st.sets(st.sampled_from(DAYS), min_size=1), st.integers(-14, 181), st.integers(0, 400), st.data())
def test_hours_are_those_a_calendar_written_out_by_hand_has(
    hours: list[tuple[int, int]], days: set[str], ahead: int, at: int, data: st.DataObject
) -> None:
    calendar = CalendarConfig.model_validate({"share": 1.0, "hours": hours, "days": sorted(days)})
    got = Hours(calendar, ahead)
    by_hand = set()  # hours of the week, local, that are open
    for day in days:
        for begin, end in hours:
            length = end - begin if end > begin else end + 24 - begin
            by_hand |= {(24 * DAYS.index(day) + begin + hour) % 168 for hour in range(length)}  # type: ignore[arg-type]

    def there(hour: int) -> bool:
        return (hour + ahead) % 168 in by_hand

    assert got.online(at * HOUR) == there(at)
    assert got.online(at * HOUR + HOUR - 1) == there(at)
    assert got.always == (len(by_hand) == 168)
    if not got.always:
        opens = got.opens(at * HOUR)
        assert opens > at * HOUR
        assert got.online(opens)
        between = [hour for hour in range(at + 1, opens // HOUR) if there(hour) and not there(hour - 1)]
        assert not between
    work = data.draw(st.integers(1, 3 * len(by_hand)))
    done = at
    while work:
        work -= there(done)
        done += 1
    worked = sum(there(hour) for hour in range(at, done))
    assert got.spend(at * HOUR, worked * HOUR) == done * HOUR
    assert got.spend(at * HOUR, worked * HOUR - 1) == done * HOUR - 1


@given(st.integers(0, 3 * WEEK), st.integers(0, 2 * WEEK), st.integers(0, 2 * WEEK))
def test_work_done_in_two_pieces_takes_as_long_as_in_one(at: int, one: int, other: int) -> None:
    hours = Hours(
        CalendarConfig.model_validate({"share": 1.0, "hours": [[6, 14], [22, 2]], "days": ["mon", "sat"]}), 3.5
    )
    assert hours.spend(hours.spend(at, one), other) == hours.spend(at, one + other)


def test_shares_are_dealt_and_the_rest_is_plain() -> None:
    world = {
        "calendars": [{"share": 0.25, "hours": [[6, 14]]}, {"share": 0.5, "hours": [[14, 22]]}],
        "row_seconds": 1.0, "speeds": [[0.1, 0.5], [0.2, 2.0]], "byzantine_share": 0.15, "zones": [-6.0, 8.0],
    }  # fmt: skip
    names = [f"s{number}" for number in range(20)]
    draws = draw_sites(run_of(world), names)
    assert sorted(draw.speed for draw in draws) == [0.5] * 2 + [1.0] * 14 + [2.0] * 4
    assert sum(draw.hours.always for draw in draws) == 5
    assert sum(draw.byzantine for draw in draws) == 3
    assert {draw.zone for draw in draws} == {-6.0, 8.0}
    again = {draw.site: (draw.speed, draw.byzantine, draw.zone) for draw in draw_sites(run_of(world), names[::-1])}
    assert again == {draw.site: (draw.speed, draw.byzantine, draw.zone) for draw in draws}
    other = draw_sites(run_of(world, seed=6), names)
    assert [draw.byzantine for draw in other] != [draw.byzantine for draw in draws]


def test_a_spread_is_log_normal_around_one() -> None:
    draws = draw_sites(run_of({"row_seconds": 1.0, "speed_spread": 0.5}), [f"s{number}" for number in range(2000)])
    logs = np.log([draw.speed for draw in draws])
    assert abs(logs.mean()) < 0.05
    assert abs(logs.std() - 0.5) < 0.03


# --- what must not depend on the world -----------------------------------------------------------------------------


def test_a_world_with_everything_off_is_byte_equal_to_none(plants: list[Path], tmp_path: Path) -> None:
    federate(plants, tmp_path / "none", cohort={"min_sites": 4})
    grid = live(plants, tmp_path / "off", {}, cohort={"min_sites": 4})
    assert trunk_of(tmp_path / "off").digest() == trunk_of(tmp_path / "none").digest()
    assert grid.clock.now == 0
    sent = [one[:3] for one in grid.inner.sent]  # type: ignore[attr-defined]
    assert len(sent) == len(set(sent))


def test_how_fast_the_machine_computes_changes_nothing(
    benches: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A site's reply that is long in coming, in real time, is waited for: no other overtakes it."""
    changes = {**LINEAR, "cohort": PATIENT}
    live(benches[:5], tmp_path / "as it is", BUSY, **changes)
    plain = Inner._collect
    looks: dict[str, int] = {}

    def late(self: Inner, message_ids: Any) -> list[Message]:
        come = []
        for one in message_ids:
            looks[one] = looks.get(one, 0) + 1
            come += [one] if looks[one] > int(one.rpartition("-")[2]) % 5 else []
        return plain(self, come)

    monkeypatch.setattr(Inner, "_collect", late)
    live(benches[:5], tmp_path / "late", BUSY, **changes)
    assert trunk_of(tmp_path / "late").digest() == trunk_of(tmp_path / "as it is").digest()
    assert ends_of(tmp_path / "late") == ends_of(tmp_path / "as it is")


@pytest.mark.slow
@pytest.mark.processes
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # files that Ray leaves open
def test_the_same_seed_gives_the_same_bytes_and_times_on_any_number_of_workers(
    benches: list[Path], tmp_path: Path
) -> None:
    changes = {**LINEAR, "cohort": PATIENT}
    live(benches[:6], tmp_path / "loopback", BUSY, **changes)
    moments = [(one["event"], one.get("site"), one["virtual_seconds"]) for one in events_of(tmp_path / "loopback")]
    assert ends_of(tmp_path / "loopback")[-1] > DAY_S
    for workers in (1, 2):
        out = tmp_path / f"ray-{workers}"
        out.mkdir()
        report = simulate(run_of(BUSY, **changes), benches[:6], out, workers=workers)
        assert trunk_of(out).digest() == trunk_of(tmp_path / "loopback").digest()
        assert [(one["event"], one.get("site"), one["virtual_seconds"]) for one in events_of(out)] == moments
        assert [one["virtual_seconds"] for one in report["rounds"]] == ends_of(out)
        assert read_report(out) == report


# --- what happens when ---------------------------------------------------------------------------------------------


def test_a_reply_comes_when_its_rows_are_trained_and_its_bytes_are_through(benches: list[Path], tmp_path: Path) -> None:
    world = {"row_seconds": 0.5, "speeds": [[1.0, 0.25]], "up_mb_s": 0.001, "down_mb_s": 0.004}
    grid = live(benches[:2], tmp_path, world, rounds=1, **LINEAR, cohort=PATIENT)
    (down,) = {size_of(content) for kind, node, content in grid.inner.down if kind == "train" and node == 2}  # type: ignore[attr-defined]
    (up,) = {size_of(content) for kind, node, content in grid.inner.up if kind == "train" and node == 2}  # type: ignore[attr-defined]
    trained = 3 * 32 * 0.5 / 0.25  # 3 steps of 32 rows
    (at,) = [
        one["virtual_seconds"] for one in events_of(tmp_path) if one["event"] == "reply" and one["site"] == "bench-00"
    ]
    assert at == pytest.approx(down / 4000.0 + trained + up / 1000.0, abs=1e-5)


def size_of(content: Any) -> int:
    arrays = sum(len(array.data) for array in content.array_records["arrays"].values())
    return arrays + len(str(content.config_records["header"]["json"])) + 8 * len(content.metric_records["metrics"])


@pytest.mark.parametrize(
    ("plan", "rows", "seen"),
    [
        ({"steps": 3, "batch_size": 32}, 100, 96),
        ({"steps": 3, "batch_size": 32}, 20, 60),
        ({"epochs": 2.0, "batch_size": 25}, 100, 200),
        ({"steps": 4, "optimizer": "lbfgs"}, 100, 400),
        ({"steps": 3, "batch_size": 32, "personal": 0.1}, 100, 192),
        ({}, 0, 0),
    ],
)
def test_the_rows_a_round_sees(plan: dict[str, Any], rows: int, seen: int) -> None:
    assert rows_seen(LocalPlan.model_validate(plan), rows) == seen


def test_nobody_is_asked_anything_outside_its_hours(benches: list[Path], tmp_path: Path) -> None:
    grid = live(benches[:8], tmp_path, BUSY, rounds=4, **LINEAR, cohort={**PATIENT, "min_sites": 8})
    inner = grid.inner
    assert isinstance(inner, Inner)
    shifted = [node for node, draw in grid.draws.items() if not draw.hours.always]
    assert len(shifted) == 4
    assert {node for _, node, _, _ in inner.sent} == set(inner.contexts)
    for _, node, _, at in inner.sent:
        draw = grid.draws[node]
        assert draw.hours.online(round(at * SECOND))
        if node in shifted:  # said by hand as well: a shift from 6 to 14, Monday to Friday, in the site's own zone
            local = (at / 3600 + draw.zone) % 168
            assert local < 5 * 24
            assert 6 <= local % 24 < 14


def test_a_message_to_who_is_not_there_reaches_nobody(benches: list[Path], tmp_path: Path) -> None:
    inner = Inner(benches[:2], tmp_path)
    grid = inner.world = WorldGrid(inner, run_of({"calendars": NIGHT, "start_hour": 12.0}, **LINEAR))
    assert grid.get_node_ids() == []
    (sent,) = grid.push_messages([grid.create_message(to_records({}, "{}"), "train", 2, "1")])
    grid.clock.sleep(DAY_S)
    assert grid.get_node_ids() == [2, 3]  # the clock has stopped where the night begins
    assert grid.clock.monotonic() == 10 * 3600
    grid.clock.sleep(DAY_S)
    assert grid.pull_messages([sent]) == []
    assert inner.sent == []


def test_a_lost_reply_is_asked_again_after_resend_s_and_counted_once(benches: list[Path], tmp_path: Path) -> None:
    quick = {"min_sites": 4, "deadline_s": 1000.0, "resend_s": 7.0}
    live(benches[:4], tmp_path / "whole", {"row_seconds": 1e-3}, **LINEAR, cohort=quick)
    grid = live(benches[:4], tmp_path / "lossy", {"row_seconds": 1e-3, "reply_loss": 0.4}, **LINEAR, cohort=quick)
    inner = grid.inner
    assert isinstance(inner, Inner)
    asked: dict[tuple[int, int], list[float]] = {}
    for kind, node, round, at in inner.sent:
        if kind == "train":
            asked.setdefault((round, node), []).append(at)
    again = [times for times in asked.values() if len(times) > 1]
    assert again
    for times in again:
        waits = [7.0 * 2**number for number in range(len(times) - 1)]
        np.testing.assert_allclose(np.diff(times), waits, atol=1e-5)
    heard = {
        (one["round"], one["site"]): one["virtual_seconds"]
        for one in events_of(tmp_path / "lossy")
        if one["event"] == "reply"
    }
    for (round, node), times in asked.items():  # who has trained already answers from its vault, at once
        took = heard[round, grid.draws[node].site] - times[-1]
        assert took == pytest.approx(0.0 if len(times) > 1 else 0.096, abs=1e-5)
    assert all(
        one["sites"] == [folder.name for folder in benches[:4]] for one in read_report(tmp_path / "lossy")["rounds"]
    )
    assert trunk_of(tmp_path / "lossy").digest() == trunk_of(tmp_path / "whole").digest()


def test_a_site_that_drops_out_costs_itself_that_round_and_no_real_time(benches: list[Path], tmp_path: Path) -> None:
    began = time.monotonic()
    cohort = {"min_sites": 6, "deadline_s": 5 * DAY_S, "quorum": 0.1}
    grid = live(benches[:6], tmp_path, {"drop_out": 0.3}, rounds=6, **LINEAR, cohort=cohort)
    assert time.monotonic() - began < 60.0  # of 5 days a round
    missing = {round: set(causes) for round, causes in refusals_of(tmp_path).items()}
    assert len({frozenset(sites) for sites in missing.values()}) > 2  # another draw each round
    inner = grid.inner
    assert isinstance(inner, Inner)
    names = {node: draw.site for node, draw in grid.draws.items()}
    trained = {(round, names[node]) for kind, node, round, _ in inner.sent if kind == "train"}
    for one in read_report(tmp_path)["rounds"]:
        assert {site for round, site in trained if round == one["round"]} == set(one["sites"])
    scored = {names[node] for kind, node, _, _ in inner.sent if kind == "evaluate"}
    assert scored == set(names.values())


def test_a_slow_site_past_the_deadline_costs_one_site(benches: list[Path], tmp_path: Path) -> None:
    world = {"row_seconds": 0.01, "speeds": [[0.25, 0.001]]}  # 3 x 32 rows: a second; for one site of four 16 minutes
    cohort = {"min_sites": 4, "deadline_s": 60.0, "resend_s": 600.0}
    grid = live(benches[:4], tmp_path, world, rounds=2, **LINEAR, cohort=cohort)
    (slow,) = [draw.site for draw in grid.draws.values() if draw.speed < 1]
    refused = refusals_of(tmp_path)
    assert set(refused[1]) == {slow}
    assert "no reply within 60 s" in refused[1][slow]
    assert all(len(one["sites"]) == 3 for one in read_report(tmp_path)["rounds"])
    first, second = ends_of(tmp_path)
    assert first == pytest.approx(60.0, abs=1e-3)
    assert second == pytest.approx(60.0 + 0.96, abs=1e-3)  # it was silent, so it is no longer waited for


def test_a_week_of_nightly_rounds_with_twenty_sites_takes_seconds(benches: list[Path], tmp_path: Path) -> None:
    world = {"calendars": NIGHT, "start_hour": 20.0, "round_hours": 24.0, "row_seconds": 10.0, "speed_spread": 0.3}
    began = time.monotonic()
    live(benches, tmp_path, world, rounds=7, **LINEAR, cohort={**PATIENT, "min_sites": 20, "quorum": 1.0})
    assert time.monotonic() - began < 60.0
    starts = [one["virtual_seconds"] for one in events_of(tmp_path) if one["event"] == "round"]
    # gathered when the first night begins at 22, two hours after the start; then every night
    assert starts == [7200.0 + DAY_S * night for night in range(7)]
    assert all(0.0 < end - start < 8 * 3600 for start, end in zip(starts, ends_of(tmp_path), strict=True))


def test_what_a_night_does_not_finish_goes_on_in_the_next(benches: list[Path], tmp_path: Path) -> None:
    world = {
        "calendars": NIGHT,
        "start_hour": 22.0,
        "row_seconds": 10 * 3600 / 96,
    }  # 96 rows: ten hours, of eight a night
    live(benches[:2], tmp_path, world, rounds=1, **LINEAR, cohort=PATIENT)
    assert ends_of(tmp_path) == [pytest.approx(26 * 3600.0, abs=1e-3)]


def test_a_deadline_shorter_than_the_day_nobody_is_there_stops_the_run(benches: list[Path], tmp_path: Path) -> None:
    world = {"calendars": NIGHT, "start_hour": 23.0, "round_hours": 12.0}
    with pytest.raises(QuorumError, match=r"Round 2: 0 of 2 sites were admitted.*--resume"):
        live(benches[:2], tmp_path, world, **LINEAR, cohort={**PATIENT, "deadline_s": 600.0})


def test_without_enough_sites_in_time_the_start_says_who_came(benches: list[Path], tmp_path: Path) -> None:
    world = {"calendars": [{"share": 0.5, "hours": [[12, 13]]}]}
    with pytest.raises(QuorumError, match="1 of 2 sites have joined"):
        live(benches[:2], tmp_path, world, **LINEAR, cohort={"min_sites": 2, "gather_s": 3600.0})


def test_a_site_that_hangs_stops_the_run_instead_of_standing_still(benches: list[Path], tmp_path: Path) -> None:
    def hang(message: Message, honest: Callable[[], Message]) -> Message | None:
        return None if message.metadata.message_type == "train" else honest()

    inner = Inner(benches[:2], tmp_path, {3: hang})
    grid = inner.world = WorldGrid(inner, run_of({"row_seconds": 1.0}, **LINEAR), tmp_path, patience_s=0.3)
    with pytest.raises(DeploymentError, match=r"bench-01 has computed for 0.3 s at one message \(train, round 1\)"):
        federate(benches[:2], tmp_path, grid=grid, world={"row_seconds": 1.0}, **LINEAR)  # type: ignore[arg-type]


def test_send_and_receive_leaves_out_who_is_late(benches: list[Path], tmp_path: Path) -> None:
    inner = Inner(benches[:2], tmp_path)
    world = {"down_mb_s": 0.001, "links": [[0.5, 0.001]]}  # 1 kB/s for one, 1 byte/s for the other
    grid = inner.world = WorldGrid(inner, run_of(world, **LINEAR))
    fast, slow = sorted(grid.draws, key=lambda node: grid.draws[node].down)

    def asked() -> list[Message]:  # what a site says of such an order is an error, which is a reply too
        return [grid.create_message(to_records({}, "{" + 98 * " " + "}"), "train", node, "1") for node in (slow, fast)]

    (reply,) = grid.send_and_receive(asked(), timeout=5.0)
    assert reply.metadata.src_node_id == fast
    assert grid.clock.monotonic() == pytest.approx(5.0, abs=1e-5)
    assert [reply.metadata.src_node_id for reply in grid.send_and_receive(asked())] == [fast, slow]
    assert grid.clock.monotonic() == pytest.approx(200.0, abs=1e-5)  # one thing after another


# --- labels that come late, inputs that drift ----------------------------------------------------------------------

LATE = {"round_hours": 24.0, "labels_start": 0.25, "labels_hours": 48.0, "label_delay_hours": 24.0}
DRIFTING = {"round_hours": 24.0, "drift_week": 0.7, "drift_share": 0.5}


def conditions_of(grid: WorldGrid, kind: str = "train") -> dict[int, list[Conditions]]:
    """What each node was told, in the order of the messages."""
    told: dict[int, list[Conditions]] = {}
    for sort, node, content in grid.inner.down:  # type: ignore[attr-defined]
        if sort == kind:
            request = parse_request(str(content.config_records["header"]["json"]))
            told.setdefault(node, []).append(request.conditions)
    return told


def test_a_site_trains_on_the_labels_that_have_come_and_on_all_in_the_end(benches: list[Path], tmp_path: Path) -> None:
    changes = {**LINEAR, "rounds": 5, "cohort": PATIENT}
    grid = live(benches[:2], tmp_path, LATE, **changes)
    # days 0 and 1: none has come yet; day 2: half of them; from day 3 on: all
    assert [one.labelled for one in conditions_of(grid)[2]] == [0.25, 0.25, 0.625, 1.0, 1.0]
    weights = [
        json.loads(str(content.config_records["header"]["json"]))["weight"]
        for kind, node, content in grid.inner.up  # type: ignore[attr-defined]
        if kind == "train" and node == 2
    ]
    rows = weights[-1]
    assert weights == [math.ceil(0.25 * rows), math.ceil(0.25 * rows), math.ceil(0.625 * rows), rows, rows]


def test_labels_that_have_not_come_change_nothing(benches: list[Path], tmp_path: Path) -> None:
    """The rows behind the share that has come could hold anything, but for the scale of a target, which is of all rows."""
    clean, spoilt = tmp_path / "clean" / "bench", tmp_path / "spoilt" / "bench"
    shutil.copytree(benches[0], clean)
    (clean / "site.toml").write_text((clean / "site.toml").read_text() + "[data.split]\nby = 'time'\n")
    shutil.copytree(clean, spoilt)
    table = pl.read_parquet(spoilt / "log.parquet")
    turned = table["y"].to_numpy().copy()
    turned[40:60] = turned[40:60][::-1]  # of 160 rows, of which the first two thirds are trained on
    table.with_columns(y=pl.Series(turned)).write_parquet(spoilt / "log.parquet")

    def apart(rounds: int) -> float:
        ends = []
        for one in (spoilt, clean):
            out = tmp_path / f"out-{one.parent.name}-{rounds}"
            live([one], out, LATE, **{**LINEAR, "rounds": rounds, "cohort": {**PATIENT, "min_sites": 1}})
            ends.append(trunk_of(out))
        return max(float(np.abs(ends[0][name] - ends[1][name]).max()) for name in ends[0])

    assert apart(2) < 1e-6
    assert apart(4) > 1e-3


def test_inputs_move_by_the_week_each_sites_in_its_own_direction(benches: list[Path], tmp_path: Path) -> None:
    grid = live(benches[:4], tmp_path, DRIFTING, **{**LINEAR, "rounds": 3, "cohort": PATIENT})
    told = conditions_of(grid)
    drifting = {node for node, draw in grid.draws.items() if draw.drifts}
    assert len(drifting) == 2
    for node, all_told in told.items():
        assert [one.drift for one in all_told] == pytest.approx([0.0, 0.1, 0.2] if node in drifting else [0.0] * 3)
    ways = []
    for node in sorted(drifting):
        site = open_site(grid.inner.contexts[node].node_config)
        plain = TrainRequest(run="r", seed=5, round=1, rounds=3, trunk=TrunkSpec(), plan=LocalPlan(), lend=())
        for part in ("train", "curve", "test"):
            site.apply_conditions(plain)
            before = site.resident(part).values
            site.apply_conditions(plain.model_copy(update={"conditions": Conditions(drift=0.2)}))
            moved = site.resident(part).values - before
            assert torch.allclose(moved, moved[:1].expand_as(moved), atol=1e-6)  # every row alike
            assert float(moved.square().mean().sqrt()) == pytest.approx(0.2, rel=1e-5)
        ways.append(moved[0])
        kind_of(site, plain)  # vectorized sites begin a run too, and nothing of a world before it may stay
        assert site.resident("test").values is before
    assert not torch.allclose(ways[0], ways[1], atol=0.05)


def test_what_drifts_is_scored_as_it_is_in_the_end(benches: list[Path], tmp_path: Path) -> None:
    changes = {**LINEAR, "rounds": 3, "cohort": PATIENT}
    grid = live(benches[:4], tmp_path, {**DRIFTING, "row_seconds": 900.0}, **changes)
    last = conditions_of(grid)
    for node, (told,) in conditions_of(grid, "evaluate").items():
        if grid.draws[node].drifts:  # the last round took a day, 3 x 32 rows of a quarter of an hour
            assert told.drift == pytest.approx(0.1 * grid.clock.monotonic() / DAY_S)
            assert told.drift == pytest.approx(last[node][-1].drift + 0.1, abs=1e-4)
        else:
            assert told == Conditions()


# --- a run that was stopped ----------------------------------------------------------------------------------------


# an hour of training, and the second round ends at 6, when half of the sites go home
UNTIL_SIX = {"calendars": [{"share": 0.5, "hours": [[22, 6]]}], "start_hour": 4.0, "row_seconds": 37.5}


@pytest.mark.parametrize(
    ("kind", "world"),
    [
        ("train", {**BUSY, "round_hours": 12.0}),
        ("train", {**BUSY, "drop_out": 0.4}),  # who was silent before the stop is not waited for after it
        ("evaluate", BUSY),
        ("train", UNTIL_SIX),
        ("train", {**BUSY, **LATE, **DRIFTING}),
    ],
)
def test_a_resumed_world_equals_an_undisturbed_one_in_bytes_and_times(
    benches: list[Path], tmp_path: Path, kind: str, world: dict[str, Any]
) -> None:
    changes = {**LINEAR, "cohort": {**PATIENT, "min_sites": 6}, "rounds": 4}
    live(benches[:6], tmp_path / "undisturbed", world, **changes)

    def power_cut(message: Message, honest: Callable[[], Message]) -> Message:
        if message.metadata.message_type == kind and int(message.metadata.group_id) >= 3:
            raise KeyboardInterrupt
        return honest()

    with pytest.raises(KeyboardInterrupt):
        live(benches[:6], tmp_path / "cut", world, tamper={4: power_cut}, **changes)
    live(benches[:6], tmp_path / "cut", world, resume=True, **changes)
    assert trunk_of(tmp_path / "cut").digest() == trunk_of(tmp_path / "undisturbed").digest()

    def heard(out: Path) -> dict[tuple[int, str | None], float]:
        told = [one for one in events_of(out) if one["event"] in ("reply", "round_end")]
        return {(one["round"], one.get("site")): one["virtual_seconds"] for one in told}

    assert heard(tmp_path / "cut") == heard(tmp_path / "undisturbed")
    grid = WorldGrid(Inner(benches[:6], tmp_path / "cut"), run_of(world, **changes), tmp_path / "cut", resume=True)
    rounds = grid.complete_report(read_report(tmp_path / "cut"))["rounds"]
    assert [one["virtual_seconds"] for one in rounds] == ends_of(tmp_path / "undisturbed")


def test_who_was_still_at_work_when_the_run_stopped_is_still_at_work(benches: list[Path], tmp_path: Path) -> None:
    world = {"row_seconds": 0.01, "speeds": [[0.5, 0.001]], "down_mb_s": 0.01}  # 3 x 32 rows: a second, or 16 minutes
    changes = {**LINEAR, "cohort": {"min_sites": 2, "deadline_s": 60.0, "quorum": 0.5}, "rounds": 1}
    live(benches[:2], tmp_path, world, **changes)
    grid = WorldGrid(Inner(benches[:2], tmp_path), run_of(world, **changes), tmp_path, resume=True)
    ((node, free),) = grid._free.items()
    assert grid.draws[node].speed < 1
    assert free / SECOND == pytest.approx(960.0, abs=1.0)


def test_a_resume_without_the_journal_says_so(benches: list[Path], tmp_path: Path) -> None:
    live(benches[:2], tmp_path, {"row_seconds": 0.01}, rounds=1, **LINEAR)
    (tmp_path / JOURNAL).write_text('{"round": 7}\n')
    with pytest.raises(
        StorageError, match=r"world\.jsonl: does not say where the world stood after round 1.*--overwrite"
    ):
        live(benches[:2], tmp_path, {"row_seconds": 0.01}, rounds=1, resume=True, **LINEAR)


# --- liars ---------------------------------------------------------------------------------------------------------


def honest_error(folders: list[Path], out: Path, strategy: str, world: dict[str, Any]) -> float:
    """Mean test error of the sites that do not lie; nobody may be refused, so the strategy alone stands between."""
    training = {"steps": 8, "batch_size": 32, "learning_rate": 5e-2, "keep": "last"}
    grid = live(folders, out, world, rounds=8, training=training, strategy={"name": strategy}, **LINEAR)
    report = read_report(out)
    assert all(not one["refused"] for one in report["rounds"])
    hostile = {draw.site for draw in grid.draws.values() if draw.byzantine}
    assert len(hostile) == (2 if world else 0)
    return float(np.mean([row["federated"] for row in report["sites"] if row["site"] not in hostile]))


@pytest.mark.parametrize("lie", ["sign-flip", "scale", "random"])
def test_under_lies_the_median_ends_near_the_clean_run_and_the_mean_does_not(
    benches: list[Path], tmp_path: Path, lie: str
) -> None:
    world = {"byzantine_share": 0.25, "attack": lie}
    clean = honest_error(benches[:8], tmp_path / "clean", "fedavg", {})
    assert honest_error(benches[:8], tmp_path / "median", "median", world) < 1.1 * clean
    assert honest_error(benches[:8], tmp_path / "mean", "fedavg", world) > 1.3 * clean


def test_a_named_liar_lies_and_nobody_else(benches: list[Path], tmp_path: Path) -> None:
    world = {"byzantine_sites": ["bench-01"], "attack": "sign-flip"}
    grid = live(benches[:3], tmp_path, world, rounds=1, **LINEAR)
    assert [draw.site for draw in grid.draws.values() if draw.byzantine] == ["bench-01"]
    with pytest.raises(
        ConfigError, match=r"\[world\] byzantine_sites names 'bench-9'; the sites are bench-00, bench-01"
    ):
        live(benches[:3], tmp_path, {"byzantine_sites": ["bench-9"]}, **LINEAR)


# --- the report and the file ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("world", "words"),
    [
        ({"calendar": []}, ["unknown key `world.calendar`", "did you mean 'calendars'"]),
        ({"calendars": [{"share": 0.5, "hours": [[6, 25]]}]}, ["`world.calendars.0`", "`hours` holds [6, 25]", "from 0 to 24"]),
        ({"calendars": [{"share": 0.5, "hours": [[6, 6]]}]}, ["`hours` holds [6, 6]", "all day is [0, 24]"]),
        ({"calendars": [{"share": 0.5, "days": ["monday"]}]}, ["`world.calendars.0.days.0`", "'mon'", "Found 'monday'"]),
        ({"calendars": [{"share": 0.6}, {"share": 0.6}]}, ["`calendars` sum to 1.2", "1 or less"]),
        ({"row_seconds": 1.0, "speeds": [[0.5, 0.0]]}, ["`world`", "`speeds` are pairs of a share", "factor above 0"]),
        ({"up_mb_s": 1.0, "links": [[0.7, 1.0], [0.7, 2.0]]}, ["`links` sum to 1.4"]),
        ({"speed_spread": 0.5}, ["`speed_spread` changes nothing without `row_seconds`", "set it"]),
        ({"link_spread": 0.5}, ["`link_spread` changes nothing without `up_mb_s` or `down_mb_s`"]),
        ({"zones": [1.0]}, ["`zones` changes nothing without `calendars`"]),
        ({"zones": [30.0], "calendars": SHIFTS}, ["`zones` holds 30", "from -14 to 14"]),
        ({"byzantine_share": 0.1, "byzantine_sites": ["a"]}, ["both choose the Byzantine sites", "drop one"]),
        ({"labels_start": 0.5}, ["`labels_start` leaves labels out", "`labels_hours` or `label_delay_hours`"]),
        ({"labels_hours": 5.0}, ["`labels_hours`", "change nothing while `labels_start` is 1", "lower it"]),
        ({"drift_share": 0.5}, ["`drift_share` changes nothing without `drift_week`"]),
        ({"attack": "scal"}, ["`world.attack`", "'sign-flip', 'scale' or 'random'", "Found 'scal'"]),
        ({"drop_out": 1.0}, ["`world.drop_out`", "less than 1", "Found 1.0"]),
        ({"up_mb_s": 0.0}, ["`world.up_mb_s`", "greater than 0"]),
    ],
)  # fmt: skip
def test_a_world_that_cannot_be_meant_is_refused_by_key(world: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_run({"world": world}, "run.toml")
    for word in ["run.toml", *words]:
        assert word in str(caught.value)


def test_pooled_rows_have_no_world(benches: list[Path], tmp_path: Path) -> None:
    run = run_of({"row_seconds": 1.0}, strategy={"name": "central"}, **LINEAR)
    with pytest.raises(ConfigError, match=r"take \[world\] out"):
        simulate(run, benches[:2], tmp_path, workers=1)


def test_the_report_says_what_the_world_made_of_each_site(benches: list[Path], tmp_path: Path) -> None:
    world = {"row_seconds": 0.01, "speeds": [[0.5, 0.5]], "byzantine_sites": ["bench-00"]}
    grid = live(benches[:2], tmp_path, world, rounds=2, **LINEAR)
    report = grid.complete_report(read_report(tmp_path))
    json.dumps(report, allow_nan=False)
    assert set(report["world"]) == {"virtual_seconds", "sites"}
    assert set(report["world"]["sites"]) == {"bench-00", "bench-01"}
    assert set(report["world"]["sites"]["bench-00"]) == {"always_there", "zone", "speed", "drifts", "hostile"}
    assert report["world"]["sites"]["bench-00"]["hostile"]
    assert sorted(one["speed"] for one in report["world"]["sites"].values()) == [0.5, 1.0]
    assert report["world"]["virtual_seconds"] == report["rounds"][-1]["virtual_seconds"] == grid.clock.monotonic()


def test_over_selected_a_round_takes_as_long_as_the_fast_and_late_replies_are_not_added(
    benches: list[Path], tmp_path: Path
) -> None:
    world = {"row_seconds": 10.0, "speeds": [[0.5, 0.1]]}
    settings = {**LINEAR, "rounds": 4}
    cohort = {**PATIENT, "min_sites": 8, "share": 0.5, "quorum": 1.0}
    live(benches[:8], tmp_path / "plain", world, cohort=cohort, **settings)
    grid = live(benches[:8], tmp_path / "over", world, cohort={**cohort, "over_select": 2.0}, **settings)
    fast = {draw.site for draw in grid.draws.values() if draw.speed == 1.0}
    rounds = read_report(tmp_path / "over")["rounds"]
    assert all(set(one["sites"]) == fast and not one["refused"] for one in rounds)
    trained = [node for kind, node, _, _ in grid.inner.sent if kind == "train"]
    assert len(trained) == 8 * 4  # the slow were asked each time, are still at work, and nobody has their replies
    assert ends_of(tmp_path / "over")[-1] < 0.2 * ends_of(tmp_path / "plain")[-1]


def test_over_selected_without_a_world_a_round_has_its_share_and_no_more(benches: list[Path], tmp_path: Path) -> None:
    cohort = {"min_sites": 8, "share": 0.5, "over_select": 1.5}
    run = parse_run({**QUICK, **LINEAR, "rounds": 2, "cohort": cohort}, "test")
    simulate(run, benches[:8], tmp_path, workers=0)
    assert [len(one["sites"]) for one in read_report(tmp_path)["rounds"]] == [4, 4]
