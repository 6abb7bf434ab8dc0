"""Every command. Each body calls a package; torch, Ray and Flower are imported only by the commands that need them."""

import os
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer

from trunkline.errors import TrunklineError

if TYPE_CHECKING:
    from trunkline.config import RunConfig

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None,
                  help="Factories train one shared backbone together and keep everything else at home.")  # fmt: skip
server = typer.Typer(no_args_is_help=True, help="The centre: SuperLink and its supervisor; submit a run; watch it.")
client = typer.Typer(no_args_is_help=True, help="The plant's daemon.")
app.add_typer(server, name="server")
app.add_typer(client, name="client")

Out = TypeVar("Out")
RunFile = Annotated[Path, typer.Argument(metavar="RUN.toml", help="What to train; docs/run-toml.md.")]
SiteDir = Annotated[Path, typer.Argument(metavar="SITE_DIR", help="The folder with site.toml and the data.")]
OutDir = Annotated[Path, typer.Option("--out", help="Folder of the run: checkpoints, state, report.")]
Settings = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY.PATH=VALUE", help="Override a key of the run file; repeatable."),
]
StrategyName = Annotated[
    str | None,
    typer.Option("--strategy", metavar="NAME", help="Override [strategy] name; its other options fall away."),
]
Seed = Annotated[int | None, typer.Option("--seed", help="Override seed.")]
Resume = Annotated[bool, typer.Option("--resume", help="Go on from the newest checkpoint in --out.")]
ServerState = Annotated[Path, typer.Option("--state", help="The server's folder: database, secret, logs.")]
ClientState = Annotated[Path | None, typer.Option("--state", help="If it is not SITE_DIR/.trunkline")]
RunKey = Annotated[str, typer.Argument(metavar="RUN", help="As `trunkline client contracts` lists it.")]
By = Annotated[str, typer.Option("--by", help="Who decides; default: this account's name.")]
LITTLE = (
    600  # optimiser steps of all sites in all rounds: about where, on two cores, workers begin to pay for their start
)


@app.command()
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


@app.command()
def check(site_dir: SiteDir) -> None:
    """What would be trained, on which rows; every problem by file, line and remedy. Exit code 1 if there is one."""
    from rich.console import Console

    from trunkline.client.check import check_site, render

    report = check_site(site_dir)
    render(report, Console())
    if not report.ok:
        raise typer.Exit(1)


@app.command()
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
    from trunkline.simulations.folders import prepare, site_folders

    run = _read_run(run_toml, seed, strategy, settings)
    folders = site_folders(sites)
    count = _workers(workers, len(folders), address, run)
    prepare(out, resume=resume, overwrite=overwrite)
    from trunkline.simulations.simulate import (
        simulate,  # seconds of imports, so only once the command is known to be right
    )

    report = _watched(
        out,
        lambda: simulate(run, folders, out, workers=count, resume=resume, address=address),
        stopped="stopped. Everything up to the last finished round is on disk; go on with --resume.",
    )
    if run.search.trials:
        from rich.console import Console

        from trunkline.simulations.search import print_search, read_search

        print_search(read_search(out), Console())
    _show(report, out)


@app.command()
def report(out_dir: Annotated[Path, typer.Argument(metavar="OUT_DIR")]) -> None:
    """The worth-it report again: table, report.json, report.html."""
    from trunkline.server.report import read_report, write_report
    from trunkline.simulations.simulate import predictions_below

    found = read_report(out_dir)
    write_report(found, out_dir, predictions_below(out_dir))
    _show(found, out_dir)


@app.command()
def adapt(
    site_dir: SiteDir,
    trunk: Annotated[Path, typer.Option("--trunk", help="A released trunk: trunk.safetensors of a run.")],
    out: Annotated[Path | None, typer.Option("--out", help="Default: SITE_DIR/.trunkline/adapted")] = None,
    groups: Annotated[
        int | None, typer.Option(min=1, help="Use the labels of so many groups only, to see what fewer would do.")
    ] = None,
) -> None:
    """A new plant: the model to use here, from a released trunk and a few labelled groups, with its evidence."""
    from rich.console import Console

    from trunkline.client import evidence
    from trunkline.client.adapt import adapt as adapt_site

    folder = out or site_dir / ".trunkline" / "adapted"
    adapted = adapt_site(site_dir, trunk, labelled=groups)
    found = evidence.collect(adapted)
    evidence.write(adapted, found, folder)
    evidence.render(found, Console())
    typer.echo(f"Model: {folder / evidence.MODEL}  (evidence: {folder / evidence.PAGE})")


