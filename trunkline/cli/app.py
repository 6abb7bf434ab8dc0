"""The command line: every command, and its entry point."""

import sys
from typing import Annotated

import typer

from trunkline import __version__
from trunkline.cli.client import client
from trunkline.cli.deprecations import print_deprecations
from trunkline.cli.help import use_plain_help
from trunkline.cli.private_state import vault
from trunkline.cli.research import research, trunk
from trunkline.cli.server import server
from trunkline.errors import TrunklineError

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="Factories train one shared backbone together and keep everything else at the plant.",
)
app.add_typer(research)
app.add_typer(server, name="server")
app.add_typer(client, name="client")
client.add_typer(vault, name="vault")
app.add_typer(trunk, name="trunk")
use_plain_help(app)


def print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"trunkline {__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=print_version, help="Print the version and exit.")
    ] = False,
) -> None:
    pass


def main() -> None:
    """Entry point: a TrunklineError is printed in its own words, exit code 1."""
    print_deprecations()
    try:
        app(
            prog_name="trunkline"
        )  # also for `python -m trunkline.cli`, so that usage lines and completion are the same
    except TrunklineError as error:
        sys.stderr.write(f"trunkline: {error}\n")
        sys.exit(1)


if __name__ == "__main__":
    main()
