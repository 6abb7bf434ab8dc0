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
    from rich.console import Console

    from trunkline.config.run import RunConfig

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None,
                  help="Factories train one shared backbone together and keep everything else at home.")  # fmt: skip
server = typer.Typer(no_args_is_help=True, help="The centre: SuperLink and its supervisor; submit a run; watch it.")
client = typer.Typer(no_args_is_help=True, help="The plant's daemon.")
vault = typer.Typer(
    no_args_is_help=True, help="What the plant keeps of its runs: how it is encrypted, and with which key."
)
app.add_typer(server, name="server")
app.add_typer(client, name="client")
client.add_typer(vault, name="vault")
trunk = typer.Typer(no_args_is_help=True, help="Released trunks: what one says of itself, and whether to believe it.")
app.add_typer(trunk, name="trunk")

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
ClientState = Annotated[
    Path | None, typer.Option("--state", help="The plant's state: keys, vault, logs. Default: SITE_DIR/.trunkline")
]
KeySource = Annotated[
    str | None,
    typer.Option(
        "--key", help="Key that seals what is secret: file:PATH, env:NAME or keyring:NAME. Default: a file of its own."
    ),
]
RunKey = Annotated[str, typer.Argument(metavar="RUN", help="As `trunkline client contracts` lists it.")]
AsJson = Annotated[bool, typer.Option("--json", help="As JSON, for monitoring.")]
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
    from trunkline.simulations.simulate import simulate

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
    from trunkline.server.reporting.report import read_report, write_report
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
    found = evidence.collect(adapted)
    evidence.write(adapted, found, folder)
    evidence.render(found, Console())
    typer.echo(f"Model: {folder / evidence.MODEL}  (evidence: {folder / evidence.PAGE})")
    if evidence.sealed(folder):
        typer.echo(
            f"Both are encrypted; `trunkline client report {site_dir} --from {folder} --out FILE.html` opens a copy."
        )


@server.command("init")
def server_init(
    host: Annotated[
        list[str] | None, typer.Option("--host", help="Name or address by which plants reach the server; repeatable.")
    ] = None,
    name: Annotated[str, typer.Option(help="Of the federation, as plants will read it.")] = "Trunkline",
    state: ServerState = Path("trunkline-server"),
    key: KeySource = None,
    site_days: Annotated[float, typer.Option(help="Days a site's certificate is valid.")] = 365.0,
    server_days: Annotated[float, typer.Option(help="Days the server's certificate is valid.")] = 180.0,
) -> None:
    """Make a federation: its authority, the server's certificate, the register of sites. Nothing is ever made over one."""
    from trunkline.security.encryption import find_seal
    from trunkline.security.keys import fingerprint, spoken
    from trunkline.server.membership import authority

    made = authority.init(state.resolve(), name, tuple(host or ()), key, site_days, server_days)
    seal = find_seal(state.resolve())
    typer.echo(f"Federation {name!r} in {state}.")
    typer.echo(f"Fingerprint of its authority: {spoken(fingerprint(made))}")
    if seal is not None:
        typer.echo(f"Its keys are sealed with {seal.source}. Keep a copy of that elsewhere: without it nothing opens.")
    typer.echo(f"Next: trunkline server start --state {state}, and trunkline server invite SITE --state {state}")


@server.command("invite")
def server_invite(
    site: Annotated[str, typer.Argument(metavar="SITE", help="The `name` in the plant's site.toml.")],
    hours: Annotated[float, typer.Option(min=0.0, help="Hours until the code expires.")] = 72.0,
    state: ServerState = Path("trunkline-server"),
) -> None:
    """A one-time code with which a plant joins. A code that is out for the same site is withdrawn."""
    from trunkline.security.keys import fingerprint, spoken
    from trunkline.server.membership.authority import Authority

    opened = Authority.open(state.resolve())
    code, made = opened.invite(site, hours)
    where = opened.federation.hosts[0] if opened.federation.hosts else "HOST"
    typer.echo(f"Code for {site}, good once, until {made.expires}:\n\n    {code}\n")
    typer.echo(f"At the plant: trunkline client join SITE_DIR {where}:9140 --code CODE")
    typer.echo(f"Both should see the authority's fingerprint: {spoken(fingerprint(opened.certificate))}")


