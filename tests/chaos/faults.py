"""The faults of a drill: what can go wrong, drawn from a seed, and how each is put in and taken out again."""

import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tests.chaos.machine import GO_ON, KILL, STOP, damage, send
from tests.chaos.proxy import Proxy
from tests.chaos.world import CENTRE, World

ROUNDS = 10  # of a run
STAGES = ("before", "training", "uploading", "checkpoint")  # of a round, in their order
PARTS = ("serverapp", "superexec", "superlink", "gateway", "registrar")  # of the centre
SKEW_S = (-200, 3)  # how far a plant's clock may be wrong unnoticed: Flower takes 305 s behind and 5 s ahead


@dataclass(frozen=True)
class Fault:
    """One thing that goes wrong.

    Args:
        kind: as in KINDS.
        victim: a plant, or the centre.
        part: of the victim, or the file that is damaged, or "".
        round: of the run; 0 is while sites gather, one more than the last is the evaluation.
        stage: of the round, as far as it can be seen from outside.
        after_s: how long after the moment of that stage.
        seconds: how long it lasts, or how long the victim is down.
        amount: what the kind makes of it: delay in seconds, seconds a clock moves, a place in a file.
    """

    kind: str
    victim: str
    part: str
    round: int
    stage: str
    after_s: float
    seconds: float
    amount: float = 0.0

    @property
    def moment(self) -> tuple[int, int]:
        return self.round, STAGES.index(self.stage)

    def __str__(self) -> str:
        what = f"{self.kind} {self.part}".strip()
        amount = f" by {self.amount:g}" if self.amount else ""
        return f"{what} at {self.victim}{amount}, round {self.round} {self.stage} +{self.after_s:.2f} s, for {self.seconds:.1f} s"


@dataclass(frozen=True)
class Kind:
    """A kind of fault on a certain part.

    Args:
        centre: it happens to the centre; else to a plant.
        amounts: from which `amount` is drawn.
        lasts: seconds, from which its duration is drawn.
    """

    kind: str
    part: str
    centre: bool
    lasts: tuple[float, float]
    amounts: tuple[float, float] = (0.0, 0.0)
    stages: tuple[str, ...] = STAGES

    @property
    def name(self) -> str:
        return ":".join(filter(None, (self.kind, CENTRE if self.centre else "plant", self.part)))


_DOWN, _SHORT, _BUSY = (1.0, 4.0), (0.0, 0.0), ("training", "uploading")
KINDS = (
    *(Kind("kill", part, True, _SHORT) for part in PARTS),
    *(Kind("kill", part, False, _SHORT) for part in ("supernode", "executor")),
    Kind("power", "", True, _DOWN),
    Kind("power", "", False, _DOWN),
    *(Kind("stop", part, True, (1.0, 8.0)) for part in ("serverapp", "superlink", "gateway", "")),
    *(Kind("stop", part, False, (1.0, 8.0)) for part in ("supernode", "executor", "")),
    Kind("reset", "", False, _SHORT),
    Kind("half-open", "", False, (2.0, 8.0)),
    Kind("delay", "", False, (2.0, 6.0), (0.2, 1.0)),
    Kind("trickle", "", False, (2.0, 6.0)),
    Kind("lost-answers", "", False, (2.0, 6.0)),
    Kind("full-disk", "", True, (2.0, 6.0)),
    Kind("full-disk", "", False, (2.0, 6.0)),
    Kind("clock", "", True, (2.0, 6.0), (-3.0, 3.0)),
    Kind("clock", "", False, (2.0, 6.0), SKEW_S),
    Kind("clock-hours", "", True, (2.0, 6.0), (-5.0, 5.0)),
    Kind("clock-hours", "", False, (2.0, 6.0), (-5.0, 5.0)),
    *(Kind("damage", file, False, _DOWN, (0.0, 1.0), _BUSY) for file in ("journal.json", "vault")),
    *(Kind("damage", file, False, _DOWN, (0.0, 1.0)) for file in ("status.json", "node.json")),
    *(Kind("damage", file, True, _DOWN, (0.0, 1.0)) for file in ("status.json", "checkpoint", "events.jsonl")),
)