@server.command("start")
def server_start(
    state: ServerState = Path("trunkline-server"),
    host: Annotated[str, typer.Option(help="Address to listen on; beyond loopback only with TLS files.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535)] = 9140,
    tls_ca: Annotated[Path | None, typer.Option(help="CA certificate, PEM.")] = None,
    tls_cert: Annotated[
        Path | None, typer.Option(help="Server certificate, PEM; its names must cover 127.0.0.1 too.")
    ] = None,
    tls_key: Annotated[Path | None, typer.Option(help="Server key, PEM.")] = None,
) -> None:
    """Run the centre until SIGTERM or Ctrl-C."""
    import trunkline.server.daemon as daemon

    daemon.start(state, host=host, port=port, tls_ca=tls_ca, tls_cert=tls_cert, tls_key=tls_key)


@server.command("run")
def server_run(
    run_toml: RunFile,
    out: Annotated[Path | None, typer.Option("--out", help="Folder of the run; default: STATE/runs/NAME.")] = None,
    state: ServerState = Path("trunkline-server"),
    resume: Resume = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an earlier run in --out.")] = False,
    seed: Seed = None,
    strategy: StrategyName = None,
    settings: Settings = None,
) -> None:
    """Submit a run to the server of STATE and follow it to its report. Ctrl-C stops watching, not the run."""
    from trunkline.simulations.folders import prepare

    run = _read_run(run_toml, seed, strategy, settings)
    folder = (out or state / "runs" / run.name).resolve()
    prepare(folder, resume=resume, overwrite=overwrite)
    import trunkline.server.daemon as daemon
    from trunkline.server.report import read_report

    run_id = daemon.run(state, run.model_dump_json(), folder, resume=resume)
    typer.echo(f"Submitted as run {run_id}; its folder is {folder}.")
    _watched(
        folder,
        lambda: daemon.wait(state, run_id, folder),
        stopped="no longer watching. The run goes on; `trunkline server status` shows it.",
    )
    _show(read_report(folder), folder)


@server.command("status")
def server_status(state: ServerState = Path("trunkline-server")) -> None:
    """What each part of the centre does, who is connected, which runs there were."""
    from rich.console import Console

    import trunkline.server.daemon as daemon

    daemon.print_status(daemon.status(state), Console())


@client.command("start")
def client_start(
    site_dir: SiteDir,
    server: Annotated[str, typer.Option("--server", help="HOST:PORT of the centre.")] = "127.0.0.1:9140",
    state: Annotated[
        Path | None, typer.Option(help="The plant's state: vault, logs. Default: SITE_DIR/.trunkline")
    ] = None,
    tls_ca: Annotated[Path | None, typer.Option(help="CA certificate of the centre, PEM.")] = None,
) -> None:
    """Run the plant's daemon until SIGTERM or Ctrl-C."""
    import trunkline.client.daemon as daemon

    daemon.start(site_dir, server=server, state=state, tls_ca=tls_ca)


@client.command("status")
def client_status(
    site_dir: SiteDir, state: Annotated[Path | None, typer.Option(help="If it is not SITE_DIR/.trunkline")] = None
) -> None:
    """What the plant's daemon does now."""
    from rich.console import Console

    import trunkline.client.daemon as daemon

    daemon.print_status(daemon.status(site_dir, state), Console())


@client.command("contracts")
def client_contracts(site_dir: SiteDir, state: ClientState = None) -> None:
    """The runs that have asked this plant, and what was decided about each."""
    from rich.console import Console

    from trunkline.client import contracts

    contracts.print_contracts(list(contracts.every(state or site_dir / ".trunkline")), Console())


@client.command("contract")
def client_contract(site_dir: SiteDir, run: RunKey, state: ClientState = None) -> None:
    """What a run would take from this plant, in words."""
    from rich.console import Console

    from trunkline.client import contracts

    contracts.print_contract(contracts.known(state or site_dir / ".trunkline", run), Console())


@client.command("accept")
def client_accept(site_dir: SiteDir, run: RunKey, by: By = "", state: ClientState = None) -> None:
    """Say yes to a run; it holds while nothing about the run changes, and never against the policy."""
    from trunkline.client import consent

    found = consent.decide(state or site_dir / ".trunkline", run, "accepted", by)
    typer.echo(f"{found.site} takes part in {found.run}: accepted by {found.by}.")


@client.command("refuse")
def client_refuse(site_dir: SiteDir, run: RunKey, by: By = "", state: ClientState = None) -> None:
    """Say no to a run, also to one that is under way: from its next question on nothing of it is answered."""
    from trunkline.client import consent

    found = consent.decide(state or site_dir / ".trunkline", run, "refused", by)
    typer.echo(f"{found.site} takes no part in {found.run}: refused by {found.by}.")


@client.command("manifest")
def client_manifest(
    site_dir: SiteDir,
    run: Annotated[str, typer.Option("--run", help="Of this run only.")] = "",
    verify: Annotated[bool, typer.Option("--verify", help="Only say whether it is intact.")] = False,
    json: Annotated[bool, typer.Option("--json", help="A line of JSON for each reply.")] = False,
    state: ClientState = None,
) -> None:
    """Everything that left this plant. Exit code 1 if the record of it was tampered with."""
    from rich.console import Console

    from trunkline.client import manifest

    links, signer = manifest.read_manifest(state or site_dir / ".trunkline", run)
    if json:
        for link in links:
            typer.echo(manifest.dumped(link))
    elif verify:
        typer.echo(manifest.intact(links, signer))
    else:
        manifest.print_manifest(links, signer, Console())


def _read_run(path: Path, seed: int | None, strategy: str | None, settings: list[str] | None) -> Any:
    """The run file with the command line laid over it; strategy and options are checked here, before anything starts."""
    from trunkline.config import parse_value, read_run
    from trunkline.errors import ConfigError
    from trunkline.strategies import build_strategy

    overrides: dict[str, Any] = {}
    if strategy is not None:
        overrides["strategy"] = {"name": strategy}
    if seed is not None:
        overrides["seed"] = seed
    for setting in settings or []:
        key, sign, value = setting.partition("=")
        if not sign:
            raise ConfigError(f"--set {setting}: expected KEY.PATH=VALUE, for example --set training.steps=40.")
        overrides[key.strip()] = parse_value(value.strip())
    run = read_run(path, overrides)
    build_strategy(run.strategy.name, run.strategy.options, run.training)
    return run


def _workers(text: str, sites: int, address: str | None, run: "RunConfig") -> int | None:
    """Worker processes; None: as many as the cluster at `address` has CPUs, which only it can tell."""
    from trunkline.errors import ConfigError

    if text == "auto":
        if address:
            return None
        return 0 if _is_little(run, sites) else max(1, min(len(os.sched_getaffinity(0)), sites))
    if not text.isdigit():
        raise ConfigError(f"--workers {text}: expected `auto`, or a number; 0 means without worker processes.")
    if int(text) == 0 and address:
        raise ConfigError(
            "--workers 0 runs everything in this process, so there is no cluster to join. Drop one of it and --address."
        )
    return min(int(text), sites)


def _is_little(run: "RunConfig", sites: int) -> bool:
    """Whether all the training of a run takes less than starting workers would: a few small sites need no Ray."""
    if run.training.epochs is not None or run.search.trials or run.newcomers.sites:
        return False
    each = run.training.steps + run.training.finish_steps / run.total_rounds
    return run.total_rounds * each * sites * (2 if run.report.baseline else 1) <= LITTLE


def _watched(out: Path, work: Callable[[], Out], stopped: str) -> Out:
    """Do `work` while a second thread shows the events that the round loop writes; `stopped` is said at Ctrl-C."""
    from rich.console import Console

    from trunkline.progress import EVENTS, Progress, tail

    events = out / EVENTS
    seen = events.stat().st_size if events.exists() else 0
    ended = threading.Event()
    with Progress(Console()) as progress:

        def show() -> None:
            for event in tail(events, ended.is_set, start=seen):
                progress(event)

        watcher = threading.Thread(target=show, daemon=True)
        watcher.start()
        try:
            return work()
        except KeyboardInterrupt:
            sys.stderr.write(f"trunkline: {stopped}\n")
            raise  # typer ends with exit code 130 and says nothing of its own
        finally:
            ended.set()
            watcher.join(timeout=5.0)


def _show(report: dict[str, Any], out: Path) -> None:
    from rich.console import Console

    from trunkline.server.report import print_report

    print_report(report, Console())
    if report.get("newcomers"):
        from trunkline.simulations.newcomers import print_newcomers

        print_newcomers(report["newcomers"], Console())
    typer.echo(f"\nReport: {out / 'report.html'}  (figures: {out / 'report.json'})")


def main() -> None:
    """Entry point: a TrunklineError is told in its own words, exit code 1."""
    try:
        app()
    except TrunklineError as error:
        sys.stderr.write(f"trunkline: {error}\n")
        sys.exit(1)


if __name__ == "__main__":
    main()
