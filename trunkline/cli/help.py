"""Help pages in plain text. Two faults of typer 0.20 beside click 8.5 are repaired: lost argument texts, and `\\[`."""

from collections.abc import Iterable
from typing import Any, get_type_hints

import click
import typer
from typer.core import TyperArgument, TyperCommand
from typer.models import ArgumentInfo


class PlainFormatter(click.HelpFormatter):
    """Without the backslash that typer puts before `[required]` for rich, which is not in use here."""

    def write_dl(self, rows: Iterable[tuple[str, str]], *args: Any, **options: Any) -> None:
        super().write_dl([(term, text.replace("\\[", "[")) for term, text in rows], *args, **options)


class PlainContext(click.Context):
    formatter_class = PlainFormatter


class PlainCommand(TyperCommand):
    """A command whose arguments keep their help: click 8.5 has a `help` of its own and overwrites typer's with None."""

    context_class = PlainContext

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        hints = get_type_hints(self.callback, include_extras=True) if self.callback else {}
        for parameter in self.params:
            if isinstance(parameter, TyperArgument) and parameter.help is None:
                infos = getattr(hints.get(parameter.name or ""), "__metadata__", ())
                parameter.help = next((info.help for info in infos if isinstance(info, ArgumentInfo)), None)

    def format_arguments(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Nothing: typer lists the arguments itself, and click 8.5 would list them again."""


def use_plain_help(app: typer.Typer) -> None:
    """Make every command of `app` and of its groups a `PlainCommand`."""
    for command in app.registered_commands:
        command.cls = PlainCommand
    for group in app.registered_groups:
        if group.typer_instance is not None:
            use_plain_help(group.typer_instance)
