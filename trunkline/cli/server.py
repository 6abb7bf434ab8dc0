"""`trunkline server`: the commands of the federation's operator."""

from pathlib import Path
from typing import Annotated

import typer

from trunkline.cli.options import (
    AsJson,
    KeySource,
    Resume,
    RunFile,
    Seed,
    ServerState,
    Settings,
    StrategyName,
    read_run,
)
from trunkline.cli.output import message_at_interrupt, show_report, show_status

server = typer.Typer(no_args_is_help=True, help="The federation's server: start it, admit plants, submit runs.")


@server.command("init")
def server_init(
    host: Annotated[
        list[str] | None, typer.Option("--host", help="Name or address by which plants reach the server; repeatable.")
    ] = None,
    name: Annotated[str, typer.Option(help="Name of the federation, as plants read it.")] = "Trunkline",
    state: ServerState = Path("trunkline-server"),
    key: KeySource = None,
    site_days: Annotated[float, typer.Option(help="Days a site's certificate is valid.")] = 365.0,
    server_days: Annotated[float, typer.Option(help="Days the server's certificate is valid.")] = 180.0,
) -> None:
    """Create a federation: authority, certificate, register of sites.

    An existing federation is never overwritten.
    """
    from trunkline.security.encryption import find_seal
    from trunkline.security.keys import fingerprint, group_digits
    from trunkline.server.membership import authority

    certificate = authority.init(state.resolve(), name, tuple(host or ()), key, site_days, server_days)
    seal = find_seal(state.resolve())
    typer.echo(f"Federation {name!r} in {state}.")
    typer.echo(f"Fingerprint of its authority: {group_digits(fingerprint(certificate))}")
    if seal is not None:
        typer.echo(f"Its keys are sealed with {seal.source}. Keep a copy of that elsewhere: without it nothing opens.")
    typer.echo(f"Next: trunkline server start --state {state}, and trunkline server invite SITE --state {state}")


@server.command("invite")
def server_invite(
    site: Annotated[str, typer.Argument(metavar="SITE", help="The `name` in the plant's site.toml.")],
    hours: Annotated[float, typer.Option(min=0.0, help="Hours until the code expires.")] = 72.0,
    port: Annotated[
        int | None,
        typer.Option(min=1, max=65535, help="Port that plants reach; default: of the running or last server, or 9140."),
    ] = None,
    state: ServerState = Path("trunkline-server"),
) -> None:
    """Print a one-time code with which a plant joins.

    An earlier unused code for the same site becomes invalid.
    """
    from trunkline.runtime.lock import listening_port
    from trunkline.security.keys import fingerprint, group_digits
    from trunkline.server.gateway.routes import PORT
    from trunkline.server.membership.authority import Authority

    opened = Authority.open(state.resolve())
    code, invitation = opened.invite(site, hours)
    host = opened.federation.hosts[0] if opened.federation.hosts else "HOST"
    typer.echo(f"Code for {site}, good once, until {invitation.expires}:\n\n    {code}\n")
    port = port or listening_port(state.resolve()) or PORT
    typer.echo(f"At the plant: trunkline client join SITE_DIR {host}:{port} --code CODE")
    typer.echo(f"Both should see the authority's fingerprint: {group_digits(fingerprint(opened.certificate))}")


@server.command("admit")
def server_admit(
    request: Annotated[Path, typer.Argument(metavar="REQUEST", help="What `trunkline client join --request` wrote.")],
    out: Annotated[Path, typer.Option("--out", help="The answer, a file to carry back to the plant.")],
    state: ServerState = Path("trunkline-server"),
) -> None:
    """Enrol a plant that cannot reach the server to join.

    Request and answer are files that a person carries.
    """
    from trunkline.runtime.storage import write_atomic
    from trunkline.server.membership.authority import Authority

    admitted = Authority.open(state.resolve()).admit_file(request)
    write_atomic(out, admitted.model_dump_json(indent=1).encode())
    typer.echo(
        f"{admitted.site} is enrolled. At the plant: trunkline client join SITE_DIR HOST:PORT --code CODE --admission {out.name}"
    )


@server.command("sites")
def server_sites(state: ServerState = Path("trunkline-server")) -> None:
    """List the sites: enrolled, invited, revoked, online; until when."""
    from rich.console import Console

    from trunkline.server.membership import authority
    from trunkline.server.operations.status import print_sites

    console = Console()
    print_sites(state.resolve(), console)
    for warning in authority.warnings(state.resolve()):
        console.print(f"Note: {warning}", markup=False)


@server.command("revoke")
def server_revoke(
    site: Annotated[str, typer.Argument(metavar="SITE")],
    reason: Annotated[str, typer.Option(help="The plant and the audit log get this text.")] = "",
    state: ServerState = Path("trunkline-server"),
) -> None:
    """Refuse a site from its next request on.

    The other sites continue. `server invite` admits it again, with a new key.
    """
    from trunkline.server.membership import authority

    entry = authority.revoke(state.resolve(), site, reason)
    typer.echo(f"{site} is revoked since {entry.revoked}: its next request is refused. The other sites continue.")


