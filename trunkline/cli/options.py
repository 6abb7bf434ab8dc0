"""Arguments and options that several commands share."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

import trunkline.api as api
from trunkline.errors import ConfigError

if TYPE_CHECKING:
    from trunkline.config.run import RunConfig

RunFile = Annotated[Path, typer.Argument(metavar="RUN.toml", help="The run file; docs/run-toml.md describes it.")]
SiteDir = Annotated[Path, typer.Argument(metavar="SITE_DIR", help="The folder with site.toml and the data.")]
OutDir = Annotated[Path, typer.Option("--out", help="Folder of the run: checkpoints, state, report.")]
Settings = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY.PATH=VALUE", help="Override a key of the run file; repeatable."),
]
StrategyName = Annotated[
    str | None,
    typer.Option("--strategy", metavar="NAME", help="Override [strategy] name; its other options are dropped."),
]
Seed = Annotated[int | None, typer.Option("--seed", help="Override seed.")]
Resume = Annotated[bool, typer.Option("--resume", help="Continue from the newest checkpoint in --out.")]
ServerState = Annotated[Path, typer.Option("--state", help="The server's folder: database, secret, logs.")]
ClientState = Annotated[
    Path | None, typer.Option("--state", help="The plant's state: keys, vault, logs. Default: SITE_DIR/.trunkline")
]
KeySource = Annotated[
    str | None,
    typer.Option(
        "--key",
        help="Key that encrypts the secret files: file:PATH, env:NAME or keyring:NAME. Default: a key file of its own.",
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON, for monitoring.")]
By = Annotated[str, typer.Option("--by", help="Who decides. Default: this account's name.")]


def read_run(path: Path, seed: int | None, strategy: str | None, settings: list[str] | None) -> "RunConfig":
    """The run file with the options of the command line laid over it."""
    from trunkline.config.parsing import parse_value

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
    return api.read_run(path, overrides)
