"""Buffered rounds: what an update counts, that it counts once, and that nobody is waited for."""

import json
import shutil
from collections import Counter
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import Message
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.end_to_end.test_plant_hours import FakeClock, gives_hours, hour_by_hour
from tests.loopback import QUICK, WatchedGrid, events_of, federate, refusals_of, trunk_of
from trunkline.client import handlers as client_rounds
from trunkline.client.state.vault import Vault
from trunkline.config.run import parse_run
from trunkline.errors import ConfigError, QuorumError
from trunkline.flower.records import open_records
from trunkline.protocol.arrays import Arrays
from trunkline.protocol.messages import Update
from trunkline.protocol.plan import LocalPlan
from trunkline.server.reporting.report import read_report
from trunkline.server.rounds.buffered import check_bufferable, damped, damping
from trunkline.simulations.world.network import WorldGrid
from trunkline.strategies import STRATEGIES, StrategyState, build_strategy

LINEAR: dict[str, Any] = {"lend": ["trunk", "heads"], "trunk": {"backbone": "linear", "columns": 3, "width": 4}}
# 3 steps of 32 rows: a plant of ordinary speed trains for 96 s, a slow one for 960
WORLD: dict[str, Any] = {"row_seconds": 1.0, "speeds": [[0.25, 0.1]], "speed_spread": 0.05}
BUFFERED: dict[str, Any] = {"mode": "buffered", "buffer": 3, "min_sites": 1, "deadline_s": 5000.0, "resend_s": 4000.0}


