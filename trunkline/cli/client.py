"""`trunkline client`: the commands of a plant's engineer."""

from pathlib import Path
from typing import Annotated

import typer

from trunkline.cli.options import AsJson, By, ClientState, KeySource, SiteDir
from trunkline.cli.output import show_status

client = typer.Typer(no_args_is_help=True, help="A plant: join a federation, train, decide about runs.")
RunKey = Annotated[str, typer.Argument(metavar="RUN", help="As `trunkline client contracts` lists it.")]


@client.command("join")
def client_join(
    site_dir: SiteDir,
    server: Annotated[str, typer.Argument(metavar="HOST:PORT", help="Address of the server.")] = "",
    code: Annotated[str, typer.Option("--code", help="What `trunkline server invite` printed.", prompt=True)] = "",
    state: ClientState = None,
    key: KeySource = None,
    request: Annotated[
        Path | None, typer.Option("--request", help="Without a network: write the request to this file instead.")
    ] = None,
    admission: Annotated[
        Path | None, typer.Option("--admission", help="Without a network: read the answer from this file.")
    ] = None,
) -> None:
    """Join a federation with a one-time code.

    The keys are made here and never leave the plant; the server signs a certificate for them.
    """
    import trunkline.client.agent.join as joining
    from trunkline.client.agent.daemon import state_of
    from trunkline.errors import ConfigError
    from trunkline.security.encryption import find_seal
    from trunkline.security.enrolment import Code
    from trunkline.security.keys import fingerprint, group_digits

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
        raise ConfigError("HOST:PORT of the server is missing: trunkline client join SITE_DIR HOST:PORT --code CODE.")
    typer.echo(
        f"{joined.membership.site} has joined {joined.membership.federation!r}, until {joined.certificate.not_valid_after_utc:%Y-%m-%d}."
    )
    typer.echo(f"Fingerprint of its authority: {group_digits(fingerprint(joined.authority))}")
    if (seal := find_seal(folder)) is not None:
        typer.echo(
            f"Private state is sealed with {seal.source}. Keep a copy of that elsewhere: without it nothing opens."
        )
    typer.echo(f"Next: trunkline client start {site_dir}")


@client.command("renew")
def client_renew(site_dir: SiteDir, state: ClientState = None) -> None:
    """Fetch a new certificate for the same key now.

    The daemon does this by itself before the certificate expires.
    """
    import trunkline.client.agent.join as joining
    from trunkline.client.agent.daemon import state_of

    certificate = joining.renew((state or state_of(site_dir)).resolve())
    typer.echo(
        f"New certificate, valid until {certificate.not_valid_after_utc:%Y-%m-%d %H:%M UTC}; a running daemon takes it up by itself."
    )


@client.command("start")
def client_start(
    site_dir: SiteDir,
    server: Annotated[
        str | None,
        typer.Option("--server", help="HOST:PORT of the server. Default: the one joined, or this machine's."),
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
        float | None, typer.Option("--for", metavar="MINUTES", min=0.0, help="End the pause after this time.")
    ] = None,
    by: By = "",
    state: ClientState = None,
) -> None:
    """Pause training within seconds.

    Use it when the machine is needed for something else. Training continues later where it stopped.
    """
    from trunkline.client import availability as pausing

    until = pausing.pause(state or site_dir / ".trunkline", minutes, by)
    end = f"until {until:%Y-%m-%d %H:%M:%S} UTC" if until else f"until `trunkline client resume {site_dir}`"
    typer.echo(f"Paused {end}. Training that is under way stops between two steps, within 5 s, and loses nothing.")


@client.command("resume")
def client_resume(site_dir: SiteDir, state: ClientState = None) -> None:
    """End a pause; training continues where it stopped."""
    from trunkline.client import availability as pausing

    folder = state or site_dir / ".trunkline"
    typer.echo("The pause is over." if pausing.resume(folder) else "There was no pause.")
    if cause := pausing.in_words(site_dir, folder):
        typer.echo(f"It still stands: {cause}.")


