"""What several commands print: a daemon's status, a run's report, a line at Ctrl-C."""

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

if TYPE_CHECKING:
    from rich.console import Console


def show_status(status: dict[str, Any], show: Callable[[dict[str, Any], "Console"], None], as_json: bool) -> None:
    """Print a daemon's status; exit code 1 if it reports a problem, for a monitoring that reads nothing else."""
    if as_json:
        typer.echo(json.dumps(status, indent=2, ensure_ascii=False))
    else:
        from rich.console import Console

        show(status, Console())
    if not status["well"]:
        raise typer.Exit(1)


def show_report(report: dict[str, Any], out: Path) -> None:
    """Print the worth-it report of a run and the paths of its files."""
    from rich.console import Console

    from trunkline.server.reporting.report import print_report

    print_report(report, Console())
    if report.get("newcomers"):
        from trunkline.simulations.newcomers import print_newcomers

        print_newcomers(report["newcomers"], Console())
    typer.echo(f"\nReport: {out / 'report.html'}  (figures: {out / 'report.json'})")


@contextmanager
def message_at_interrupt(text: str) -> Iterator[None]:
    """Write `text` to stderr at Ctrl-C; Typer then ends with exit code 130 and no message of its own."""
    try:
        yield
    except KeyboardInterrupt:
        sys.stderr.write(f"trunkline: {text}\n")
        raise