@server.command("rotate")
def server_rotate(state: ServerState = Path("trunkline-server")) -> None:
    """Make a new key and certificate for the server.

    The next connection uses them. A running server also rotates by itself before the certificate expires.
    """
    from trunkline.security.keys import fingerprint, group_digits
    from trunkline.server.membership.authority import Authority

    certificate = Authority.open(state.resolve()).rotate_server("asked for by the operator")
    typer.echo(
        f"New server certificate, valid until {certificate.not_valid_after_utc:%Y-%m-%d}: {group_digits(fingerprint(certificate))}"
    )


@server.command("audit")
def server_audit(
    state: ServerState = Path("trunkline-server"),
    begin_anew: Annotated[
        bool, typer.Option("--begin-anew", help="Set a log that was altered aside and begin another.")
    ] = False,
) -> None:
    """Show who enrolled, ran and revoked, and check the audit log.

    The exit code is 1 if somebody altered the log.
    """
    from rich.console import Console

    from trunkline.server.membership import audit_log as audit

    if begin_anew:
        typer.echo(f"The former log is now {audit.replace_tampered(state.resolve())}.")
    audit.show(state.resolve(), Console())


@server.command("backup")
def server_backup(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="A new file outside of --state.")],
    state: ServerState = Path("trunkline-server"),
) -> None:
    """Write everything that the server must keep to one file.

    The server may run meanwhile. The file does not hold the key that encrypts the server's keys.
    """
    from trunkline.security.encryption import find_seal
    from trunkline.server.operations import backup

    inventory = backup.back_up(state, file)
    size = sum(member.size for member in inventory.members.values())
    typer.echo(
        f"{file}: {len(inventory.members)} files, {size / 1e6:.1f} MB, {len(inventory.runs)} runs; for this account only."
    )
    if (seal := find_seal(state.resolve())) is not None:
        typer.echo(f"Its keys are sealed with {seal.source}, which is not in it. Keep a copy of that in another place.")


@server.command("restore")
def server_restore(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="What `trunkline server backup` made.")],
    state: Annotated[Path, typer.Option("--state", help="A folder that is empty or does not exist yet.")],
) -> None:
    """Restore a backup into an empty folder.

    The whole backup is checked first. An existing state is never overwritten.
    """
    from trunkline.server.operations import backup

    inventory = backup.restore(file, state, emit=lambda text: typer.echo(f"Note: {text}"))
    typer.echo(
        f"{state}: restored, {len(inventory.members)} files as of {inventory.made}. Next: trunkline server start --state {state}"
    )


@server.command("nginx")
def server_nginx(
    listen: Annotated[str, typer.Option(help="HOST:PORT for nginx to listen on.")] = "0.0.0.0:9140",
    state: ServerState = Path("trunkline-server"),
) -> None:
    """Print the gateway's configuration for nginx.

    Use it to run nginx in place of the built-in gateway. Print it again after `invite` and `revoke`.
    """
    from trunkline.server.gateway.nginx import nginx_config
    from trunkline.server.operations import daemon

    typer.echo(nginx_config(state.resolve(), listen, daemon.upstream_of(state.resolve())))


@server.command("start")
def server_start(
    state: ServerState = Path("trunkline-server"),
    host: Annotated[
        str, typer.Option(help="Address to listen on; beyond loopback only with a federation (`server init`).")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535)] = 9140,
) -> None:
    """Run the server until SIGTERM or Ctrl-C."""
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
    """Submit a run to the server and follow it to its report.

    Ctrl-C stops watching, not the run.
    """
    from trunkline.runtime.watch import run_with_progress
    from trunkline.simulations.folders import prepare

    run = read_run(run_toml, seed, strategy, settings)
    folder = (out or state / "runs" / run.name).resolve()
    prepare(folder, resume=resume, overwrite=overwrite)
    import trunkline.server.operations.daemon as daemon
    from trunkline.server.reporting.report import read_report

    entry = daemon.run(state, run.model_dump_json(), folder, resume=resume)
    typer.echo(f"Run {entry.key}; its folder is {folder}.")
    if entry.state == "wanted":
        typer.echo(f"It is not submitted yet and begins by itself. {entry.note}".strip())
    with message_at_interrupt("no longer watching. The run continues; `trunkline server status` shows it."):
        run_with_progress(folder, lambda: daemon.wait(state, entry.key, folder))
    show_report(read_report(folder), folder)


@server.command("stop")
def server_stop(
    name: Annotated[str, typer.Argument(help="The run's name (the newest one) or key, as `server status` shows it.")],
    state: ServerState = Path("trunkline-server"),
) -> None:
    """End a run for good.

    Without this command a run continues until it is done, whatever happens to the server. `server run --resume`
    continues a stopped run.
    """
    import trunkline.server.operations.daemon as daemon

    entry = daemon.stop(state, name)
    typer.echo(f"Run {entry.key} is being stopped; its checkpoints stay in {entry.out}.")


@server.command("status")
def server_status(state: ServerState = Path("trunkline-server"), as_json: AsJson = False) -> None:
    """Show what each part of the server does, and every problem.

    It also lists the connected sites. The exit code is 1 if there is a problem.
    """
    import trunkline.server.operations.status as status

    show_status(status.status(state), status.print_status, as_json)
