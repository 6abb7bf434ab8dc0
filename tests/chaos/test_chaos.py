"""Nothing is lost: short drills, and that a drill would notice if something were. `make chaos` has the long form."""

import dataclasses
import errno
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.chaos.drill import RUN, account, drill, undisturbed
from tests.chaos.faults import KINDS, draw
from tests.chaos.machine import Clock, Disk
from tests.chaos.outcome import Outcome, differences, outcome_of
from tests.chaos.world import CENTRE, World, world
from tests.federation import events
from trunkline.config.run import parse_run

SEED, RUNS, ROUNDS, MOST = 96652, 6, 5, 4  # a seed whose few runs hold every kind of fault: the first test says so
NAMES = ["kiln-02", "mill-04", "press-01", "pump-03"]
DRAWN = draw(SEED, RUNS, NAMES, ROUNDS, most=MOST)


def test_the_short_drills_hold_every_kind_of_fault_between_them() -> None:
    faults = [fault for run in DRAWN for fault in run]
    assert {fault.kind for fault in faults} >= {kind.kind for kind in KINDS} - {"clock", "clock-hours"}
    assert {fault.part for fault in faults if fault.kind == "kill"} >= {
        "serverapp", "superlink", "gateway", "supernode", "executor",
    }  # fmt: skip
    for kind in ("power", "full-disk", "damage"):
        assert {fault.victim == CENTRE for fault in faults if fault.kind == kind} == {True, False}, kind
    assert any(fault.kind.startswith("clock") for fault in faults)
    assert draw(SEED, RUNS, NAMES, ROUNDS, most=MOST) == DRAWN, "a seed says what happens"


@pytest.fixture(scope="module")
def made(plants: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    assert [folder.name for folder in plants] == NAMES
    with world(tmp_path_factory.mktemp("w"), plants) as made:
        yield made


@pytest.fixture(scope="module")
def expected(made: World) -> Outcome:
    return undisturbed(made, ROUNDS)


@pytest.mark.processes
@pytest.mark.xdist_group("chaos")
@pytest.mark.timeout(900)
# the first is the smoke test of `make test`
@pytest.mark.parametrize("number", [0, *(pytest.param(number, marks=pytest.mark.slow) for number in range(1, RUNS))])
def test_a_run_ends_by_itself_with_the_same_bytes_whatever_happens_to_it(
    made: World, expected: Outcome, number: int
) -> None:
    done = drill(made, f"run-{number}", DRAWN[number], expected, ROUNDS)
    assert not done.problems, account(done, SEED, made)


@pytest.mark.processes
@pytest.mark.xdist_group("chaos")
@pytest.mark.timeout(300)
@pytest.mark.slow
def test_two_runs_at_once_on_the_same_plants_share_them_fairly_and_mix_nothing(made: World, expected: Outcome) -> None:
    toml = RUN.format(rounds=ROUNDS)
    outs = [made.server / "runs" / name for name in ("one", "two")]
    followers = [made.run(toml, out) for out in outs]  # of one name, in the same second
    for follower in followers:
        assert follower.wait(120.0) == 0, made.log_tails()
    for out in outs:
        found = outcome_of(made, out, parse_run(tomllib.loads(toml), "RUN"), 0.0)
        assert differences(expected, found) == []
    ends = sorted((one["at"], out.name) for out in outs for one in events(out) if one["event"] == "round_end")
    order = [name for _, name in ends]
    both = order[: min(len(order) - order[::-1].index(name) for name in ("one", "two"))]  # until the first had ended
    assert abs(both.count("one") - both.count("two")) <= 2, order


OUTCOME = Outcome(
    2, "t", {"a": "1", "b": "2"}, [(1, ("a", "b")), (2, ("a", "b"))], {"sites": [{"site": "a", "local": 1.0}]}, [], 9.0
)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"trunk": "u"}, "the trunk is u"),
        ({"heads": {"a": "1", "b": "3"}}, "the heads of b"),
        ({"report": {"sites": [{"site": "a", "local": 1.5}]}}, r"sites[0].local is 1.5"),
        ({"rounds": [(1, ("a", "b"))]}, "its rounds are [1]"),
        ({"rounds": [(1, ("a", "b")), (2, ("a", "b", "b"))]}, "round 2 counted a site twice"),
        ({"rounds": [(1, ("a", "b")), (2, ("a",))], "miscounted": ["round 2: the trunk is not"]}, "round 2: the trunk"),
    ],
)
def test_a_drill_notices_what_is_not_as_undisturbed(change: dict[str, Any], words: str) -> None:
    assert differences(OUTCOME, OUTCOME) == []
    assert words in "; ".join(differences(OUTCOME, dataclasses.replace(OUTCOME, **change)))


def test_a_run_with_other_sites_in_a_round_is_held_to_its_counts_only() -> None:
    other = dataclasses.replace(OUTCOME, trunk="u", rounds=[(1, ("a",)), (2, ("a", "b"))])
    assert differences(OUTCOME, other) == []


def test_a_clock_moves_for_the_processes_of_its_machine_only_and_at_once(tmp_path: Path) -> None:
    library = Clock.build(tmp_path)
    if library is None:
        pytest.skip("a clock is moved by a few lines of C, and there is no `cc`")
    clock = Clock(tmp_path / "clock", library)
    code = "import time,sys\nfor line in sys.stdin: print(time.time(), time.monotonic(), flush=True)"
    process = subprocess.Popen(
        [sys.executable, "-S", "-c", code], env=clock.environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )  # fmt: skip

    def read() -> tuple[float, float]:
        assert process.stdin and process.stdout
        process.stdin.write("\n")
        process.stdin.flush()
        now, running = map(float, process.stdout.readline().split())
        return now, running

    with process:
        (before, since), _ = read(), clock.set(-7200)
        (after, until), _ = read(), clock.set(0)
        assert after - before == pytest.approx(until - since - 7200, abs=0.5)
        assert read()[0] - before == pytest.approx(0.0, abs=60.0)
        process.terminate()


def test_a_full_disk_takes_nothing_until_it_is_freed(tmp_path: Path) -> None:
    disk = Disk(tmp_path / "d", 2)
    if not disk.own:
        pytest.skip("this account may not mount a disk of its own; the drills limit the size of files instead")
    try:
        disk.fill([])
        with pytest.raises(OSError) as full:
            (disk.folder / "more").write_bytes(bytes(5000))
        assert full.value.errno == errno.ENOSPC
        disk.free()
        (disk.folder / "more").write_bytes(bytes(1 << 20))
    finally:
        disk.close()


def test_without_a_disk_of_its_own_a_machine_may_not_write_either(tmp_path: Path) -> None:
    disk = Disk(tmp_path / "d", 2)
    disk.close()
    assert not disk.own
    code = (
        "import sys\nfor line in sys.stdin:\n try: open(sys.argv[1], 'wb', 0).write(b'x'); print('written', flush=True)\n"
        " except OSError as error: print(error.errno, flush=True)"
    )
    process = subprocess.Popen(
        [sys.executable, "-S", "-c", code, str(disk.folder / "f")], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )  # fmt: skip

    def write() -> str:
        assert process.stdin and process.stdout
        process.stdin.write("\n")
        process.stdin.flush()
        return process.stdout.readline().strip()

    with process:
        assert write() == "written"
        disk.fill([process.pid])
        assert write() == str(errno.EFBIG)
        disk.free()
        assert write() == "written"
        process.terminate()