@client.command("status")
def client_status(site_dir: SiteDir, state: ClientState = None, as_json: AsJson = False) -> None:
    """Show what the plant's daemon does, and every problem.

    The exit code is 1 if there is a problem.
    """
    import trunkline.client.agent.status as status

    show_status(status.status(site_dir, state), status.print_status, as_json)


@client.command("report")
def client_report(
    site_dir: SiteDir,
    adapted: Annotated[
        Path | None, typer.Option("--from", help="The --out of `trunkline adapt`. Default: SITE_DIR/.trunkline/adapted")
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", help="Also write a page for a browser; it is not encrypted.")
    ] = None,
) -> None:
    """Show the evidence of the last adaptation.

    Encrypted evidence is decrypted for this command only.
    """
    from rich.console import Console

    from trunkline.client.adaptation import evidence
    from trunkline.runtime.storage import write_atomic

    proof = evidence.read(adapted or site_dir / ".trunkline" / "adapted")
    evidence.render(proof, Console())
    if out is not None:
        write_atomic(out, evidence.page(proof).encode())
        typer.echo(f"Page: {out}")


@client.command("contracts")
def client_contracts(site_dir: SiteDir, state: ClientState = None) -> None:
    """List the runs that asked this plant, and each decision."""
    from rich.console import Console

    from trunkline.client.policy import contracts

    contracts.print_contracts(list(contracts.every(state or site_dir / ".trunkline")), Console())


@client.command("contract")
def client_contract(site_dir: SiteDir, run: RunKey, state: ClientState = None) -> None:
    """Show in words what a run would take from this plant."""
    from rich.console import Console

    from trunkline.client.policy import contracts

    contracts.print_contract(contracts.known(state or site_dir / ".trunkline", run), Console())


@client.command("accept")
def client_accept(site_dir: SiteDir, run: RunKey, by: By = "", state: ClientState = None) -> None:
    """Accept a run.

    The consent is valid while nothing about the run changes. It never overrides the policy.
    """
    from trunkline.client.policy import consent

    decision = consent.decide(state or site_dir / ".trunkline", run, "accepted", by)
    typer.echo(f"{decision.site} takes part in {decision.run}: accepted by {decision.by}.")


@client.command("refuse")
def client_refuse(site_dir: SiteDir, run: RunKey, by: By = "", state: ClientState = None) -> None:
    """Refuse a run, even one that has started.

    The plant answers no further request of the run.
    """
    from trunkline.client.policy import consent

    decision = consent.decide(state or site_dir / ".trunkline", run, "refused", by)
    typer.echo(f"{decision.site} takes no part in {decision.run}: refused by {decision.by}.")


@client.command("manifest")
def client_manifest(
    site_dir: SiteDir,
    run: Annotated[str, typer.Option("--run", help="Show the replies to this run only.")] = "",
    verify: Annotated[bool, typer.Option("--verify", help="Only check that the record is intact.")] = False,
    json: Annotated[bool, typer.Option("--json", help="A line of JSON for each reply.")] = False,
    state: ClientState = None,
) -> None:
    """Show everything that left this plant.

    The exit code is 1 if somebody altered the record.
    """
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
        Path | None,
        typer.Option("--run", metavar="RUN.toml", help="Take model and strategy from this file. Default: a small run."),
    ] = None,
    out: Annotated[Path | None, typer.Option("--out", help="Write the evidence to this file, JSON.")] = None,
) -> None:
    """Test that nothing private leaves this plant.

    It puts canaries into a copy of the site, records a real run and searches every message for them. The exit code is
    1 if the search finds one.
    """
    import json

    from rich.console import Console

    from trunkline.egress_audit import prove
    from trunkline.runtime.storage import write_atomic

    evidence = prove.prove(site_dir, run, emit=lambda text: typer.echo(f"{text} ..."))
    prove.print_evidence(evidence, Console())
    if out is not None:
        write_atomic(out, json.dumps(evidence, indent=2).encode(), mode=0o644)
        typer.echo(f"Evidence: {out}")
    if prove.verdict(evidence):
        raise typer.Exit(1)