def draw(
    seed: int, runs: int, plants: list[str], rounds: int = ROUNDS, kinds: tuple[Kind, ...] = KINDS, most: int = 6
) -> list[list[Fault]]:
    """The faults of each of `runs` runs, by their moment: 3 to `most` a run, and no kind again before all have been drawn."""
    rng = random.Random(seed)
    deck: list[Kind] = []
    drawn = []
    for _ in range(runs):
        faults = []
        for _ in range(rng.randint(3, most)):
            if not deck:
                deck = list(kinds)
                rng.shuffle(deck)
            faults.append(_fault(rng, deck.pop(), plants, rounds))
        drawn.append(sorted(faults, key=lambda one: (one.moment, one.after_s)))
    return drawn


def _fault(rng: random.Random, kind: Kind, plants: list[str], rounds: int) -> Fault:
    round = rng.randint(0, rounds + 1)
    stage = rng.choice(kind.stages)
    if round in (0, rounds + 1) and kind.stages == STAGES:
        stage = "before"  # nothing else of these can be seen from outside
    if kind.part == "vault":
        round, stage = min(max(round, 1), rounds), rng.choice(_BUSY)
    round = min(max(round, 1), rounds) if stage != "before" else round
    amount = rng.uniform(*kind.amounts)
    if kind.kind == "clock":
        amount = float(int(amount)) or 1.0
    if kind.kind == "clock-hours":
        amount = 3600.0 * (int(amount) or 1)
    victim = CENTRE if kind.centre else rng.choice(plants)
    return Fault(
        kind.kind, victim, kind.part, round, stage, rng.uniform(0.0, 0.5), rng.uniform(*kind.lasts), amount
    )  # fmt: skip


def begin(world: World, fault: Fault, out: Path) -> tuple[str, Callable[[], None]]:
    """Put a fault in; what was done, in words, and what takes it out again after its time."""
    return _BEGIN[fault.kind](world, fault, out)


def _nothing() -> None:
    pass


def _kill(world: World, fault: Fault, out: Path) -> tuple[str, Callable[[], None]]:
    sent = send(world.pids(fault.victim, fault.part), KILL)
    return f"killed {sent}" if sent else "nobody to kill", _nothing


def _power(world: World, fault: Fault, out: Path) -> tuple[str, Callable[[], None]]:
    world.kill(fault.victim, fault.seconds)
    return "killed whole", _nothing


def _stop(world: World, fault: Fault, out: Path) -> tuple[str, Callable[[], None]]:
    sent = send(world.pids(fault.victim, fault.part), STOP)
    return f"stopped {sent}" if sent else "nobody to stop", lambda: (send(sent, GO_ON), None)[1]


def _reset(world: World, fault: Fault, out: Path) -> tuple[str, Callable[[], None]]:
    return f"{_proxy(world).reset(fault.victim)} connections cut", _nothing


def _half_open(world: World, fault: Fault, out: Path) -> tuple[str, Callable[[], None]]:
    proxy = _proxy(world)
    line = proxy.lines[fault.victim]
    line.held = True

    def undo() -> None:
        proxy.reset(fault.victim)  # what stood open towards nobody is closed at last
        line.held = False

    return f"{len(line.open)} connections held", undo


def _line(change: Callable[[World, Fault], None]) -> Callable[[World, Fault, Path], tuple[str, Callable[[], None]]]:
    def put(world: World, fault: Fault, out: Path) -> tuple[str, Callable[[], None]]:
        change(world, fault)
        return "line made bad", _proxy(world).lines[fault.victim].restore

    return put


def _delay(world: World, fault: Fault) -> None:
    _proxy(world).lines[fault.victim].delay_s = fault.amount


def _trickle(world: World, fault: Fault) -> None:
    _proxy(world).lines[fault.victim].trickles = True


def _lose(world: World, fault: Fault) -> None:
    _proxy(world).lines[fault.victim].losing = True


def _full(world: World, fault: Fault, out: Path) -> tuple[str, Callable[[], None]]:
    disk = world.disks[fault.victim]
    disk.fill(world.pids(fault.victim))
    return "disk full" if disk.own else "no file may grow", disk.free


