"""How a warning about an older name looks on a terminal."""

import warnings
from typing import TextIO

import typer

from trunkline.errors import TrunklineDeprecation


def print_deprecations() -> None:
    """From now on such a warning is one yellow line, without the line of the package that raised it."""
    show_others = warnings.showwarning

    def show(
        message: Warning | str,
        category: type[Warning],
        filename: str,
        lineno: int,
        file: TextIO | None = None,
        line: str | None = None,
    ) -> None:
        if issubclass(category, TrunklineDeprecation):
            typer.secho(f"Warning: {message}", fg=typer.colors.YELLOW, err=True)
        else:
            show_others(message, category, filename, lineno, file, line)

    warnings.showwarning = show
