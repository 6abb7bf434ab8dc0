"""How soon a federation with slow plants learns: rounds that wait, rounds with a deadline, and buffered ones.

    python benchmarks/buffered.py [--seeds 0 1 2] [--modes MODE ...] [--set KEY=VALUE ...] [--keep DIR] [--out FILE.json]

Twenty of the built-in plants, a quarter of them ten times slower, on a virtual clock; the training is real. Learning rate,
steps, schedule (constant, so that no length of a run favours anybody) and strategy are the same for all three:

    waiting   `mode = "rounds"`, and a round waits for everybody
    deadline  `mode = "rounds"`, and a round waits half as long again as the others take: the slow quarter never makes it
    buffered  `mode = "buffered"`, with K and the damping as they are by default: nothing was tuned for it

What is compared is the mean over all twenty plants of the validation loss that each would have if the run ended there:
the newest trunk, with the stem and heads of the last training that the plant has finished by then. The target is
where the waiting run ends. In the deadline run a plant that is at work gets no order, because a message to it would
expire before it is free.
"""

import argparse
import copy
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from flwr.app import Context, Message, RecordDict

from trunkline.client.model_selection.evaluation import curve
from trunkline.client.site import open_site
from trunkline.client.state.vault import Vault
from trunkline.config.parsing import parse_value
from trunkline.config.run import RunConfig, parse_run, with_settings
from trunkline.protocol.messages import TrainRequest, parse_request
from trunkline.server.app import app
from trunkline.server.reporting.report import read_report, write_report
from trunkline.server.rounds.checkpoint import Checkpoint
from trunkline.simulations.factories import write_sites
from trunkline.simulations.in_process import InProcessGrid
from trunkline.simulations.world.clock import SECOND
from trunkline.simulations.world.network import WorldGrid, _Flight

PLANTS, GROUPS, SLOW, TIMES = 20, 16, 0.25, 10.0
PATIENCE_S = 1e6  # a deadline that nobody meets
ALIKE: dict[str, Any] = {
    "trunk": {"width": 16},
    "training": {"steps": 4, "batch_size": 32, "schedule": "constant"},
    "strategy": {"name": "fedper"},
    "report": {"baseline": False},
    "cohort": {"deadline_s": PATIENCE_S, "gather_s": PATIENCE_S, "resend_s": PATIENCE_S, "quorum": 0.5},
    # the steps of a plant of ordinary speed take 128 s: 4 batches of 32 rows
    "world": {"row_seconds": 1.0, "speeds": [[SLOW, 1.0 / TIMES]], "speed_spread": 0.1},
}
MODES: dict[str, dict[str, Any]] = {
    "waiting": {"rounds": 10},
    "deadline": {"rounds": 30, "cohort.deadline_s": 1.5 * 128.0},
    "buffered": {"rounds": 45, "cohort.mode": "buffered"},
}


class Watched(WorldGrid):
    """A world that looks, after every round, at what each plant would have if the run ended there."""

    def __init__(self, grid: InProcessGrid, run: RunConfig, out: Path, every: int) -> None:
        super().__init__(grid, run, out)
        self.out, self.every = out, every
        self.finished: dict[int, list[tuple[int, int]]] = {node: [] for node in self.draws}  # (us, round)
        self.private: dict[tuple[int, int], dict[str, Any]] = {}  # node and round -> stem and heads
        self.seen: list[tuple[float, dict[str, float]]] = []  # virtual seconds, and the loss of each plant

    def _push(self, message: Message) -> str:
        node, kind = message.metadata.dst_node_id, message.metadata.message_type
        expires = self.clock.now + round(self.config.cohort.deadline_s * SECOND)
        if kind == "train" and self.config.cohort.mode == "rounds" and self._free.get(node, 0) > expires:
            return f"unheard-{next(self._numbers)}"
        request = parse_request(str(message.content.config_records["header"]["json"]))
        pushed = super()._push(message)
        if kind == "train" and not pushed.startswith("unheard"):
            site = open_site(self.inner.contexts[node].node_config)
            entry = Vault(site.state, request.run).before(request.round + 1)
            assert entry is not None
            self.private[node, request.round] = entry.private
        return pushed

    def _resolve(self, flight: _Flight) -> int:
        new = flight.reply is None
        done = super()._resolve(flight)
        if new and flight.kind == "train":
            self.finished[flight.node].append((done, flight.round))
        return done

    def stamp(self, event: Any) -> dict[str, Any]:
        if event.get("event") == "round" and event["round"] > 1 and (event["round"] - 1) % self.every == 0:
            self.look(event["round"] - 1)
        return super().stamp(event)

    def look(self, round: int) -> None:
        """The loss of every plant as `round` has left it."""
        found = Checkpoint(self.out).load()
        assert found is not None and found[0].round == round
        at = self.ended[round]
        run = self.config
        request = TrainRequest(
            run="look", seed=run.seed, round=1, rounds=1, trunk=run.trunk, plan=run.training, lend=run.lend
        )
        losses = {}
        for node, draw in self.draws.items():
            site = open_site(self.inner.contexts[node].node_config)
            model = site.model(request)
            model.adopt(found[0].trunk, request.lend)
            if done := [told for us, told in self.finished[node] if us <= at * SECOND]:
                model.restore(self.private[node, max(done)], request.lend)
            losses[draw.site] = curve(model, site.resident("curve"), site.data.tasks).loss
        self.seen.append((at, losses))