@server.command("admit")
def server_admit(
    request: Annotated[Path, typer.Argument(metavar="REQUEST", help="What `trunkline client join --request` wrote.")],
    out: Annotated[Path, typer.Option("--out", help="Answer to carry back to the plant.")],
    state: ServerState = Path("trunkline-server"),
) -> None:
    """Enrol a plant that cannot reach the server to join: request and answer are carried by hand."""
    from trunkline.runtime.storage import write_atomic
    from trunkline.server.membership.authority import Authority

    admitted = Authority.open(state.resolve()).admit_file(request)
    write_atomic(out, admitted.model_dump_json(indent=1).encode())
    typer.echo(
        f"{admitted.site} is enrolled. At the plant: trunkline client join SITE_DIR HOST:PORT --code CODE --admission {out.name}"
    )


@server.command("sites")
def server_sites(state: ServerState = Path("trunkline-server")) -> None:
    """Who is enrolled, invited, revoked; until when; and who is online."""
    from rich.console import Console

    from trunkline.server.membership import authority
    from trunkline.server.operations import daemon

    console = Console()
    console.print(daemon.sites_table(state.resolve()))
    for warning in authority.warnings(state.resolve()):
        console.print(f"Note: {warning}", markup=False)


@server.command("revoke")
def server_revoke(
    site: Annotated[str, typer.Argument(metavar="SITE")],
    reason: Annotated[str, typer.Option(help="Said to the plant, and in the audit log.")] = "",
    state: ServerState = Path("trunkline-server"),
) -> None:
    """Turn a site away from its next request on, and nobody else. `server invite` lets it in again, with a new key."""
    from trunkline.server.membership import authority

    gone = authority.revoke(state.resolve(), site, reason)
    typer.echo(f"{site} is revoked since {gone.revoked}: its next request is refused. Everybody else goes on.")


@server.command("rotate")
def server_rotate(state: ServerState = Path("trunkline-server")) -> None:
    """A new key and certificate for the server, taken up at the next connection. A running server does it by itself in time."""
    from trunkline.security.keys import fingerprint, spoken
    from trunkline.server.membership.authority import Authority

    made = Authority.open(state.resolve()).rotate_server("asked for by the operator")
    typer.echo(f"New server certificate, valid until {made.not_valid_after_utc:%Y-%m-%d}: {spoken(fingerprint(made))}")


@server.command("audit")
def server_audit(
    state: ServerState = Path("trunkline-server"),
    begin_anew: Annotated[
        bool, typer.Option("--begin-anew", help="Set a log that was tampered with aside and begin another.")
    ] = False,
) -> None:
    """Who enrolled, ran, revoked, and whether anybody altered the log. Exit code 1 if so."""
    from rich.console import Console

    from trunkline.server.membership import audit_log as audit

    if begin_anew:
        typer.echo(f"The former log is now {audit.begin_anew(state.resolve())}.")
    audit.show(state.resolve(), Console())


@server.command("backup")
def server_backup(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="A new file outside of --state.")],
    state: ServerState = Path("trunkline-server"),
) -> None:
    """Everything the centre has to keep, in one file; the server may run meanwhile. Not in it: the key that seals its keys."""
    from trunkline.security.encryption import find_seal
    from trunkline.server.operations import backup

    made = backup.back_up(state, file)
    size = sum(one.size for one in made.members.values())
    typer.echo(f"{file}: {len(made.members)} files, {size / 1e6:.1f} MB, {len(made.runs)} runs; for this account only.")
    if (seal := find_seal(state.resolve())) is not None:
        typer.echo(f"Its keys are sealed with {seal.source}, which is not in it. Keep a copy of that in another place.")


@server.command("restore")
def server_restore(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="What `trunkline server backup` made.")],
    state: Annotated[Path, typer.Option("--state", help="A folder that is empty or not there yet.")],
) -> None:
    """Put a backup back. It is checked as a whole first; nothing is ever restored over a state that is there."""
    from trunkline.server.operations import backup

    found = backup.restore(file, state, tell=lambda text: typer.echo(f"Note: {text}"))
    typer.echo(
        f"{state}: restored, {len(found.members)} files as of {found.made}. Next: trunkline server start --state {state}"
    )


@server.command("nginx")
def server_nginx(
    listen: Annotated[str, typer.Option(help="HOST:PORT for nginx to listen on.")] = "0.0.0.0:9140",
    state: ServerState = Path("trunkline-server"),
) -> None:
    """The gateway's configuration for nginx, for who would rather run that. Print it again after `invite` and `revoke`."""
    from trunkline.server.gateway.nginx import nginx_config
    from trunkline.server.operations import daemon

    typer.echo(nginx_config(state.resolve(), listen, daemon.upstream_of(state.resolve())))


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

    found = open_release(file, authority_of(authority, site))
    render(found.card, found.verdict, Console())
    if not found.verdict.right:
        raise typer.Exit(1)


