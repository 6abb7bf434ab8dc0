"""Drills: whole runs of a real federation with faults drawn from a seed, each held against the undisturbed run.

python -m tests.chaos.drill --runs 30 --seed 0       a line a run, then a table by kind of fault
python -m tests.chaos.drill --runs 30 --seed 0 --only 17
python -m tests.chaos.drill --outages                the centre, then every plant at once, away for 5, 60 and 300 s
"""

import argparse
import json
import signal
import sys
import tempfile
import time
import tomllib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tests.chaos.faults import KINDS, ROUNDS, STAGES, Fault, Injector, draw
from tests.chaos.outcome import Outcome, differences, outcome_of, same_sites
from tests.chaos.world import CENTRE, World, world
from trunkline.config.run import parse_run

POLL_S = 0.05
TAKEN = "its folder is"  # what `server run` says once the centre has written the run down
LONGEST_S = 180.0  # that faults may add to a run; undisturbed it takes some 20
USUAL = 6.0  # and as often the time of the undisturbed run, for a machine that is busy with something else
SETTLE_S = 150.0  # until everything runs again after a run
QUIET_S = 30.0  # after a run has told an error: does anybody take it up again?
RUN = """
name = "drill"
rounds = {rounds}
seed = 11
[trunk]
width = 16
[training]
steps = 3
batch_size = 32
[strategy]
name = "fedrep"
[cohort]
min_sites = 4
quorum = 0.5
deadline_s = 120
gather_s = 120
resend_s = 3
[report]
baseline = false
"""


class Told:
    """What a run has told so far, read as it grows. Lines torn by a kill are passed over, as every reader of it has to."""

    def __init__(self, out: Path, rounds: int) -> None:
        self.rounds = rounds
        self.path = out / "events.jsonl"
        self.reached = (0, 0)  # round, and stage by its place in STAGES
        self.last = ""  # the newest event that ends a run: done or error
        self.text = ""  # of that
        self.grew = time.monotonic()  # when something was told last
        self._position = 0

    def look(self) -> None:
        try:
            with self.path.open("rb") as file:
                if file.seek(0, 2) < self._position:
                    self._position = 0
                file.seek(self._position)
                data = file.read()
        except FileNotFoundError:
            return
        whole = data[: data.rfind(b"\n") + 1]
        self._position += len(whole)
        for line in whole.splitlines():
            try:
                event = json.loads(line)
            except ValueError:
                continue
            self.grew = time.monotonic()
            self._take(event)

    def _take(self, event: dict[str, object]) -> None:
        kind, round = event.get("event"), int(str(event.get("round") or 0))
        if kind in ("done", "error"):
            self.last, self.text = str(kind), str(event.get("text", ""))
        elif kind in ("start", "round", "reply"):
            self.last = ""
        after = {
            "start": (int(str(event.get("resumed_at") or 0)) + 1, 0),
            "round": (round, STAGES.index("training")),
            "reply": (round, STAGES.index("uploading")),
            "round_end": (round, STAGES.index("checkpoint")),
        }
        self.reached = max(self.reached, after.get(str(kind), (0, 0)))
        if kind == "round_end" and round == self.rounds:
            self.reached = (self.rounds + 1, 0)


@dataclass
class Drill:
    """One run and what came of it."""

    name: str
    faults: list[Fault]
    seconds: float = 0.0
    problems: list[str] = field(default_factory=list)
    same: bool = False  # the same sites in each round as undisturbed
    log: list[str] = field(default_factory=list)
    outcome: Outcome | None = None

    @property
    def verdict(self) -> str:
        if self.problems:
            return "FAILED: " + "; ".join(self.problems)
        return "same bytes" if self.same else "other sites in a round; each update counted once"


def drill(made: World, name: str, faults: Sequence[Fault], expected: Outcome | None, rounds: int = ROUNDS) -> Drill:
    """One run with these faults, to its end and until all is well again."""
    toml = RUN.format(rounds=rounds)
    out = made.server / "runs" / name
    done = Drill(name, list(faults))
    longest = (
        LONGEST_S + USUAL * (expected.seconds if expected else 0.0) + max((one.seconds for one in faults), default=0.0)
    )
    began = time.monotonic()
    follower = made.run(toml, out)
    told, injector = Told(out, rounds), Injector(made, list(faults), out)
    taken = False  # a run that was refused, because the disk is full say, has not begun and cannot be lost
    while not done.problems:
        made.tend()
        told.look()
        taken = taken or TAKEN in made.log(name)
        if taken:
            injector.tick(told.reached)
        elif follower.poll() is not None:
            done.problems.append(f"the run was not taken: {made.log(name)}")
        spent = time.monotonic() - began
        if told.last == "done" and not injector.busy:
            break
        if told.last == "error" and time.monotonic() - told.grew > QUIET_S:
            done.problems.append(f"it ended with an error, and nobody took it up: {told.text}")
        elif spent > longest:
            done.problems.append(f"it had not ended after {spent:.0f} s, in round {told.reached[0]}")
        time.sleep(POLL_S)
    injector.end()
    done.seconds, done.log = time.monotonic() - began, injector.done
    try:
        if done.problems:
            made.stop_run()
        made.settle(SETTLE_S)
        if not done.problems:
            done.outcome = outcome_of(made, out, parse_run(tomllib.loads(toml), "RUN"), done.seconds)
            done.problems += differences(expected or done.outcome, done.outcome)
            done.same = same_sites(expected or done.outcome, done.outcome)
            if (code := follower.wait(20.0)) != 0:
                done.problems.append(f"`server run` ended with {code}: {made.log(name)[-300:]}")
    except Exception as error:
        done.problems.append(f"{type(error).__name__}: {error}")
    del made.running[name]
    if follower.poll() is None:
        follower.terminate()
        follower.wait(10.0)
    return done


