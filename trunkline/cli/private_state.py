"""`trunkline client vault`: what a plant keeps of its runs, and the key that encrypts it."""

from pathlib import Path
from typing import Annotated

import typer

from trunkline.cli.options import ClientState, KeySource, SiteDir

vault = typer.Typer(no_args_is_help=True, help="The plant's private state: encryption, keys, copies.")


@vault.command("status")
def vault_status(site_dir: SiteDir, state: ClientState = None) -> None:
    """Show the key's source, what it encrypts, and what is kept."""
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
    """Encrypt the plant's private state, existing files included.

    Back the key up: nothing opens without it.
    """
    from trunkline.client.state import at_rest
    from trunkline.config.site import read_site

    site = read_site(site_dir)
    at_rest.seal_state(state or site_dir / ".trunkline", key, tuple(site.tasks), typer.echo)


@vault.command("rekey")
def vault_rekey(
    site_dir: SiteDir,
    state: ClientState = None,
    to: Annotated[
        str | None, typer.Option("--to", help="New source of the key: file:PATH, env:NAME or keyring:NAME")
    ] = None,
    forget: Annotated[
        bool, typer.Option("--forget", help="Remove older keys from a source that other programs may use too.")
    ] = False,
) -> None:
    """Make a new key and encrypt everything with it.

    If the command is interrupted, run it again.
    """
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
        str, typer.Option("--file", help="In place of --run: path of a file within the state folder.")
    ] = "",
) -> None:
    """Write a decrypted copy of one round or one file.

    A round is a safetensors file with stem, heads and the rest of the model.
    """
    from trunkline.client.state import at_rest
    from trunkline.errors import ConfigError

    if bool(run) == bool(file):
        raise ConfigError("expected either --run RUN (and --round N) or --file PLACE.")
    at_rest.open_copy(state or site_dir / ".trunkline", out, run=run, round=round, file=file)
    typer.echo(f"Decrypted copy: {out}. It is for this plant only; remove it after use.")
