"""Commands of somebody who studies federations on one machine: sites, check, simulate, report, adapt."""

from pathlib import Path
from typing import Annotated

import typer

from trunkline.cli.options import OutDir, Resume, RunFile, Seed, Settings, SiteDir, StrategyName, read_run
from trunkline.cli.output import message_at_interrupt, show_report

research = typer.Typer()
trunk = typer.Typer(no_args_is_help=True, help="Released trunks: what one says of itself, and whether to believe it.")


@research.command()
def sites(
    name: Annotated[str, typer.Argument(help="`synthetic`, or a known data set.")],
    out: OutDir,
    data: Annotated[Path | None, typer.Option(help="Where the data set lies.")] = None,
    plants: Annotated[int | None, typer.Option(min=1, help="Deal its groups to this many plants.")] = None,
    groups: Annotated[int | None, typer.Option(min=1, help="Leave each plant this many labelled groups.")] = None,
    seed: Annotated[int, typer.Option(min=0)] = 0,
) -> None:
    """Write site folders: built-in factories, or a known data set dealt to plants."""
    from trunkline.simulations.factories import write_sites

    folders = write_sites(name, out, data=data, plants=plants, groups=groups, seed=seed)
    typer.echo(f"{len(folders)} sites in {out}: {', '.join(folder.name for folder in folders)}")
    typer.echo(f"Next: trunkline check {folders[0]}")


@research.command()
def check(site_dir: SiteDir) -> None:
    """What would be trained, on which rows; every problem by file, line and remedy. Exit code 1 if there is one."""
    from rich.console import Console

    from trunkline.client.check import check_site, render

    report = check_site(site_dir)
    render(report, Console())
    if not report.ok:
        raise typer.Exit(1)


@research.command()
def simulate(
    run_toml: RunFile,
    sites: Annotated[Path, typer.Option("--sites", help="Folder of site folders.")],
    out: OutDir,
    workers: Annotated[
        str,
        typer.Option(
            help="Worker processes; `auto`: one a core, never more than sites, none where there is little to do; 0: all in this one."
        ),
    ] = "auto",
    address: Annotated[
        str | None,
        typer.Option(help="Join a Ray cluster: HOST:PORT or ray://HOST:PORT; sites and --out on shared storage."),
    ] = None,
    resume: Resume = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an earlier run in --out.")] = False,
    seed: Seed = None,
    strategy: StrategyName = None,
    settings: Settings = None,
) -> None:
    """The whole run on Ray: real site folders, the apps that are deployed, the worth-it report."""
    from trunkline.runtime.watch import run_with_progress
    from trunkline.simulations.folders import prepare, site_folders
    from trunkline.simulations.workers import count_workers

    run = read_run(run_toml, seed, strategy, settings)
    folders = site_folders(sites)
    count = count_workers(workers, len(folders), address, run)
    prepare(out, resume=resume, overwrite=overwrite)
    from trunkline.simulations.simulate import simulate

    with message_at_interrupt("stopped. Everything up to the last finished round is on disk; go on with --resume."):
        report = run_with_progress(
            out, lambda: simulate(run, folders, out, workers=count, resume=resume, address=address)
        )
    if run.search.trials:
        from rich.console import Console

        from trunkline.simulations.search import print_search, read_search

        print_search(read_search(out), Console())
    show_report(report, out)


@research.command()
def report(out_dir: Annotated[Path, typer.Argument(metavar="OUT_DIR")]) -> None:
    """The worth-it report again: table, report.json, report.html."""
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
        int | None, typer.Option(min=1, help="Use the labels of so many groups only, to see what fewer would do.")
    ] = None,
    state: Annotated[Path | None, typer.Option(help="The plant's state, if it is not SITE_DIR/.trunkline")] = None,
    unsigned: Annotated[
        bool, typer.Option("--unsigned", help="At a plant that has joined: take a trunk its centre did not sign.")
    ] = False,
) -> None:
    """A new plant: the model to use here, from a released trunk and a few labelled groups, with its evidence.

    A plant that has joined a federation takes only what its centre signed; one that has not is told that nothing was checked.
    """
    from rich.console import Console

    from trunkline.client.adaptation import evidence
    from trunkline.client.adaptation.adapt import adapt as adapt_site

    folder = out or site_dir / ".trunkline" / "adapted"
    adapted = adapt_site(site_dir, trunk, state=state, labelled=groups, unsigned=unsigned)
    if adapted.verdict is not None:
        typer.echo(adapted.verdict.line)
    proof = evidence.collect(adapted)
    evidence.write(adapted, proof, folder)
    evidence.render(proof, Console())
    typer.echo(f"Model: {folder / evidence.MODEL}  (evidence: {folder / evidence.PAGE})")
    if evidence.sealed(folder):
        typer.echo(
            f"Both are encrypted; `trunkline client report {site_dir} --from {folder} --out FILE.html` opens a copy."
        )


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
    """The card of a released trunk, and whether its centre signed it.

    Exit code 0 only where it was checked and is right; without --authority or --site nothing can vouch for it: 1.
    """
    from rich.console import Console

    from trunkline.client.adaptation.verify import authority_of, render
    from trunkline.release import open_release

    release = open_release(file, authority_of(authority, site))
    render(release.card, release.verdict, Console())
    if not release.verdict.right:
        raise typer.Exit(1)
