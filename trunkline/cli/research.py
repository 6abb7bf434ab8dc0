"""Commands to study federations on one machine: sites, check, simulate, report, adapt, schema; and released trunks."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

import trunkline.api as api
from trunkline.cli.options import OutDir, Resume, RunFile, Seed, Settings, SiteDir, StrategyName, read_run
from trunkline.cli.output import message_at_interrupt, show_report

research = typer.Typer()
trunk = typer.Typer(no_args_is_help=True, help="Released trunks: show the card and check the signature.")


class File(StrEnum):
    """The files that `trunkline schema` describes."""

    site = "site"
    run = "run"


@research.command()
def sites(
    name: Annotated[str, typer.Argument(help="`synthetic`, or a known data set.")],
    out: OutDir,
    data: Annotated[Path | None, typer.Option(help="Folder of the data set.")] = None,
    plants: Annotated[int | None, typer.Option(min=1, help="Divide its groups among this many plants.")] = None,
    groups: Annotated[int | None, typer.Option(min=1, help="Leave each plant this many labelled groups.")] = None,
    seed: Annotated[int, typer.Option(min=0)] = 0,
) -> None:
    """Write site folders: built-in factories or a known data set."""
    from trunkline.simulations.factories import write_sites

    folders = write_sites(name, out, data=data, plants=plants, groups=groups, seed=seed)
    typer.echo(f"{len(folders)} sites in {out}: {', '.join(folder.name for folder in folders)}")
    typer.echo(f"Next: trunkline check {folders[0]}")


@research.command()
def check(site_dir: SiteDir) -> None:
    """Show what a site would train on, and every problem.

    Each problem names file, line and remedy. The exit code is 1 if there is a problem.
    """
    from rich.console import Console

    from trunkline.client.check import render

    result = api.check_site(site_dir)
    render(result.details, Console())
    if not result.ok:
        raise typer.Exit(1)


@research.command()
def simulate(
    run_toml: RunFile,
    sites: Annotated[Path, typer.Option("--sites", help="Folder of site folders.")],
    out: OutDir,
    workers: Annotated[
        str,
        typer.Option(
            help="Worker processes. `auto`: one per core, at most one per site, none for a small run. 0: all in this process."
        ),
    ] = "auto",
    address: Annotated[
        str | None,
        typer.Option(help="Join a Ray cluster: HOST:PORT or ray://HOST:PORT. Sites and --out are on shared storage."),
    ] = None,
    resume: Resume = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an earlier run in --out.")] = False,
    seed: Seed = None,
    strategy: StrategyName = None,
    settings: Settings = None,
) -> None:
    """Run a whole federation on this machine and report on it.

    It reads real site folders and runs the deployed apps, in this process or on Ray.
    """
    run = read_run(run_toml, seed, strategy, settings)
    with message_at_interrupt("stopped. Everything up to the last finished round is on disk; continue with --resume."):
        result = api.simulate(run, sites, out, workers=workers, address=address, resume=resume, overwrite=overwrite)
    if run.search.trials:
        from rich.console import Console

        from trunkline.simulations.search import print_search, read_search

        print_search(read_search(out), Console())
    show_report(result.report, out)


@research.command()
def report(out_dir: Annotated[Path, typer.Argument(metavar="OUT_DIR")]) -> None:
    """Write and show the report of a run again."""
    from trunkline.server.reporting.report import read_report, write_report
    from trunkline.simulations.simulate import predictions_below

    figures = read_report(out_dir)
    write_report(figures, out_dir, predictions_below(out_dir))
    show_report(figures, out_dir)


@research.command()
def adapt(
    site_dir: SiteDir,
    trunk: Annotated[Path, typer.Option("--trunk", help="A released trunk: trunk.safetensors of a run.")],
    out: Annotated[Path | None, typer.Option("--out", help="Default: SITE_DIR/.trunkline/adapted")] = None,
    groups: Annotated[
        int | None, typer.Option(min=1, help="Use the labels of this many groups only, to see the effect of fewer.")
    ] = None,
    state: Annotated[Path | None, typer.Option(help="The plant's state. Default: SITE_DIR/.trunkline")] = None,
    unsigned: Annotated[
        bool, typer.Option("--unsigned", help="At a plant that has joined: accept a trunk its server did not sign.")
    ] = False,
) -> None:
    """Make the model for a new plant from a released trunk.

    It needs a few labelled groups and writes the evidence for its choice. A plant that has joined a federation accepts
    only a trunk that its server signed. At other plants nothing is checked, and the output reports that.
    """
    from rich.console import Console

    from trunkline.client.adaptation import evidence

    adapted = api.adapt(site_dir, trunk, out, groups=groups, state=state, unsigned=unsigned)
    if adapted.signature:
        typer.echo(adapted.signature)
    evidence.render(adapted.report, Console())
    typer.echo(f"Model: {adapted.model}  (evidence: {adapted.page})")
    if adapted.sealed:
        typer.echo(
            f"Both are encrypted; `trunkline client report {site_dir} --from {adapted.path} --out FILE.html` opens a copy."
        )


@research.command()
def schema(file: Annotated[File, typer.Argument(help="Which file the schema describes.")]) -> None:
    """Print the JSON Schema of site.toml or run.toml.

    An editor completes and checks the file with it; docs/site-toml.md and docs/run-toml.md show how.
    """
    import json

    from trunkline.api.schemas import build_schema

    typer.echo(json.dumps(build_schema(file.value), indent=2))


@trunk.command("verify")
def trunk_verify(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="A released trunk: trunk.safetensors of a run.")],
    authority: Annotated[
        Path | None, typer.Option("--authority", help="authority.crt of the federation that should have signed it.")
    ] = None,
    site: Annotated[
        Path | None,
        typer.Option("--site", metavar="SITE_DIR", help="A plant that has joined: its federation's authority."),
    ] = None,
) -> None:
    """Show the card of a released trunk and check its signature.

    The exit code is 0 only if the signature was checked and is right. The check needs --authority or --site.
    """
    from rich.console import Console

    from trunkline.client.adaptation.verify import authority_of, render
    from trunkline.release import open_release

    release = open_release(file, authority_of(authority, site))
    render(release.card, release.verdict, Console())
    if not release.verdict.right:
        raise typer.Exit(1)
