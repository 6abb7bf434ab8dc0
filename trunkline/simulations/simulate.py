"""`trunkline simulate`: site folders in, a run's folder out, through the apps that are deployed."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from flwr.app import Context, RecordDict
from numpy.typing import NDArray

from trunkline.config import RunConfig
from trunkline.errors import ConfigError
from trunkline.progress import EVENTS
from trunkline.server.report import Predictions, read_report, write_report
from trunkline.strategies import build_strategy


def simulate(
    run: RunConfig, folders: list[Path], out: Path, *, workers: int, resume: bool = False, address: str | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Run the whole federation on Ray; returns the report, which also lies in `out` with the plots of the predictions."""
    states = [out / "state" / folder.name for folder in folders]
    if build_strategy(run.strategy.name, run.strategy.options, run.training).pooled:
        from trunkline.simulations.central import run_central

        if resume:
            raise ConfigError("strategy 'central' keeps no checkpoints; start it afresh with --overwrite.")

        with (out / EVENTS).open("a", encoding="utf-8", buffering=1) as events:
            report = run_central(folders, states, run, lambda event: _write(events.write, event))
        write_report(report, out)
    else:
        from trunkline.server.app import app
        from trunkline.simulations.engine import RayGrid

        # all sites of a simulation are there from the start: with fewer than the run file wants, all of them will do
        cohort = run.cohort.model_copy(update={"min_sites": min(run.cohort.min_sites, len(folders))})
        run = run.model_copy(update={"cohort": cohort})
        grid = RayGrid(folders, states, workers=workers, address=address)
        try:
            grid.open_sites()
            settings: dict[str, bool | float | int | str] = {
                "run-toml": run.model_dump_json(),
                "out": str(out),
                "resume": int(resume),
            }
            context = Context(run_id=1, node_id=1, node_config={}, state=RecordDict(), run_config=settings)
            app(grid=grid, context=context)
        finally:
            grid.close()
    report = read_report(out)
    write_report(report, out, predictions_below(out))
    return report


def _write(write: Callable[[str], Any], event: dict[str, Any]) -> None:
    write(json.dumps(event) + "\n")


def predictions_below(out: Path) -> dict[tuple[str, str], Predictions]:
    """The row-level predictions of simulated sites, for the plots; a deployed centre has none and finds none."""
    import safetensors.numpy

    report = read_report(out)
    kinds = {(row["site"], row["task"]): row for row in report["sites"]}
    found: dict[tuple[str, str], Predictions] = {}
    for site, task in kinds:
        files = sorted(
            (out / "state" / site / "evaluation").glob(f"*/{task}.safetensors"), key=lambda path: path.stat().st_mtime
        )
        if files:
            tensors = safetensors.numpy.load(files[-1].read_bytes())
            row = kinds[site, task]
            found[site, task] = Predictions(
                truth=tensors["truth"],
                federated=_plain(tensors["federated"]),
                local=_plain(tensors["local"]) if "local" in tensors else None,
                unit=row["unit"],
                kind=row["kind"],
            )
    return found


def _plain(prediction: NDArray[Any]) -> NDArray[Any]:
    """Class probabilities (n, classes) -> the likeliest class (n,); anything else as it is."""
    return prediction.argmax(axis=1) if prediction.ndim == 2 else prediction