@server.command("start")
def server_start(
    state: ServerState = Path("trunkline-server"),
    host: Annotated[
        str, typer.Option(help="Address to listen on; beyond loopback only with a federation (`server init`).")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535)] = 9140,
) -> None:
    """Run the centre until SIGTERM or Ctrl-C."""
    import trunkline.server.operations.daemon as daemon

    daemon.start(state, host=host, port=port)


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
    import trunkline.server.operations.daemon as daemon
    from trunkline.server.reporting.report import read_report

    entry = daemon.run(state, run.model_dump_json(), folder, resume=resume)
    typer.echo(f"Run {entry.key}; its folder is {folder}.")
    if entry.state == "wanted":
        typer.echo(f"It is not submitted yet and begins by itself. {entry.note}".strip())
    _watched(
        folder,
        lambda: daemon.wait(state, entry.key, folder),
        stopped="no longer watching. The run goes on; `trunkline server status` shows it.",
    )
    _show(read_report(folder), folder)


@server.command("stop")
def server_stop(
    name: Annotated[str, typer.Argument(help="The run's name (the newest one) or key, as `server status` shows it.")],
    state: ServerState = Path("trunkline-server"),
) -> None:
    """End a run for good; without this it goes on until it is done, whatever happens to the server. `run --resume` goes on."""
    import trunkline.server.operations.daemon as daemon

    entry = daemon.stop(state, name)
    typer.echo(f"Run {entry.key} is being stopped; its checkpoints stay in {entry.out}.")


@server.command("status")
def server_status(state: ServerState = Path("trunkline-server"), as_json: AsJson = False) -> None:
    """What each part of the centre does now, since when, who is connected, and what is wrong (exit code 1)."""
    import trunkline.server.operations.status as status

    _show_status(status.status(state), status.print_status, as_json)


@client.command("join")
def client_join(
    site_dir: SiteDir,
    server: Annotated[str, typer.Argument(metavar="HOST:PORT", help="Of the centre.")] = "",
    code: Annotated[str, typer.Option("--code", help="What `trunkline server invite` printed.", prompt=True)] = "",
    state: ClientState = None,
    key: KeySource = None,
    request: Annotated[
        Path | None, typer.Option("--request", help="Without a network: write the request to this file instead.")
    ] = None,
    admission: Annotated[
        Path | None, typer.Option("--admission", help="And take up the answer that came back.")
    ] = None,
) -> None:
    """Become a member: keys are made here and stay here, a certificate is fetched with the code."""
    import trunkline.client.agent.join as joining
    from trunkline.client.agent.daemon import state_of
    from trunkline.errors import ConfigError
    from trunkline.security.encryption import find_seal
    from trunkline.security.enrolment import Code
    from trunkline.security.keys import fingerprint, spoken

    folder = (state or state_of(site_dir)).resolve()
    parsed = Code.parse(code)
    if request is not None:
        joining.write_request(site_dir, folder, parsed, request, key)
        typer.echo(
            f"Carry {request} to the operator, who answers with `trunkline server admit {request.name} --out FILE`."
        )
        return
    if admission is not None:
        joined = joining.accept_admission(site_dir, folder, parsed, admission, server)
    elif server:
        joined = joining.join(site_dir, folder, server, parsed, key)
    else:
        raise ConfigError("HOST:PORT of the centre is missing: trunkline client join SITE_DIR HOST:PORT --code CODE.")
    typer.echo(
        f"{joined.membership.site} has joined {joined.membership.federation!r}, until {joined.certificate.not_valid_after_utc:%Y-%m-%d}."
    )
    typer.echo(f"Fingerprint of its authority: {spoken(fingerprint(joined.authority))}")
    if (seal := find_seal(folder)) is not None:
        typer.echo(
            f"Private state is sealed with {seal.source}. Keep a copy of that elsewhere: without it nothing opens."
        )
    typer.echo(f"Next: trunkline client start {site_dir}")


@client.command("renew")
def client_renew(site_dir: SiteDir, state: ClientState = None) -> None:
    """Another certificate for the same key, now. The daemon does it by itself in time."""
    import trunkline.client.agent.join as joining
    from trunkline.client.agent.daemon import state_of

    made = joining.renew((state or state_of(site_dir)).resolve())
    typer.echo(
        f"New certificate, valid until {made.not_valid_after_utc:%Y-%m-%d %H:%M UTC}; a running daemon takes it up by itself."
    )