def _clock(world: World, fault: Fault, out: Path) -> tuple[str, Callable[[], None]]:
    if not world.can_move_clocks:
        return "skipped: a clock is moved by a few lines of C, and there is no `cc`", _nothing
    clock = world.clocks[fault.victim]
    clock.set(int(fault.amount))
    return "clock moved", lambda: clock.set(0)


def _damage(world: World, fault: Fault, out: Path) -> tuple[str, Callable[[], None]]:
    """The power goes, and a file is not what was written when it is back."""
    world.kill(fault.victim, fault.seconds)
    state = world.state_of(fault.victim)
    if fault.part == "vault":
        path = max(
            state.glob("vault/*/round-*.safetensors"), key=lambda one: one.stat().st_mtime_ns, default=state / "vault"
        )
    elif fault.part == "checkpoint":
        path = max((out / "checkpoint").glob("round-*.safetensors"), default=out / "checkpoint")
    elif fault.part == "events.jsonl":
        path = out / fault.part
    else:
        path = state / fault.part
    if path.is_dir() or not path.exists():
        return f"killed whole; no {fault.part} to damage", _nothing
    if fault.part == "events.jsonl":  # torn at its end, as an append is
        last = len(path.read_bytes().splitlines(keepends=True)[-1:] or [b""])
        return "killed whole; " + damage(path, "cut", 1.0 - 0.5 * last / max(path.stat().st_size, 1)), _nothing
    how = "flip" if fault.after_s < 0.25 else "cut"
    return "killed whole; " + damage(path, how, fault.amount), _nothing


def _proxy(world: World) -> Proxy:
    assert world.proxy is not None
    return world.proxy


_BEGIN: dict[str, Callable[[World, Fault, Path], tuple[str, Callable[[], None]]]] = {
    "kill": _kill,
    "power": _power,
    "stop": _stop,
    "reset": _reset,
    "half-open": _half_open,
    "delay": _line(_delay),
    "trickle": _line(_trickle),
    "lost-answers": _line(_lose),
    "full-disk": _full,
    "clock": _clock,
    "clock-hours": _clock,
    "damage": _damage,
}


@dataclass
class Active:
    """A fault that is in, until `until` on the monotonic clock."""

    fault: Fault
    undo: Callable[[], None]
    until: float


class Injector:
    """Puts the faults of one run in at their moments and takes them out again; `tick` it often.

    Args:
        told: takes a sentence of what was done, with the seconds since the start.
    """

    def __init__(self, world: World, faults: list[Fault], out: Path) -> None:
        self.world, self.out = world, out
        self.waiting = list(faults)
        self.ripe: list[tuple[float, Fault]] = []
        self.active: list[Active] = []
        self.done: list[str] = []
        self._began, self._since = time.monotonic(), time.time()

    def tick(self, now: tuple[int, int]) -> None:
        """Args: now: the round and the stage (its place in STAGES) that the run has reached."""
        at = time.monotonic()
        for fault in [one for one in self.waiting if self._is_time(one, now)]:
            self.waiting.remove(fault)
            self.ripe.append((at + fault.after_s, fault))
        for due, fault in [one for one in self.ripe if at >= one[0]]:
            self.ripe.remove((due, fault))
            what, undo = begin(self.world, fault, self.out)
            self.done.append(f"{at - self._began:6.1f} s  {fault}: {what}")
            self.active.append(Active(fault, undo, at + fault.seconds))
        for one in [one for one in self.active if at >= one.until]:
            self.active.remove(one)
            one.undo()

    def _is_time(self, fault: Fault, now: tuple[int, int]) -> bool:
        if now >= (fault.round, STAGES.index("uploading")) and now > fault.moment:
            return True
        if fault.stage == "uploading" and fault.victim in self.world.states and now[0] == fault.round:
            # the very moment: its vault holds the answer, which is about to leave
            name = f"vault/*/round-{fault.round:06d}.safetensors"
            state = self.world.states[fault.victim]
            return now >= (fault.round, 1) and any(one.stat().st_mtime > self._since for one in state.glob(name))
        return now >= fault.moment

    @property
    def busy(self) -> bool:
        """Whether anything is in, or is about to be."""
        return bool(self.active or self.ripe)

    def end(self) -> None:
        for one in self.active:
            one.undo()
        self.active.clear()
