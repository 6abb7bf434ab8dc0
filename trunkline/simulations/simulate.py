"""`trunkline simulate`: site folders in, a run's folder out, through the apps that are deployed."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flwr.app import Context, RecordDict

from trunkline.config.run import RunConfig
from trunkline.config.site import warn_of_older_names
from trunkline.config.world import WorldConfig
from trunkline.errors import ConfigError
from trunkline.privacy.guards import guards_of
from trunkline.release import RELEASE
from trunkline.runtime.events import Event
from trunkline.runtime.progress import EVENTS
from trunkline.server.reporting.report import read_report, write_report
from trunkline.strategies import build_strategy

if TYPE_CHECKING:
    from trunkline.server.reporting.plots import Predictions
    from trunkline.simulations.in_process import InProcessGrid
    from trunkline.simulations.ray.grid import RayGrid
    from trunkline.simulations.world.network import WorldGrid


def simulate(
    run: RunConfig, folders: list[Path], out: Path, *, workers: int | None, resume: bool = False, address: str | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Run the whole federation; returns the report, which also lies in `out` with the plots of the predictions.

    Args:
        workers: processes on Ray; 0: everything in this process, without Ray; None: one for every CPU of the cluster.
        address: of a Ray cluster to join.
    """
    newcomers: list[Path] = []
    world: WorldGrid | None = None
    if run.newcomers.sites:
        from trunkline.simulations.newcomers import set_apart

        folders, newcomers = set_apart(folders, run.newcomers)
    states = [out / "state" / folder.name for folder in folders]
    if build_strategy(run.strategy.name, run.strategy.options, run.training).pooled:
        from trunkline.simulations.central import run_central

        if resume:
            raise ConfigError("strategy 'central' keeps no checkpoints; start it afresh with --overwrite.")
        if newcomers:
            raise ConfigError("strategy 'central' releases no trunk for [newcomers]. Choose another strategy.")
        if guards_of(run.guards):
            raise ConfigError(
                "strategy 'central' sends no update that [guards] could guard: take it out of the run file."
            )
        if run.search.trials:
            raise ConfigError(
                "[search] tries runs of a federation, and strategy 'central' is none. Choose another strategy."
            )
        if run.world != WorldConfig():
            raise ConfigError("strategy 'central' has no sites that could be away: take [world] out of the run file.")

        with (out / EVENTS).open("a", encoding="utf-8", buffering=1) as events:
            report = run_central(folders, states, run, lambda event: _write(events.write, event))
        write_report(report, out)
    else:
        from trunkline.server.app import app

        # all sites of a simulation are there from the start: with fewer than the run file wants, all of them will do
        cohort = run.cohort.model_copy(update={"min_sites": min(run.cohort.min_sites, len(folders))})
        run = run.model_copy(update={"cohort": cohort})
        grid = _grid(folders, states, workers, address)
        try:
            grid.open_sites()
            if run.search.trials:
                from trunkline.simulations.search import search

                with (out / EVENTS).open("a", encoding="utf-8", buffering=1) as events:
                    run = search(run, grid, states, out, lambda event: _write(events.write, event), resume=resume)
            settings: dict[str, bool | float | int | str] = {
                "run-toml": run.model_dump_json(),
                "out": str(out),
                "resume": int(resume),
            }
            context = Context(run_id=1, node_id=1, node_config={}, state=RecordDict(), run_config=settings)
            if run.world != WorldConfig():  # after a search, which has all sites at its disposal
                from trunkline.simulations.world import network as worlds

                world = worlds.WorldGrid(grid, run, out, resume=resume)
            app(grid=world or grid, context=context)
        finally:
            grid.close()
    report = read_report(out)
    if world is not None:
        report = world.complete_report(report)
    if newcomers:
        from trunkline.simulations.newcomers import onboard

        report["newcomers"] = onboard(newcomers, out / RELEASE, run.newcomers, out)
    write_report(report, out, predictions_below(out))
    return report


def _grid(
    folders: list[Path], states: list[Path], workers: int | None, address: str | None
) -> "InProcessGrid | RayGrid":
    if workers == 0:
        from trunkline.simulations.in_process import InProcessGrid

        return InProcessGrid(folders, states)
    warn_of_older_names(folders)
    from trunkline.simulations.ray.grid import RayGrid  # here, because importing and starting Ray takes seconds

    return RayGrid(folders, states, workers=workers, address=address)


def _write(write: Callable[[str], Any], event: Event) -> None:
    write(json.dumps(event.to_json()) + "\n")


def predictions_below(out: Path) -> "dict[tuple[str, str], Predictions]":
    """The row-level predictions of simulated sites, for the plots; a deployed server has none and finds none."""
    import safetensors

    from trunkline.server.reporting.plots import Predictions  # here, because it brings matplotlib

    predictions: dict[tuple[str, str], Predictions] = {}
    for row in read_report(out)["sites"]:
        site, task = row["site"], row["task"]
        kept = (out / "state" / site / "evaluation").glob(f"*/{task}.safetensors")
        if files := sorted(kept, key=lambda path: path.stat().st_mtime):
            with safetensors.safe_open(files[-1], framework="numpy") as file:
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (no mapping)
                about = json.loads((file.metadata() or {}).get("about", "{}"))
            predictions[site, task] = Predictions.kept(tensors, about, unit=row["unit"], kind=row["kind"])
    return predictions