@client.command("start")
def client_start(
    site_dir: SiteDir,
    server: Annotated[
        str | None,
        typer.Option("--server", help="HOST:PORT of the centre; default: the one joined, or this machine's."),
    ] = None,
    state: ClientState = None,
) -> None:
    """Run the plant's daemon until SIGTERM or Ctrl-C."""
    import trunkline.client.agent.daemon as daemon

    daemon.start(site_dir, server=server, state=state)


@client.command("pause")
def client_pause(
    site_dir: SiteDir,
    minutes: Annotated[
        float | None, typer.Option("--for", metavar="MINUTES", min=0.0, help="End it by itself after so long.")
    ] = None,
    by: By = "",
    state: ClientState = None,
) -> None:
    """Have training stand still within seconds, where it is, because the machine is wanted for something else."""
    from trunkline.client import availability as pausing

    until = pausing.pause(state or site_dir / ".trunkline", minutes, by)
    end = f"until {until:%Y-%m-%d %H:%M:%S} UTC" if until else f"until `trunkline client resume {site_dir}`"
    typer.echo(f"Paused {end}. Training that is under way stops between two steps, within 5 s, and loses nothing.")


@client.command("resume")
def client_resume(site_dir: SiteDir, state: ClientState = None) -> None:
    """End a pause: training goes on where it stood."""
    from trunkline.client import availability as pausing

    folder = state or site_dir / ".trunkline"
    typer.echo("The pause is over." if pausing.resume(folder) else "There was no pause.")
    if why := pausing.in_words(site_dir, folder):
        typer.echo(f"It still stands: {why}.")


@client.command("status")
def client_status(site_dir: SiteDir, state: ClientState = None, as_json: AsJson = False) -> None:
    """What the plant's daemon does now, since when, and what is wrong (exit code 1)."""
    import trunkline.client.agent.status as status

    _show_status(status.status(site_dir, state), status.print_status, as_json)


@client.command("report")
def client_report(
    site_dir: SiteDir,
    adapted: Annotated[
        Path | None, typer.Option("--from", help="The --out of `trunkline adapt`. Default: SITE_DIR/.trunkline/adapted")
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", help="Put the page here, for a browser; it is not encrypted.")
    ] = None,
) -> None:
    """The evidence of the last adaptation, decrypted where it is sealed."""
    from rich.console import Console

    from trunkline.client.adaptation import evidence
    from trunkline.runtime.storage import write_atomic

    found = evidence.read(adapted or site_dir / ".trunkline" / "adapted")
    evidence.render(found, Console())
    if out is not None:
        write_atomic(out, evidence.page(found).encode())
        typer.echo(f"Page: {out}")


@vault.command("status")
def vault_status(site_dir: SiteDir, state: ClientState = None) -> None:
    """Where the key comes from, what is sealed with which, what is plain, and what is kept of each run."""
    from rich.console import Console

    from trunkline.client.state import at_rest

    found = at_rest.status(state or site_dir / ".trunkline")
    at_rest.print_status(found, Console())
    if found.problem:
        raise typer.Exit(1)


@vault.command("seal")
def vault_seal(
    site_dir: SiteDir,
    state: ClientState = None,
    key: KeySource = None,
) -> None:
    """Encrypt what the plant keeps, from now on and what is there already. Back the key up: nothing opens without it."""
    from trunkline.client.state import at_rest
    from trunkline.config.site import read_site

    site = read_site(site_dir)
    at_rest.seal_state(state or site_dir / ".trunkline", key, tuple(site.tasks), typer.echo)


@vault.command("rekey")
def vault_rekey(
    site_dir: SiteDir,
    state: ClientState = None,
    to: Annotated[
        str | None, typer.Option("--to", help="Where the key comes from henceforth: file:, env:, keyring:")
    ] = None,
    forget: Annotated[
        bool, typer.Option("--forget", help="Take older keys out of a source that others may use too.")
    ] = False,
) -> None:
    """A new key, and everything encrypted again with it. If it is cut short, give the command again."""
    from trunkline.client.state import rekeying

    rekeying.rekey(state or site_dir / ".trunkline", to, forget=forget, tell=typer.echo)


