"""`trunkline simulate`: site folders in, a run's folder out, through the apps that are deployed."""

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flwr.app import Context, RecordDict

from trunkline.config.run import RunConfig
from trunkline.config.site import warn_of_older_names
from trunkline.config.world import WorldConfig
from trunkline.errors import ConfigError
from trunkline.privacy.guards import guards_of
from trunkline.release import RELEASE
from trunkline.runtime.events import Event, OnEvent
from trunkline.runtime.progress import EVENTS
from trunkline.server.reporting.report import read_report, write_report
from trunkline.strategies import build_strategy

if TYPE_CHECKING:
    from trunkline.server.reporting.plots import Predictions
    from trunkline.simulations.in_process import InProcessGrid
    from trunkline.simulations.ray.grid import RayGrid
    from trunkline.simulations.world.network import WorldGrid


def simulate(
    run: RunConfig, folders: list[Path], out: Path, *, workers: int | None, resume: bool = False,
    address: str | None = None, page: bool = True,
) -> dict[str, Any]:  # fmt: skip
    """Run the whole federation, or one pooled training, and write the report and its plots.

    Args:
        folders: of the sites, newcomers included.
        out: folder of the run; it exists.
        workers: processes on Ray; 0: everything in this process, without Ray; None: one for every CPU of the cluster.
        resume: go on with the run in `out`.
        address: of a Ray cluster to join.
        page: draw report.html too.

    Returns:
        The report, as `out`/report.json has it.

    Raises:
        ConfigError: settings that exclude each other.
        DataError: a site cannot be read.
        DeploymentError: Ray or a worker cannot start.
    """
    newcomers: list[Path] = []
    if run.newcomers.sites:
        from trunkline.simulations.newcomers import set_apart

        folders, newcomers = set_apart(folders, run.newcomers)
    states = [out / "state" / folder.name for folder in folders]
    if build_strategy(run.strategy.name, run.strategy.options, run.training).pooled:
        _check_pooled(run, resume=resume)
        report = _train_pooled(run, folders, states, out)
    else:
        report = _federate(run, folders, states, out, workers=workers, resume=resume, address=address)
    if newcomers:
        from trunkline.simulations.newcomers import onboard

        report["newcomers"] = onboard(newcomers, out / RELEASE, run.newcomers, out)
    write_report(report, out, predictions_below(out) if page else None, page=page)
    return report


def _check_pooled(run: RunConfig, *, resume: bool) -> None:
    """Raise ConfigError for a setting that makes no sense without a federation."""
    if resume:
        raise ConfigError("strategy 'central' keeps no checkpoints; start it afresh with --overwrite.")
    if run.newcomers.sites:
        raise ConfigError("strategy 'central' releases no trunk for [newcomers]. Choose another strategy.")
    if guards_of(run.guards):
        raise ConfigError("strategy 'central' sends no update that [guards] could guard: take it out of the run file.")
    if run.search.trials:
        raise ConfigError(
            "[search] tries runs of a federation, and strategy 'central' is none. Choose another strategy."
        )
    if run.world != WorldConfig():
        raise ConfigError("strategy 'central' has no sites that could be away: take [world] out of the run file.")


def _train_pooled(run: RunConfig, folders: list[Path], states: list[Path], out: Path) -> dict[str, Any]:
    from trunkline.simulations.central import run_central

    with _event_log(out) as on_event:
        report = run_central(folders, states, run, on_event)
    write_report(report, out, page=False)
    return read_report(out)


def _federate(
    run: RunConfig, folders: list[Path], states: list[Path], out: Path, *, workers: int | None, resume: bool, address: str | None
) -> dict[str, Any]:  # fmt: skip
    """Search for settings if the run file says so, then run the ServerApp over a grid of all sites."""
    from trunkline.server.app import app

    # all sites of a simulation are available from the start: where the run file wants more, all of them are enough
    cohort = run.cohort.model_copy(update={"min_sites": min(run.cohort.min_sites, len(folders))})
    run = run.model_copy(update={"cohort": cohort})
    world: WorldGrid | None = None
    grid = _grid(folders, states, workers, address)
    try:
        grid.open_sites()
        if run.search.trials:
            from trunkline.simulations.search import search

            with _event_log(out) as on_event:
                run = search(run, grid, states, out, on_event, resume=resume)
        settings: dict[str, bool | float | int | str] = {
            "run-toml": run.model_dump_json(),
            "out": str(out),
            "resume": int(resume),
            "page": 0,  # drawn at the end, with the predictions
        }
        context = Context(run_id=1, node_id=1, node_config={}, state=RecordDict(), run_config=settings)
        if run.world != WorldConfig():  # after a search, which has all sites at its disposal
            from trunkline.simulations.world import network

            world = network.WorldGrid(grid, run, out, resume=resume)
        app(grid=world or grid, context=context)
    finally:
        grid.close()
    report = read_report(out)
    return report if world is None else world.complete_report(report)


@contextlib.contextmanager
def _event_log(out: Path) -> Iterator[OnEvent]:
    """Append events to the run's event log, a line each."""
    with (out / EVENTS).open("a", encoding="utf-8", buffering=1) as file:

        def write(event: Event) -> None:
            file.write(json.dumps(event.to_json()) + "\n")

        yield write


def _grid(
    folders: list[Path], states: list[Path], workers: int | None, address: str | None
) -> "InProcessGrid | RayGrid":
    if workers == 0:
        from trunkline.simulations.in_process import InProcessGrid

        return InProcessGrid(folders, states)
    warn_of_older_names(folders)
    from trunkline.simulations.ray.grid import RayGrid  # here, because importing and starting Ray takes seconds

    return RayGrid(folders, states, workers=workers, address=address)


def predictions_below(out: Path) -> "dict[tuple[str, str], Predictions]":
    """The row-level predictions of simulated sites, for the plots; empty in a deployed run, where they stay at the plants."""
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
            predictions[site, task] = Predictions.from_stored(tensors, about, unit=row["unit"], kind=row["kind"])
    return predictions