@pytest.fixture(scope="module")
def benches(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Eight benches that measure the same thing."""
    root = tmp_path_factory.mktemp("benches")
    for number in range(8):
        rng = np.random.default_rng(number)
        x = rng.normal(size=(80, 3))
        y = x @ np.array([2.0, -1.0, 0.5]) + 0.1 * rng.normal(size=80)
        folder = root / f"bench-{number}"
        folder.mkdir()
        np.savez(folder / "log.npz", **{f"x{column}": x[:, column] for column in range(3)}, y=y)
        (folder / "site.toml").write_text(
            f'name = "bench-{number}"\n[data]\nfiles = "log.npz"\nchannels = ["x0", "x1", "x2"]\n'
            '[tasks.y]\nkind = "regression"\ntarget = "y"\nloss = "mse"\n'
        )
    return sorted(root.iterdir())


class Inner(WatchedGrid):
    """What reaches the sites, when by the virtual clock, and for which round."""

    def __init__(self, *args: Any, **more: Any) -> None:
        super().__init__(*args, **more)
        self.sent: list[tuple[int, int, float]] = []  # node, round, seconds
        self.world: WorldGrid

    def _dispatch(self, message: Message, context: Any) -> None:
        if message.metadata.message_type == "train":
            round = json.loads(open_records(message.content)[1])["round"]
            self.sent.append((context.node_id, round, self.world.clock.monotonic()))
        super()._dispatch(message, context)


def live(folders: list[Path], out: Path, *, resume: bool = False, tamper: Any = None, **changes: Any) -> Inner:
    """A whole buffered run on loopback in a world; the grid that saw what reached the sites."""
    changes = {"world": WORLD, "rounds": 12, "cohort": BUFFERED, **LINEAR, **changes}
    inner = Inner(folders, out, tamper)
    run = parse_run({**QUICK, **changes}, "test")
    grid = inner.world = WorldGrid(inner, run, out, resume=resume, patience_s=5.0)
    federate(folders, out, grid=grid, resume=resume, **changes)  # type: ignore[arg-type]
    return inner


def counted(out: Path) -> Counter[tuple[str, int]]:
    """(site, the round it was asked for) -> in how many steps its update is."""
    return Counter(
        (site, one["round"] - steps)
        for one in read_report(out)["rounds"]
        for site, stale in one["staleness"].items()
        for steps in stale
    )


# --- what an update counts ----------------------------------------------------------------------------------------

numbers = st.floats(-3.0, 3.0, width=32)
sent = st.tuples(st.integers(1, 500), st.integers(0, 40), st.lists(numbers, min_size=4, max_size=4))


@settings(max_examples=60, deadline=None)
@given(st.lists(sent, min_size=1, max_size=6), st.sampled_from([0.0, 0.5, 1.0, 2.5]), st.randoms())
def test_a_step_is_the_mean_of_what_staleness_leaves_of_each_update_in_any_order(
    came: list[tuple[int, int, list[float]]], power: float, random: Any
) -> None:
    updates = [
        (Update(f"s{index}", "r", 1, Arrays({"w": np.array(change, np.float32)}), float(weight)), stale)
        for index, (weight, stale, change) in enumerate(came)
    ]
    strategy, start = (
        build_strategy("fedavg", {}, LocalPlan()),
        StrategyState(Arrays({"w": np.zeros(4, np.float32)}), round=40),
    )
    after, mean = strategy.advance(start, [damped(one, stale, power) for one, stale in updates])
    random.shuffle(updates)
    again, _ = strategy.advance(start, [damped(one, stale, power) for one, stale in updates])
    assert after.trunk["w"].tobytes() == again.trunk["w"].tobytes()
    assert mean.weight == sum(weight for weight, _, _ in came)  # what staleness takes does not go to the others
    for index in range(4):
        total = sum(
            weight * Fraction(float(np.float32(np.float32(change[index]) * np.float64((1 + stale) ** -power))))
            for weight, stale, change in came
        )
        exact = total / sum(weight for weight, _, _ in came)
        assert float(after.trunk["w"][index]) == pytest.approx(float(exact), rel=2e-7, abs=1e-12)


def test_a_fresh_update_counts_whole_and_an_old_one_by_its_age() -> None:
    assert [damping(stale, 0.5) for stale in (0, 3, 8)] == [1.0, 0.5, pytest.approx(1 / 3)]
    assert damping(99, 0.0) == 1.0


# --- nobody is waited for, and each update counts once --------------------------------------------------------------


def test_slow_sites_hold_nobody_up_and_their_updates_count_when_they_come(benches: list[Path], tmp_path: Path) -> None:
    inner = live(benches, tmp_path, rounds=24)
    report = read_report(tmp_path)
    slow = {draw.site for draw in inner.world.draws.values() if draw.speed < 0.2}
    assert len(slow) == 2
    # six sites send an update in 96 s, so three of them take half of that; a round that waits takes 960 s
    assert inner.world.ended[24] < 1.2 * 24 * 48.0
    assert report["buffered"]["buffer"] == 3
    assert report["buffered"]["updates"] == 24 * 3 == sum(counted(tmp_path).values())
    assert set(counted(tmp_path).values()) == {1}
    for site in slow:
        found = report["buffered"]["sites"][site]
        assert found["updates"] == 1
        assert 15 <= found["staleness_max"] <= 22
    assert max(one["staleness_max"] for site, one in report["buffered"]["sites"].items() if site not in slow) <= 3
    told = [one for one in events_of(tmp_path) if one["event"] == "round_end"]
    assert [one["updates"] for one in told] == [3] * 24
    assert all(one["staleness_max"] >= one["staleness_mean"] for one in told)


def test_asked_again_and_again_a_site_trains_once_and_counts_once(
    benches: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained = []
    real = client_rounds._train

    def train(site: Any, order: Any, *rest: Any) -> Any:
        trained.append((site.name, order.round))
        return real(site, order, *rest)

    monkeypatch.setattr(client_rounds, "_train", train)
    world = {**WORLD, "reply_loss": 0.3}
    inner = live(
        benches, tmp_path, rounds=24, world=world, cohort={**BUFFERED, "resend_s": 30.0, "staleness_power": 0.0}
    )
    assert len(inner.sent) > 1.5 * len(set(trained))  # they were asked again
    slow = [node for node, draw in inner.world.draws.items() if draw.speed < 0.2]
    # while its trunk is kept, a site at work is asked the same and answers from its vault: once more at most it is not
    assert all(times <= 2 for times in Counter(trained).values())
    assert len(trained) - len(set(trained)) <= len(slow)
    assert set(counted(tmp_path).values()) == {1}
    assert set(counted(tmp_path)) <= set(trained)
    assert [one for one in events_of(tmp_path) if one["event"] == "round_end"][-1]["repeated"] > 0
    for (
        node
    ) in slow:  # rounds that only go up, with gaps, and no more of them than it had time for and some in its queue
        assert len({round for site, round in trained if site == benches[node - 2].name}) <= 4
        state = tmp_path / "state" / benches[node - 2].name
        (folder,) = (state / "vault").iterdir()
        kept = Vault(state, folder.name).shelf.rounds()
        assert kept == sorted(set(kept))


def test_a_site_that_never_answers_holds_nobody_up(benches: list[Path], tmp_path: Path) -> None:
    federate(
        benches[:4], tmp_path, tamper={3: lambda message, honest: None if message.metadata.message_type == "train" else honest()},
        rounds=6, cohort={**BUFFERED, "buffer": 2, "deadline_s": 30.0, "resend_s": 0.05}, **LINEAR,
    )  # fmt: skip
    report = read_report(tmp_path)
    assert [len(one["sites"]) for one in report["rounds"]] == [2] * 6
    assert set(report["buffered"]["sites"]) == {"bench-0", "bench-2", "bench-3"}
    assert sum(one["seconds"] for one in report["rounds"]) < 25.0  # no step has waited for it


def test_who_is_away_is_not_waited_for_and_comes_back_to_the_newest_trunk(benches: list[Path], tmp_path: Path) -> None:
    # six of the eight work in the first and the third hour only; a step takes four updates, or two if no more are there
    shifts = [{"share": 0.75, "hours": [[0, 1], [2, 3]]}]
    cohort = {**BUFFERED, "buffer": 4, "quorum": 0.5, "deadline_s": 86400.0, "resend_s": 86400.0}
    inner = live(benches, tmp_path, rounds=44, world={"row_seconds": 3.0, "calendars": shifts}, cohort=cohort)
    report = read_report(tmp_path)
    shifted = {node for node, draw in inner.world.draws.items() if not draw.hours.always}
    away = [one for one in report["rounds"] if 3900 < inner.world.ended[one["round"]] < 7200]
    assert len(away) > 5  # two sites are there, and the run goes on with them
    assert all(len(one["sites"]) == 2 for one in away)
    back = {node: round for node, round, at in reversed(inner.sent) if node in shifted and at >= 7200}
    newest = max(number for number, at in inner.world.ended.items() if at < 7200) + 1
    assert set(back) == shifted
    assert all(newest <= round <= newest + 1 for round in back.values())


@pytest.mark.slow
def test_who_is_closed_is_not_asked_and_while_all_are_the_run_waits(
    plants: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = FakeClock(monkeypatch)  # Monday at 4
    folders = [shutil.copytree(folder, tmp_path / folder.name) for folder in plants[:3]]
    for folder, shift in zip(folders, ("[[6, 8]]", "[[4, 10]]", "[[4, 10]]"), strict=True):
        gives_hours(folder, f'hours = {shift}\nzone = "UTC"')
    out = tmp_path / "out"
    cohort = {**BUFFERED, "buffer": 2, "deadline_s": 20.0, "resend_s": 20.0}
    asked = []

    def when(message: Message, honest: Any) -> Any:
        if message.metadata.message_type == "train":
            asked.append(clock.at.hour)
        return honest()

    federate(folders, out, rounds=10, plant=True, cohort=cohort, tamper={2: when, 3: hour_by_hour(clock)})
    shift = folders[0].name
    report = read_report(out)
    assert [one["round"] for one in report["rounds"]] == list(range(1, 11))
    assert set(asked) == {6, 7}
    assert len(asked) == report["buffered"]["sites"][shift]["updates"]
    assert refusals_of(out) == {number: {} for number in range(1, 11)}
    told = [one["text"] for one in events_of(out) if one["event"] == "note"]
    assert any(text.startswith(f"{shift} is closed until Mon 2026-11-23 06:00 UTC") for text in told)
    assert sum(text.startswith("The run waits: all 3 sites are away") for text in told) == 1


def test_a_site_that_says_that_it_is_closed_is_asked_again_when_it_is_not(
    plants: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = FakeClock(monkeypatch)
    folders = [shutil.copytree(folder, tmp_path / folder.name) for folder in plants[:3]]
    rounds = []

    def closes_meanwhile() -> None:
        rounds.append(clock.at)
        if len(rounds) == 1:
            gives_hours(folders[0], 'zone = "UTC"\nclosed = ["2026-11-23 05:00 to 2026-11-23 06:30"]')

    out = tmp_path / "out"
    cohort = {**BUFFERED, "buffer": 2, "deadline_s": 20.0, "resend_s": 20.0}
    tamper = {3: hour_by_hour(clock, closes_meanwhile)}
    grid = federate(folders, out, rounds=8, plant=True, cohort=cohort, tamper=tamper)
    asked = [node for kind, node, _ in grid.down if kind == "train"]
    updates = read_report(out)["buffered"]["sites"][folders[0].name]["updates"]
    assert asked.count(2) == updates + 1  # the one it was closed at; not again before it is open
    assert refusals_of(out) == {number: {} for number in range(1, 9)}


def test_what_is_too_old_is_set_aside_by_name_and_the_run_goes_on(benches: list[Path], tmp_path: Path) -> None:
    inner = live(benches, tmp_path, rounds=24, cohort={**BUFFERED, "staleness_limit": 4})
    slow = {draw.site for draw in inner.world.draws.values() if draw.speed < 0.2}
    causes = [cause for told in refusals_of(tmp_path).values() for site, cause in told.items() if site in slow]
    assert len(causes) == 2
    assert all("update set aside" in cause and "staleness_limit is 4" in cause for cause in causes)
    assert not slow & set(read_report(tmp_path)["buffered"]["sites"])


def test_when_nobody_answers_the_run_stops_with_its_state_on_disk(benches: list[Path], tmp_path: Path) -> None:
    def dies(message: Message, honest: Any) -> Any:
        if message.metadata.message_type == "train":
            return honest() if json.loads(open_records(message.content)[1])["round"] < 3 else None
        return honest()

    cohort = {**BUFFERED, "deadline_s": 0.3, "resend_s": 0.1}
    with pytest.raises(QuorumError, match=r"Round 3: no update came within 0.3 s.*after round 2.*--resume"):
        federate(benches[:4], tmp_path, tamper=dict.fromkeys(range(2, 6), dies), rounds=4, cohort=cohort, **LINEAR)
    federate(benches[:4], tmp_path, resume=True, rounds=4, cohort=cohort, **LINEAR)
    assert [one["round"] for one in read_report(tmp_path)["rounds"]] == [1, 2, 3, 4]


# --- a cut ----------------------------------------------------------------------------------------------------------


class PowerCut(BaseException):
    """Not an Exception, so that nothing in the code under test can catch it."""


def cut_at(round: int, after: int) -> Any:
    """Tamper every node so that the `after`th training of that round ends everything."""
    seen = []

    def tamper(message: Message, honest: Any) -> Any:
        if message.metadata.message_type == "train" and json.loads(open_records(message.content)[1])["round"] == round:
            seen.append(message)
            if len(seen) == after:
                raise PowerCut
        return honest()

    return dict.fromkeys(range(2, 10), tamper)


def test_a_resumed_run_on_sites_that_answer_in_turn_equals_an_undisturbed_one(
    benches: list[Path], tmp_path: Path
) -> None:
    settings = {**LINEAR, "rounds": 8, "cohort": {**BUFFERED, "buffer": None}, "strategy": {"name": "fedavgm"}}
    federate(benches[:5], tmp_path / "whole", **settings)
    for round, after in ((1, 2), (4, 3), (8, 2)):
        out = tmp_path / f"cut-{round}"
        with pytest.raises(PowerCut):
            federate(benches[:5], out, tamper=cut_at(round, after), **settings)
        federate(benches[:5], out, resume=True, **settings)
        assert trunk_of(out).digest() == trunk_of(tmp_path / "whole").digest()
        one, other = read_report(out), read_report(tmp_path / "whole")
        assert one["buffered"] == other["buffered"]
        assert one["buffered"]["buffer"] == 3  # half of the five that were there at the start
        assert [told["curves"] for told in one["rounds"]] == [told["curves"] for told in other["rounds"]]


def test_resumed_with_more_sites_a_run_keeps_the_buffer_it_began_with(benches: list[Path], tmp_path: Path) -> None:
    settings = {**LINEAR, "rounds": 6, "cohort": {**BUFFERED, "buffer": None}}
    with pytest.raises(PowerCut):
        federate(benches[:4], tmp_path, tamper=cut_at(3, 1), **settings)
    federate(benches[:6], tmp_path, resume=True, **settings)
    report = read_report(tmp_path)
    assert len(report["cohort"]) == 6
    assert [len(one["sites"]) for one in report["rounds"]] == [2] * 6


def test_a_run_cut_while_slow_sites_are_at_work_asks_them_again_and_counts_nothing_twice(
    benches: list[Path], tmp_path: Path
) -> None:
    with pytest.raises(PowerCut):
        live(benches, tmp_path, tamper=cut_at(9, 2))
    inner = live(benches, tmp_path, resume=True, rounds=12)
    assert [one["round"] for one in read_report(tmp_path)["rounds"]] == list(range(1, 13))
    assert {round for _, round, _ in inner.sent} <= set(range(9, 13))
    assert {node for node, round, _ in inner.sent if round == 9} == set(inner.contexts)  # the slow ones too
    assert set(counted(tmp_path).values()) == {1}
    assert sum(counted(tmp_path).values()) == 36


# --- what cannot be buffered --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(STRATEGIES))
def test_only_strategies_that_take_a_weighted_mean_of_what_comes_are_buffered(name: str) -> None:
    strategy = build_strategy(name, {}, LocalPlan())
    if name in ("clustered", "conflict_averse", "local", "median", "multikrum", "trimmed_mean"):
        with pytest.raises(ConfigError, match=rf"name = '{name}'.*mode = 'rounds'.*fedadam.*fedper"):
            check_bufferable(strategy, name)
    else:
        check_bufferable(strategy, name)


def test_a_run_with_such_a_strategy_stops_before_anybody_is_asked(benches: list[Path], tmp_path: Path) -> None:
    grid = WatchedGrid(benches[:2], tmp_path)
    with pytest.raises(ConfigError, match="median"):
        federate(benches[:2], tmp_path, grid=grid, strategy={"name": "median"}, cohort=BUFFERED, **LINEAR)
    assert grid.down == []


@pytest.mark.parametrize(
    ("table", "words"),
    [
        ({"cohort": {"buffer": 3}}, "`buffer` changes nothing without `mode"),
        ({"cohort": {"staleness_power": 1.0}}, "`staleness_power` changes nothing without `mode"),
        ({"cohort": {"mode": "buffered", "share": 0.5}}, "every site that is free is asked"),
        ({"cohort": {"mode": "buffered"}, "refit": True}, "`refit` goes over the same rounds again"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(table: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        parse_run(table, "run.toml")