def live(folders: list[Path], run: RunConfig, out: Path) -> Watched:
    out.mkdir(parents=True)
    grid = InProcessGrid(folders, [out / "state" / folder.name for folder in folders])
    try:
        grid.open_sites()
        world = Watched(grid, run, out, every=max(1, run.rounds // 15))
        config: dict[str, bool | float | int | str] = {"run-toml": run.model_dump_json(), "out": str(out), "resume": 0}
        app(grid=world, context=Context(run_id=1, node_id=1, node_config={}, state=RecordDict(), run_config=config))
        world.look(run.rounds)
    finally:
        grid.close()
    write_report(world.complete_report(read_report(out)), out)
    return world


def mean(losses: dict[str, float], of: set[str]) -> float:
    return statistics.fmean(loss for site, loss in losses.items() if site in of)


def reached(world: Watched, target: float, of: set[str]) -> float | None:
    """Virtual seconds until the mean loss was at most `target`."""
    return next((at for at, losses in world.seen if mean(losses, of) <= target), None)


def at_end_of(world: Watched, end: float, of: set[str]) -> float:
    """The mean loss at the last look up to `end`."""
    return next(mean(losses, of) for at, losses in reversed(world.seen) if at <= end or at == world.seen[0][0])


def compare(seed: int, root: Path, modes: list[str], settings: dict[str, Any]) -> dict[str, Any]:
    folders = sorted(write_sites("synthetic", root / "sites", plants=PLANTS, groups=GROUPS, seed=seed))
    worlds = {}
    for mode in modes:
        began = time.monotonic()
        run = parse_run(copy.deepcopy({**ALIKE, "name": mode, "seed": seed}), "benchmark", dict(MODES[mode]))
        run = with_settings(
            run, {key: value for key, value in settings.items() if mode == "buffered" or key[:6] != "cohort"}, "--set"
        )
        worlds[mode] = live(folders, run, root / mode)
        worlds[mode].took = time.monotonic() - began  # type: ignore[attr-defined]
    first = worlds[modes[0]]
    slow = {draw.site for draw in first.draws.values() if draw.speed < 0.3}
    everybody = {draw.site for draw in first.draws.values()}
    target, end = mean(first.seen[-1][1], everybody), min(world.seen[-1][0] for world in worlds.values())
    found: dict[str, Any] = {"seed": seed, "slow": sorted(slow), "target": target, "modes": {}}
    print(f"seed {seed}: target {target:.4f}, what {modes[0]} ends at; slow: {', '.join(sorted(slow))}")
    print(
        f"  {'':10}{'rounds':>7}{'s to target':>13}{'of waiting':>12}{f'loss at {end:.0f} s':>18}{'of the slow':>13}{'at its end':>12}{'wall s':>8}"
    )
    base = reached(first, target, everybody)
    for mode, world in worlds.items():
        when = reached(world, target, everybody)
        share = None if when is None or base is None else when / base
        told = {
            "to_target": when, "share": share, "loss": at_end_of(world, end, everybody), "loss_slow": at_end_of(world, end, slow),
            "last": mean(world.seen[-1][1], everybody), "seen": world.seen,
        }  # fmt: skip
        found["modes"][mode] = told
        print(
            f"  {mode:10}{world.config.rounds:>7}{'never' if when is None else f'{when:.0f}':>13}"
            f"{'-' if share is None else f'{share:.2f}':>12}{told['loss']:>18.4f}{told['loss_slow']:>13.4f}"
            f"{told['last']:>12.4f}{world.took:>8.0f}"  # type: ignore[attr-defined]
        )
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--modes", nargs="+", choices=list(MODES), default=list(MODES))
    parser.add_argument("--set", nargs="*", default=[], help="over the run file; [cohort] of the buffered run only")
    parser.add_argument("--keep", type=Path, help="folder for the runs and their reports")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    settings = {key: parse_value(text) for key, _, text in (one.partition("=") for one in options.set)}
    with tempfile.TemporaryDirectory() as scratch:
        root = options.keep or Path(scratch)
        found = [compare(seed, root / f"seed-{seed}", options.modes, settings) for seed in options.seeds]
    shares = [one["modes"]["buffered"]["share"] for one in found if "buffered" in one["modes"]]
    if shares:
        told = ", ".join("never" if share is None else f"{share:.2f}" for share in shares)
        print(f"buffered reaches the loss in {told} of the time of {options.modes[0]} (at most 0.50 is promised)")
    if options.out:
        options.out.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