def undisturbed(made: World, rounds: int = ROUNDS) -> Outcome:
    """The run without a fault, which all others are held against."""
    done = drill(made, "undisturbed", [], None, rounds)
    assert done.outcome is not None, "\n".join([*done.problems, made.log_tails()])
    wanted = [(round, tuple(sorted(made.plants))) for round in range(1, rounds + 1)]
    assert done.outcome.rounds == wanted, done.outcome.rounds
    return done.outcome


def account(one: Drill, seed: int, made: World) -> str:
    """Everything there is to know of a drill that failed."""
    waiting = [f"   ...    {fault}" for fault in one.faults if not any(str(fault) in line for line in one.log)]
    lines = [
        f"seed {seed}, {one.name}, {one.seconds:.0f} s: {one.verdict}",
        *one.log,
        *waiting,
        made.log_tails(one.name),
    ]
    return "\n".join(lines)


def outages(made: World, expected: Outcome, lengths: Sequence[float]) -> list[Drill]:
    """The whole centre, then every plant at once, away for so many seconds in the middle of a run."""
    done = []
    for seconds in lengths:
        for victims in ([CENTRE], sorted(made.plants)):
            faults = [Fault("power", victim, "", 4, "training", 0.1, seconds) for victim in victims]
            who = "centre" if victims == [CENTRE] else "plants"
            done.append(drill(made, f"{who}-{seconds:g}", faults, expected))
            print(f"{who} away for {seconds:g} s: {done[-1].seconds:.0f} s, {done[-1].verdict}", flush=True)
            if done[-1].problems:
                print(account(done[-1], 0, made), flush=True)
    return done


def table(drills: Sequence[Drill]) -> str:
    """How often each kind of fault was put in, and in how many runs that failed."""
    put: Counter[str] = Counter()
    failed: Counter[str] = Counter()
    for one in drills:
        for fault in one.faults:
            name = f"{fault.kind} {fault.part} {'centre' if fault.victim == CENTRE else 'plant'}".replace("  ", " ")
            put[name] += 1
            failed[name] += bool(one.problems)
    width = max(map(len, put), default=0)
    return "\n".join(
        f"{name:<{width}}  {put[name]:3d} put in, {failed[name]:2d} in runs that failed" for name in sorted(put)
    )


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.chaos.drill", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--runs", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", type=int, action="append", help="of these runs, by number from 0; may be repeated")
    parser.add_argument("--kinds", default="", help="only kinds whose name begins with one of these, with commas")
    parser.add_argument("--without", default="", help="no kinds whose name begins with one of these, with commas")
    parser.add_argument(
        "--outages", nargs="*", type=float, metavar="S", help="outages of so many seconds instead; default 5 60 300"
    )
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # or daemons and mounts would be left behind
    from trunkline.simulations.factories import write_sites

    only, without = (tuple(filter(None, text.split(","))) for text in (options.kinds, options.without))
    kinds = tuple(
        one
        for one in KINDS
        if (not only or one.name.startswith(only)) and not (without and one.name.startswith(without))
    )
    with tempfile.TemporaryDirectory(prefix="drill-") as folder:
        root = Path(folder)
        plants = sorted(write_sites("synthetic", root / "sites", groups=12))
        began = time.monotonic()
        with world(root / "w", plants) as made:
            online = time.monotonic() - began
            expected = undisturbed(made)
            print(f"online after {online:.0f} s; undisturbed: {time.monotonic() - began - online:.0f} s", flush=True)
            if options.outages is not None:
                drills = outages(made, expected, options.outages or (5.0, 60.0, 300.0))
            else:
                drills = []
                for number, faults in enumerate(draw(options.seed, options.runs, sorted(made.plants), kinds=kinds)):
                    if options.only and number not in options.only:
                        continue
                    drills.append(one := drill(made, f"run-{number}", faults, expected))
                    kinds_of = ", ".join(f"{fault.kind} {fault.part}".strip() for fault in faults)
                    print(f"{one.name}: {one.seconds:4.0f} s, {one.verdict} ({kinds_of})", flush=True)
                    if one.problems:
                        print(account(one, options.seed, made), flush=True)
                print(table(drills))
    failed = sum(bool(one.problems) for one in drills)
    same = sum(one.same and not one.problems for one in drills)
    print(
        f"{len(drills)} runs: {same} with the same bytes, {len(drills) - same - failed} with other sites in a round, {failed} failed"
    )
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
