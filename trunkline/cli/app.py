"""The command line: every command, and its entry point."""

import sys

import typer

from trunkline.cli.client import client
from trunkline.cli.private_state import vault
from trunkline.cli.research import research, trunk
from trunkline.cli.server import server
from trunkline.errors import TrunklineError

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None,
                  help="Factories train one shared backbone together and keep everything else at home.")  # fmt: skip
app.add_typer(research)
app.add_typer(server, name="server")
app.add_typer(client, name="client")
client.add_typer(vault, name="vault")
app.add_typer(trunk, name="trunk")


def main() -> None:
    """Entry point: a TrunklineError is printed in its own words, exit code 1."""
    try:
        app()
    except TrunklineError as error:
        sys.stderr.write(f"trunkline: {error}\n")
        sys.exit(1)


if __name__ == "__main__":
    main()
