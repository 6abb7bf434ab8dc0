"""Older names of keys and words in site.toml and run.toml, which work for one version and cause a warning.

Each model of a file lists its own in `RENAMED`. `trunkline.config.parsing` applies them to what a person wrote;
`current` applies them to settings that an older Trunkline stored, without a warning.
"""

import copy
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel

from trunkline.errors import ConfigError, TrunklineDeprecation

REFUSED_FROM = "0.3"  # the version that refuses the older names
Path = tuple[str, ...]


@dataclass(frozen=True)
class RenamedKey:
    """A key that has another name or place.

    Args:
        older, newer: key paths with dots; `*` stands for any one key, at the same depth in both.
    """

    older: str
    newer: str


@dataclass(frozen=True)
class RenamedWord:
    """A word that a key may be set to, alone or in a list, and that is another word now."""

    key: str
    older: str
    newer: str


Renaming = RenamedKey | RenamedWord


def renamings_of(model: type[BaseModel]) -> tuple[Renaming, ...]:
    renamings: tuple[Renaming, ...] = getattr(model, "RENAMED", ())
    return renamings


def current(model: type[BaseModel], stored: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of `model` that some Trunkline stored, under the names of this version."""
    table, _, _ = _rename(stored, renamings_of(model), "stored settings")
    return table


def rename(model: type[BaseModel], table: Mapping[str, Any], origin: str) -> dict[str, Any]:
    """The table that a person wrote, under the names of this version; each older name causes one warning.

    Args:
        origin: the file or option, for warnings and errors.

    Raises:
        ConfigError: a key is there under both names.
    """
    renamed, _, notes = _rename(table, renamings_of(model), origin)
    _warn(notes)
    return renamed


def rename_overrides(model: type[BaseModel], overrides: Mapping[str, Any], origin: str) -> dict[str, Any]:
    """The same for `key.path: value` pairs.

    Raises:
        ConfigError: a key is there under both names.
    """
    renamed: dict[str, Any] = {}
    for key, value in overrides.items():
        nested = value
        for step in reversed(key.split(".")):
            nested = {step: nested}
        table, moved, notes = _rename(nested, renamings_of(model), f"{origin}, override {key}")
        _warn(notes)
        settings = {".".join(newer): _get(table, newer) for newer in moved.values()}
        if tuple(key.split(".")) not in moved:
            settings[key] = _get(table, tuple(key.split(".")))
        for newer, setting in settings.items():
            if newer in renamed or (newer != key and newer in overrides):
                raise ConfigError(_both(f"{origin}, overrides", key, newer))
            renamed[newer] = setting
    return renamed


def _rename(
    table: Mapping[str, Any], renamings: Sequence[Renaming], origin: str
) -> tuple[dict[str, Any], dict[Path, Path], list[str]]:
    """(the table with the newer names, older path -> newer path of the keys it moved, a note for each older name)."""
    renamed = copy.deepcopy(dict(table))
    moved: dict[Path, Path] = {}
    notes: list[str] = []
    for renaming in renamings:
        if isinstance(renaming, RenamedKey):
            for older, newer in _moves(renamed, renaming):
                _move(renamed, older, newer, origin)
                moved[older] = newer
                notes.append(_note(origin, f"`{'.'.join(older)}`", f"`{'.'.join(newer)}`"))
        else:
            for path in list(_find(renamed, tuple(renaming.key.split(".")))):
                if _replace(renamed, path, renaming):
                    key = ".".join(path)
                    notes.append(_note(origin, f"`{key}`: {renaming.older!r}", repr(renaming.newer)))
    return renamed, moved, notes


def _moves(table: Mapping[str, Any], renaming: RenamedKey) -> list[tuple[Path, Path]]:
    """Each path of `table` that has the older name, with its newer one."""
    newer = renaming.newer.split(".")
    return [
        (path, tuple(path[depth] if step == "*" else step for depth, step in enumerate(newer)))
        for path in _find(table, tuple(renaming.older.split(".")))
    ]


def _find(table: object, steps: Path, parents: Path = ()) -> Iterator[Path]:
    if not isinstance(table, Mapping):
        return
    first, *deeper = steps
    for key in [*table] if first == "*" else [first]:
        if key not in table:
            continue
        if deeper:
            yield from _find(table[key], tuple(deeper), (*parents, key))
        else:
            yield (*parents, key)


def _get(table: Mapping[str, Any], path: Path) -> Any:
    value: Any = table
    for step in path:
        value = value[step]
    return value


def _move(table: dict[str, Any], older: Path, newer: Path, origin: str) -> None:
    source, target = _get(table, older[:-1]), table
    for step in newer[:-1]:
        target = target.setdefault(step, {})
        if not isinstance(target, dict):
            raise ConfigError(f"{origin}: `{step}` is not a table; expected one with the key `{'.'.join(newer)}`.")
    if newer[-1] in target:
        raise ConfigError(_both(origin, ".".join(older), ".".join(newer)))
    target[newer[-1]] = source.pop(older[-1])


def _replace(table: dict[str, Any], path: Path, renaming: RenamedWord) -> bool:
    """Whether the older word was at `path`; the newer one is there afterwards."""
    parent, key = _get(table, path[:-1]), path[-1]
    value = parent[key]
    if value == renaming.older:
        parent[key] = renaming.newer
        return True
    if isinstance(value, list | tuple) and renaming.older in value:
        parent[key] = [renaming.newer if word == renaming.older else word for word in value]
        return True
    return False


def _both(origin: str, older: str, newer: str) -> str:
    return (
        f"{origin}: `{older}` and `{newer}` are the older and the newer name of one key, and both are set. "
        f"Remove `{older}`."
    )


def _note(origin: str, older: str, newer: str) -> str:
    return (
        f"{origin}: {older} is now called {newer}. Use the newer name: the older one works for one version, "
        f"and Trunkline {REFUSED_FROM} refuses it."
    )


def _warn(notes: Sequence[str]) -> None:
    for note in notes:
        warnings.warn(note, TrunklineDeprecation, stacklevel=1)
