"""`trunkline client vault`: what a plant keeps of its runs, and the key that encrypts it."""

from pathlib import Path
from typing import Annotated

import typer

from trunkline.cli.options import ClientState, KeySource, SiteDir

vault = typer.Typer(
    no_args_is_help=True, help="What the plant keeps of its runs: how it is encrypted, and with which key."
)


@vault.command("status")
def vault_status(site_dir: SiteDir, state: ClientState = None) -> None:
    """Where the key comes from, what is sealed with which, what is plain, and what is kept of each run."""
    from rich.console import Console

    from trunkline.client.state import at_rest

    summary = at_rest.status(state or site_dir / ".trunkline")
    at_rest.print_status(summary, Console())
    if summary.problem:
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
