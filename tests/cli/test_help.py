"""Every help page fits a terminal of 80 columns, and nothing on it is cut."""

import inspect
import os
import subprocess
import sys
from collections.abc import Iterator
from typing import Annotated, get_args, get_origin, get_type_hints

import click
import pytest
import typer
from typer.testing import CliRunner

import trunkline
from trunkline.cli.app import app

COLUMNS = 80
ROOT = typer.main.get_command(app)


def walk(command: click.Command, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], click.Command]]:
    yield path, command
    for name, below in getattr(command, "commands", {}).items():
        yield from walk(below, (*path, name))


PAGES = dict(walk(ROOT))
page_by_page = pytest.mark.parametrize("path", PAGES, ids=lambda path: " ".join(path) or "trunkline")


def read_help(path: tuple[str, ...]) -> str:
    result = CliRunner().invoke(app, [*path, "--help"], terminal_width=COLUMNS, prog_name="trunkline")
    assert result.exit_code == 0, result.output
    return result.output


@page_by_page
def test_a_help_page_fits_and_nothing_is_cut(path: tuple[str, ...]) -> None:
    page = read_help(path)
    assert max(map(len, page.splitlines())) <= COLUMNS
    assert "..." not in page.replace("[ARGS]...", ""), "a summary is longer than its column: shorten the first sentence"
    assert "\\[" not in page
    assert page.startswith(f"Usage: {' '.join(('trunkline', *path))} ")


@page_by_page
def test_a_help_page_describes_every_argument_once(path: tuple[str, ...]) -> None:
    command = PAGES[path]
    text = " ".join(read_help(path).split())
    hints = get_type_hints(inspect.unwrap(command.callback), include_extras=True) if command.callback else {}
    for hint in hints.values():
        if get_origin(hint) is Annotated and getattr(get_args(hint)[1], "help", None):
            if getattr(get_args(hint)[1], "hidden", False):
                continue
            assert text.count(get_args(hint)[1].help) == 1, get_args(hint)[1].help


@page_by_page
def test_a_help_page_says_server_and_not_centre(path: tuple[str, ...]) -> None:
    assert "centre" not in read_help(path).lower()


def trunkline_command(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "trunkline.cli", *arguments], capture_output=True, text=True, timeout=60.0, check=False,
        env=os.environ | environment,
    )  # fmt: skip


def test_version_is_printed_without_a_command() -> None:
    done = trunkline_command("--version")
    assert (done.returncode, done.stdout) == (0, f"trunkline {trunkline.__version__}\n"), done.stderr


@pytest.mark.parametrize(("shell", "word"), [("bash", "complete -o default"), ("zsh", "compdef"), ("fish", "complete")])
def test_completion_prints_a_script_for_the_shell(shell: str, word: str) -> None:
    done = trunkline_command("--show-completion", shell, _TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION="1")
    assert done.returncode == 0, done.stderr
    assert word in done.stdout and "_TRUNKLINE_COMPLETE" in done.stdout


def test_completion_knows_the_commands() -> None:
    done = trunkline_command(
        _TRUNKLINE_COMPLETE="complete_bash", COMP_WORDS="trunkline si", COMP_CWORD="1"
    )  # what the script above calls
    assert {"sites", "simulate"} <= set(done.stdout.split()), done.stdout + done.stderr