@vault.command("open")
def vault_open(
    site_dir: SiteDir,
    out: Annotated[Path, typer.Option("--out", help="A file outside the state folder; it is not encrypted.")],
    state: ClientState = None,
    run: Annotated[str, typer.Option("--run", help="A run that `vault status` shows.")] = "",
    round: Annotated[int | None, typer.Option("--round", min=0, help="Default: the newest.")] = None,
    file: Annotated[
        str, typer.Option("--file", help="In place of --run: a file by its place in the state folder.")
    ] = "",
) -> None:
    """A decrypted copy: stem, heads and all else of one round as safetensors."""
    from trunkline.client.state import at_rest
    from trunkline.errors import ConfigError

    if bool(run) == bool(file):
        raise ConfigError("expected either --run RUN (and --round N) or --file PLACE.")
    at_rest.open_copy(state or site_dir / ".trunkline", out, run=run, round=round, file=file)
    typer.echo(f"Decrypted copy: {out}. It is for this plant only; remove it after use.")


@client.command("contracts")
def client_contracts(site_dir: SiteDir, state: ClientState = None) -> None:
    """The runs that have asked this plant, and what was decided about each."""
    from rich.console import Console

    from trunkline.client.policy import contracts

    contracts.print_contracts(list(contracts.every(state or site_dir / ".trunkline")), Console())


@client.command("contract")
def client_contract(site_dir: SiteDir, run: RunKey, state: ClientState = None) -> None:
    """What a run would take from this plant, in words."""
    from rich.console import Console

    from trunkline.client.policy import contracts

    contracts.print_contract(contracts.known(state or site_dir / ".trunkline", run), Console())


@client.command("accept")
def client_accept(site_dir: SiteDir, run: RunKey, by: By = "", state: ClientState = None) -> None:
    """Say yes to a run; it holds while nothing about the run changes, and never against the policy."""
    from trunkline.client.policy import consent

    found = consent.decide(state or site_dir / ".trunkline", run, "accepted", by)
    typer.echo(f"{found.site} takes part in {found.run}: accepted by {found.by}.")


@client.command("refuse")
def client_refuse(site_dir: SiteDir, run: RunKey, by: By = "", state: ClientState = None) -> None:
    """Say no to a run, also to one that is under way: from its next question on nothing of it is answered."""
    from trunkline.client.policy import consent

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

    from trunkline.client.policy import manifest

    links, signer = manifest.read_manifest(state or site_dir / ".trunkline", run)
    if json:
        for link in links:
            typer.echo(manifest.dumped(link))
    elif verify:
        typer.echo(manifest.intact(links, signer))
    else:
        manifest.print_manifest(links, signer, Console())


@client.command("prove-egress")
def client_prove_egress(
    site_dir: SiteDir,
    run: Annotated[
        Path | None, typer.Option("--run", metavar="RUN.toml", help="Whose model and strategy; default: a small run.")
    ] = None,
    out: Annotated[Path | None, typer.Option("--out", help="Write the evidence there, JSON.")] = None,
) -> None:
    """Show that nothing private leaves: canaries in a copy of the site, a real recorded run, a search. Exit code 1 if any is found."""
    import json

    from rich.console import Console

    from trunkline.egress_audit import prove
    from trunkline.runtime.storage import write_atomic

    evidence = prove.prove(site_dir, run, tell=lambda text: typer.echo(f"{text} ..."))
    prove.print_evidence(evidence, Console())
    if out is not None:
        write_atomic(out, json.dumps(evidence, indent=2).encode(), mode=0o644)
        typer.echo(f"Evidence: {out}")
    if prove.verdict(evidence):
        raise typer.Exit(1)


def _read_run(path: Path, seed: int | None, strategy: str | None, settings: list[str] | None) -> Any:
    """The run file with the command line laid over it; strategy and options are checked here, before anything starts."""
    from trunkline.config.parsing import parse_value
    from trunkline.config.run import read_run
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


def _show_status(found: dict[str, Any], show: Callable[[dict[str, Any], "Console"], None], as_json: bool) -> None:
    """A daemon's status; exit code 1 where something is wrong, for a monitoring that asks for nothing else."""
    if as_json:
        import json

        typer.echo(json.dumps(found, indent=2, ensure_ascii=False))
    else:
        from rich.console import Console

        show(found, Console())
    if not found["well"]:
        raise typer.Exit(1)


def _watched(out: Path, work: Callable[[], Out], stopped: str) -> Out:
    """Do `work` while a second thread shows the events that the round loop writes; `stopped` is said at Ctrl-C."""
    from rich.console import Console

    from trunkline.runtime.progress import EVENTS, Progress, tail

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

    from trunkline.server.reporting.report import print_report

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
