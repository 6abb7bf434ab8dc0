"""Reading TOML once, typed, at the edge, with errors that name file, key, and what was expected."""

import tomllib
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from trunkline.config.renames import rename
from trunkline.errors import ConfigError, nearest

Config = TypeVar("Config", bound=BaseModel)


def parse(kind: type[Config], table: dict[str, Any], origin: str) -> Config:
    """A model from a parsed table; `origin` names the table in warnings and errors.

    Raises:
        ConfigError: a line for each mistake: the key, what is allowed, and what was found.
    """
    table = rename(kind, table, origin)
    try:
        return kind.model_validate(table)
    except ValidationError as error:
        raise ConfigError("\n".join(_explain(kind, table, item, origin) for item in error.errors())) from None


def _explain(kind: type[BaseModel], table: dict[str, Any], item: Any, origin: str) -> str:
    """One pydantic complaint in words: file, key, value, what is allowed."""
    path = [str(step) for step in item["loc"]]
    key = ".".join(path)
    if item["type"] == "extra_forbidden":
        siblings = _keys_beside(kind, path)
        return (
            f"{origin}: unknown key `{key}`{nearest(path[-1], siblings)} Allowed here: {', '.join(sorted(siblings))}."
        )
    if item["type"] == "missing":
        return f"{origin}: `{key}` is missing. Add it; docs/ has a page for this file."
    text = str(item["msg"]).removeprefix("Value error, ")
    value = "" if isinstance(item["input"], dict) else f" Found {item['input']!r}."
    return f"{origin}: {f'`{key}`: ' if key else ''}{text}.{value}"


def _keys_beside(kind: type[BaseModel], path: list[str]) -> list[str]:
    """The keys allowed where `path` ends, following nested models and tables of models."""
    model: type[BaseModel] | None = kind
    for step in path[:-1]:
        if model is None:
            return []
        if step in model.model_fields:
            inner: Any = model.model_fields[step].annotation
            arguments = [inner, *getattr(inner, "__args__", ())]
            model = next((kind for kind in arguments if isinstance(kind, type) and issubclass(kind, BaseModel)), None)
    return list(model.model_fields) if model else []


def read(path: Path) -> dict[str, Any]:
    try:
        with path.open("rb") as file:
            return tomllib.load(file)
    except FileNotFoundError:
        raise ConfigError(
            f"{path}: no such file. `trunkline sites` writes example site folders; examples/ has run files."
        ) from None
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{path}: not valid TOML: {error}.") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read: {error}.") from None


def parse_value(text: str) -> Any:
    """The TOML value of `text` on a command line; a bare word is a string."""
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text
